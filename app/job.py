"""What every job does around its stage: configuration, dry run, receipts, lineage events, signals, the last line.

    python -m jobs.<verb> --config F [--set k=v ...] [--dry-run]

A receipt under `receipts/<stage>/` says what a stage took and gave. Its name is a fingerprint of the stage's
inputs, its part of the configuration and its code: a stage whose receipt is there, and whose outputs still
are, is up to date.
"""

import argparse
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from app import openlineage
from app.config import Config, load
from app.errors import ClusterError, RayloopError, StageRefused
from app.storage import Storage
from app.telemetry import set_up_logging
from app.versions import code_version, digest

logger = logging.getLogger(__name__)

CONTROL_STORE_S = 20.0


@dataclass(frozen=True)
class Outcome:
    """What a stage gave."""

    outputs: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    status: str = "done"


@dataclass(frozen=True)
class Job:
    """One verb: its stage function and what decides whether it is up to date."""

    stage: str
    run: Callable[[Config, dict[str, Any]], Outcome]
    """Takes the configuration and the resolved inputs."""
    inputs: Callable[[Config], dict[str, Any]]
    """Resolves the versions or source states the stage would take; raises if they are not there."""
    plan: Callable[[Config, dict[str, Any]], dict[str, Any]]
    """For --dry-run: what would be read and written, with sizes. Writes nothing."""
    sections: tuple[str, ...]
    """Configuration sections that change what the stage does."""
    packages: tuple[str, ...]
    """Stage packages whose code it runs."""
    still_there: Callable[[Config, dict[str, Any]], bool] = lambda config, outputs: True
    """Whether the outputs of an earlier run can still be used."""
    needs_cluster: bool = True
    """Whether `run` works on a Ray cluster."""

    switches: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Flags of its own: each sets a setting to true; name -> (setting, help)."""

    def fingerprint(self, config: Config, inputs: dict[str, Any]) -> str:
        """Digest of all that decides the stage's result."""
        return digest([self.stage, inputs, config.digest(*self.sections), code_version(*self.packages)])

    def receipt(self, config: Config, inputs: dict[str, Any]) -> dict[str, Any] | None:
        """The last line of an earlier run with the same fingerprint, if its outputs can still be used."""
        storage = Storage(config.storage.uri)
        name = ("receipts", self.stage, f"{self.fingerprint(config, inputs)}.json")
        if not storage.exists(*name):
            return None
        receipt: dict[str, Any] = json.loads(storage.read(*name))
        return receipt if self.still_there(config, receipt["outputs"]) else None

    def main(self, arguments: list[str] | None = None) -> int:
        """Run from the command line; returns the exit code. The last line printed is a JSON object."""
        parser = argparse.ArgumentParser(prog=f"python -m jobs.{self.stage}", allow_abbrev=False)
        add_arguments(parser)
        for name, (key, text) in self.switches.items():
            parser.add_argument(f"--{name}", action="append_const", dest="set", const=f"{key}=true", help=text)
        options = parser.parse_args(arguments)
        started_s = time.monotonic()
        line: dict[str, Any] = {
            "stage": self.stage, "status": "failed", "inputs": {}, "outputs": {}, "figures": {}, "seconds": 0.0,
            "error": None,
        }  # fmt: skip
        code = 1
        signal.signal(signal.SIGTERM, _terminate)
        set_up_logging(job=job_id(), stage=self.stage)
        try:
            config = load(options.config, options.set)
            with openlineage.reporting(config, self.stage, job_id(), enabled=not options.dry_run) as run:
                code = self._work(config, options.dry_run, line, run)
        except StageRefused as refusal:
            line |= {"status": "refused", "error": str(refusal), "figures": refusal.figures}
        except RayloopError as error:
            line["error"], code = str(error), error.exit_code
        except SystemExit:
            line["error"], code = "stopped by SIGTERM: submit the job again to continue", 143
        except Exception as error:
            logger.exception("%s ended with an unexpected error", self.stage)
            line["error"] = f"unexpected {type(error).__name__}: {error}"
        if line["error"]:
            print(f"{self.stage}: {line['error']}", file=sys.stderr, flush=True)
        line["seconds"] = round(time.monotonic() - started_s, 2)
        print(json.dumps(line, default=str), flush=True)
        return code

    def _work(self, config: Config, dry_run: bool, line: dict[str, Any], run: openlineage.Run) -> int:
        line["inputs"] = inputs = self.inputs(config)
        if dry_run:
            planned = self.plan(config, inputs)
            print(f"{self.stage} would do this; nothing was written:\n{json.dumps(planned, indent=2, default=str)}")
            line |= {
                "status": "up_to_date" if self.receipt(config, inputs) else "done",
                "figures": {"plan": planned},
            }
            return 0
        if receipt := self.receipt(config, inputs):
            line |= {"status": "up_to_date", "outputs": receipt["outputs"], "figures": receipt["figures"]}
            return 0
        run.start(inputs)
        if self.needs_cluster:
            connect()
            # Ray 2.60 puts a handler of its own before ours, which aborts the process 3 s after the signal.
            signal.signal(signal.SIGTERM, _terminate)
        outcome = self.run(config, inputs)
        line |= {"status": outcome.status, "outputs": outcome.outputs, "figures": outcome.figures}
        name = f"{self.fingerprint(config, inputs)}.json"
        content = {**line, "job": job_id(), "config": config.model_dump(mode="json")}
        Storage(config.storage.uri).write(json.dumps(content, default=str).encode(), "receipts", self.stage, name)
        run.complete(outcome.outputs, outcome.figures, outcome.status == "done")
        return 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The three flags that every job takes."""
    parser.add_argument("--config", required=True, metavar="F", help="YAML file, see jobs/configs/")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="K=V",
        help="replace one setting, e.g. training.max_steps=50",
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be read and written, write nothing")


def job_id() -> str:
    """The Ray job submission id, or `local` outside a submitted job."""
    metadata = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("metadata", {})
    return str(metadata.get("job_submission_id", "local"))


def working_dir() -> str:
    """The code a job started from here is to run: this job's own package, or the current folder."""
    runtime_env = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("runtime_env", {})
    return str(runtime_env.get("working_dir", os.getcwd()))


def connect() -> None:
    """Connect this process to the running cluster.

    Raises:
        ClusterError: There is none.
    """
    import ray

    try:
        _wait_for_control_store()
        ray.init(address="auto", log_to_driver=False, ignore_reinit_error=True, logging_level=logging.WARNING)
    except ConnectionError as error:
        raise ClusterError(
            "no Ray cluster is running here", "start one with `make start`, or set RAY_ADDRESS to yours"
        ) from error


def _wait_for_control_store() -> None:
    """Where RAY_ADDRESS names a port that nobody listens on, Ray 2.60 goes on trying for a quarter of an hour.

    Raises:
        ConnectionError: Nobody did for CONTROL_STORE_S, in which a control store that is started again is back.
    """
    host, colon, port = os.environ.get("RAY_ADDRESS", "").rpartition(":")
    if not colon or not port.isdigit() or "/" in host:
        return
    until_s = time.monotonic() + CONTROL_STORE_S
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
        except OSError as error:
            if time.monotonic() > until_s:
                raise ConnectionError(f"{host}:{port}: {error}") from error
            time.sleep(1)
        else:
            return


def _terminate(signum: int, frame: FrameType | None) -> None:
    # Raised in the main thread, so that context managers end what they started.
    raise SystemExit(128 + signum)
