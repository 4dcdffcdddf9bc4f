"""The path once, in order: each stage a Ray job of its own, started from the versions before it.

    ray job submit --working-dir . -- python -m jobs.lifecycle --config jobs/configs/demo.yaml

A stage whose inputs, configuration and code are those of an earlier run is up to date and skipped. The first
stage that fails ends the path with its reason. Submitted again after a kill, the path goes on where it
stopped: finished stages are up to date, and a stage whose job is still running is followed, not repeated.
"""

import json
import shlex
import sys
import time
from typing import Any

from ray.job_submission import JobStatus, JobSubmissionClient

from app import job, openlineage
from app.config import Config
from app.errors import ClusterError, StageFailed
from app.job import Job, Outcome
from jobs import compress, evaluate, ingest, monitor, serve, train, tune

JOBS: dict[str, Job] = {
    "ingest": ingest.JOB,
    "tune": tune.JOB,
    "train": train.JOB,
    "compress": compress.JOB,
    "evaluate": evaluate.JOB,
    "serve": serve.JOB,
    "monitor": monitor.JOB,
}
POLL_S = 1.0


def run(config: Config, inputs: dict[str, Any]) -> Outcome:
    """Run every stage of `lifecycle.stages`; the figures are each stage's last line.

    Raises:
        StageFailed: A stage failed or refused; its reason is in the message.
    """
    client = connect()
    handed_on: dict[str, Any] = {}
    lines: dict[str, Any] = {}
    for name in config.lifecycle.stages:
        stage_job = JOBS[name]
        stage_config = config.with_overrides(handed_on)
        stage_inputs = stage_job.inputs(stage_config)
        receipt = stage_job.receipt(stage_config, stage_inputs)
        if receipt:
            say(f"{name} is up to date: {brief(receipt['outputs'])}")
            lines[name] = receipt | {"status": "up_to_date", "seconds": 0.0}
        else:
            fingerprint = stage_job.fingerprint(stage_config, stage_inputs)
            lines[name] = run_stage(client, name, handed_on, fingerprint, config.lifecycle.job_timeout_s)
        handed_on |= hand_on(name, lines[name]["outputs"])
    kept = ("status", "outputs", "figures", "seconds")
    return Outcome(
        outputs={name: line["outputs"] for name, line in lines.items()},
        figures={name: {key: line[key] for key in kept} for name, line in lines.items()},
    )


def hand_on(stage: str, outputs: dict[str, Any]) -> dict[str, Any]:
    """The settings that a stage's outputs become for the stages after it."""
    if "table" in outputs:
        return {"inputs.snapshot_id": outputs["table"]["snapshot_id"]}
    if "model" in outputs:
        return {"inputs.model_version": outputs["model"]["version"]}
    return dict(outputs["overrides"]) if stage == "tune" else {}


def run_stage(
    client: JobSubmissionClient, name: str, handed_on: dict[str, Any], fingerprint: str, timeout_s: float
) -> dict[str, Any]:
    """Submit one stage as a job, or follow the one that runs it already; returns its last line.

    Raises:
        StageFailed: The job ended in any other way than well.
    """
    started_s = time.monotonic()
    submission = submit(client, name, handed_on, fingerprint)
    try:
        status = follow(client, name, submission, started_s + timeout_s)
    except SystemExit:
        client.stop_job(submission)
        raise
    line = last_line(client.get_job_logs(submission))
    if status != JobStatus.SUCCEEDED or line is None:
        message = line["error"] if line else client.get_job_info(submission).message
        raise StageFailed(f"{name} {line['status'] if line else status}: {message}", f"see `ray job logs {submission}`")
    say(f"{name} {line['status']} in {line['seconds']:.0f} s: {brief(line['outputs'])} {brief(line['figures'])}")
    return line


