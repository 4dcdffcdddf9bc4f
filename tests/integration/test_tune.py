"""The search on the real cluster: trials, early stops, failures, and a driver that dies."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.config import Config
from app.errors import ClusterError, StageFailed
from app.registry import Registry
from app.storage import Storage
from app.versions import TableVersion
from tests.conftest import ROOT, RunningCluster

TINY = {
    "training.base_model": "preset:tiny",
    "training.vocab_size": 512,
    "training.block_tokens": 64,
    "training.micro_batch_size": 4,
    "training.validation_blocks": 16,
    "training.zero_stage": 0,
    "ingestion.sample.conversations": 400,
    "tuning.trials": 3,
    "tuning.concurrent_trials": 3,
    "tuning.max_steps": 20,
    "tuning.grace_steps": 5,
    "tuning.space": {"training.learning_rate": {"kind": "choice", "choices": [1e-9, 1e-2]}},
    "tuning.random_trials": 1,
}


@pytest.fixture(scope="module")
def config(cluster: RunningCluster, tmp_path_factory: pytest.TempPathFactory) -> Config:
    return Config().with_overrides({**TINY, "storage.uri": str(tmp_path_factory.mktemp("tune") / "store")})


@pytest.fixture(scope="module")
def table(config: Config) -> TableVersion:
    from app.ingestion.pipeline import ingest

    return ingest(config).version


def test_search_finds_the_better_settings_and_records_its_trials(config: Config, table: TableVersion) -> None:
    from app.tuning.search import search_name, tune

    tuned = tune(config, table)
    assert tuned.overrides == {"training.learning_rate": 1e-2}
    assert tuned.figures["trials"] == 3
    assert tuned.figures["failed"] == 0
    assert tuned.figures["best"]["steps"] == 20
    rows = tuned.figures["table"]
    assert [row["validation_loss"] for row in rows] == sorted(row["validation_loss"] for row in rows)
    assert config.with_overrides(tuned.overrides).training.learning_rate == 1e-2
    registry = Registry(config)
    found = registry._client.search_runs([registry._experiment_id()])
    parent = next(run for run in found if run.data.tags.get("rayloop.run") == search_name(config, table))
    trials = [run for run in found if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(trials) == 3
    assert {run.info.status for run in (parent, *trials)} == {"FINISHED"}
    assert {float(run.data.params["training.learning_rate"]) for run in trials} >= {1e-2}
    assert all("validation_loss" in run.data.metrics for run in trials)


def test_a_failing_trial_fails_itself_only(config: Config, table: TableVersion) -> None:
    from app.tuning.search import tune

    # A block of 60,000 tokens a step is more than the table fills: such a trial cannot run.
    space = {"training.micro_batch_size": {"kind": "choice", "choices": [4, 60_000]}}
    tuned = tune(config.with_overrides({"tuning.space": space, "tuning.max_steps": 5, "tuning.trials": 4}), table)
    assert tuned.overrides == {"training.micro_batch_size": 4}
    assert 0 < tuned.figures["failed"] < 4
    assert {row["values"]["training.micro_batch_size"] for row in tuned.figures["table"] if row["error"]} == {60_000}


def test_when_every_trial_fails_the_stage_fails_with_their_reason(config: Config, table: TableVersion) -> None:
    from app.tuning.search import tune

    space = {"training.micro_batch_size": {"kind": "choice", "choices": [60_000]}}
    with pytest.raises(StageFailed, match=r"all 2 trials failed .*one step takes 60000"):
        tune(config.with_overrides({"tuning.space": space, "tuning.trials": 2}), table)


def test_more_trials_at_a_time_than_the_cluster_holds_are_refused(config: Config, table: TableVersion) -> None:
    from app.tuning.search import tune

    with pytest.raises(ClusterError, match="200 workers of 1 CPU each do not fit"):
        tune(config.with_overrides({"tuning.concurrent_trials": 200}), table)


def test_a_search_whose_driver_is_killed_goes_on_with_its_trials(
    config: Config, table: TableVersion, tmp_path: Path
) -> None:
    from app.tuning.search import search_name

    longer = config.with_overrides({"tuning.seed": 5, "tuning.trials": 4, "tuning.concurrent_trials": 2})
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(longer.model_dump(mode="json")))
    command = [sys.executable, "-m", "jobs.tune", "--config", str(file)]

    def start() -> "subprocess.Popen[str]":
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    job = start()
    trials = Path(Storage(config.storage.uri).path("search", search_name(longer, table), "trials"))
    deadline_s = time.monotonic() + 240
    while len(ended(trials)) < 2:
        assert job.poll() is None, job.communicate()[0]
        assert time.monotonic() < deadline_s
        time.sleep(0.2)
    job.send_signal(signal.SIGKILL)
    job.communicate()
    before = ended(trials)
    assert len(before) < 4, "it was killed in the middle"
    output = start().communicate(timeout=240)[0]
    line: dict[str, Any] = json.loads(output.splitlines()[-1])
    assert line["status"] == "done", output
    assert f"{len(before)} of 4 trials have ended in an earlier attempt" in output
    assert line["figures"]["trials"] == 4
    after = ended(trials)
    assert len(after) == 4
    assert {file: after[file] for file in before} == before, "none was run again"


def test_a_trial_of_several_workers_reports_through_ray_train(config: Config, table: TableVersion) -> None:
    from app.tuning.search import tune

    wide = config.with_overrides(
        {"tuning.num_workers": 2, "tuning.trials": 1, "tuning.concurrent_trials": 1, "tuning.max_steps": 5}
    )
    tuned = tune(wide, table)
    assert tuned.figures["best"]["steps"] == 5
    assert tuned.figures["failed"] == 0


def ended(folder: Path) -> dict[Path, int]:
    """What is kept of the trials that have ended, with the time it was written."""
    return {file: file.stat().st_mtime_ns for file in folder.glob("*.json")}