def submit(client: JobSubmissionClient, name: str, handed_on: dict[str, Any], fingerprint: str) -> str:
    """The submission id of the job that runs this very stage: the running one if there is one, else a new one."""
    prefix = f"{name}-{fingerprint[:12]}"
    earlier = [info for info in client.list_jobs() if (info.submission_id or "").startswith(prefix)]
    for info in earlier:
        if not info.status.is_terminal() and info.submission_id:
            say(f"{name} is running already as {info.submission_id}")
            return info.submission_id
    command = ["python", "-m", f"jobs.{name}", *sys.argv[1:]]
    for key, value in handed_on.items():
        command += ["--set", f"{key}={json.dumps(value)}"]
    submission = f"{prefix}-{len(earlier) + 1}"
    say(f"{name} starts as job {submission}")
    client.submit_job(
        entrypoint=shlex.join(command),
        submission_id=submission,
        runtime_env={"working_dir": job.working_dir(), "env_vars": openlineage.child_environment()},
        metadata={"rayloop_stage": name},
    )
    return submission


def follow(client: JobSubmissionClient, name: str, submission: str, deadline_s: float) -> JobStatus:
    """Print a job's progress until it has ended; returns how."""
    printed = 0
    while True:
        status = client.get_job_status(submission)
        lines = client.get_job_logs(submission).splitlines()
        for line in lines[printed:]:
            if line.startswith(f"{name}: "):
                say(f"  {line}")
        printed = len(lines)
        if status.is_terminal():
            return status
        if time.monotonic() > deadline_s:
            client.stop_job(submission)
            raise StageFailed(f"{name} was stopped: it took longer than allowed", "raise lifecycle.job_timeout_s")
        time.sleep(POLL_S)


def last_line(logs: str) -> dict[str, Any] | None:
    """The JSON object a job ends with, or none if it was killed before that."""
    for line in reversed(logs.splitlines()):
        if line.startswith('{"stage": '):
            found: dict[str, Any] = json.loads(line)
            return found
    return None


def brief(values: dict[str, Any]) -> str:
    """Numbers and names of one level, for people."""
    words = []
    for key, value in values.items():
        if isinstance(value, dict) and key in ("table", "model"):
            words.append(
                f"{key} {value.get('table') or value.get('model')}/{value.get('snapshot_id') or value.get('version')}"
            )
        elif isinstance(value, float):
            words.append(f"{key}={value:.4g}")
        elif isinstance(value, int | str):
            words.append(f"{key}={value}")
    return " ".join(words)


def say(text: str) -> None:
    """One line for the person who follows the path."""
    print(f"lifecycle: {text}", flush=True)


def connect() -> JobSubmissionClient:
    """A client of the running cluster's job service.

    Raises:
        ClusterError: There is no cluster.
    """
    try:
        return JobSubmissionClient()
    except (ConnectionError, RuntimeError) as error:
        raise ClusterError(
            "no Ray cluster is running here", "start one with `make start`, or set RAY_ADDRESS"
        ) from error


def plan(config: Config, inputs: dict[str, Any]) -> dict[str, Any]:
    """What each stage would do, up to the first whose inputs are not there yet."""
    planned: dict[str, Any] = {}
    handed_on: dict[str, Any] = {}
    for name in config.lifecycle.stages:
        stage_job = JOBS[name]
        stage_config = config.with_overrides(handed_on)
        stage_inputs = stage_job.inputs(stage_config)
        receipt = stage_job.receipt(stage_config, stage_inputs)
        planned[name] = "up to date" if receipt else stage_job.plan(stage_config, stage_inputs)
        if not receipt:
            later = config.lifecycle.stages[config.lifecycle.stages.index(name) + 1 :]
            return planned | dict.fromkeys(later, f"runs after {name}")
        handed_on |= hand_on(name, receipt["outputs"])
    return planned


JOB = Job(
    stage="lifecycle",
    run=run,
    inputs=lambda config: {},
    plan=plan,
    sections=(),
    packages=(),
    still_there=lambda config, outputs: False,  # each stage answers for itself
    needs_cluster=False,
)

if __name__ == "__main__":
    sys.exit(JOB.main())
