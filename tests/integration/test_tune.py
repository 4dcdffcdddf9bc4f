"""The search on the real cluster: trials, early stops, failures, populations, and a driver that dies."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from app.config import Config
from app.errors import ClusterError, ConfigError, StageFailed
from app.registry import Registry
from app.storage import Storage
from app.versions import TableVersion
from tests.conftest import ROOT, RunningCluster
from tests.faults import Fault

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
    "tuning.space": {"training.learning_rate": {"kind": "choice", "choices": [1e-9, 1e-8, 1e-2]}},
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
    from app.tuning.search import tune
    from app.tuning.trials import search_name

    tuned = tune(config, table)
    assert tuned.overrides == {"training.learning_rate": 1e-2}
    assert tuned.figures["trials"] == 3
    assert tuned.figures["failed"] == 0
    assert tuned.figures["best"]["steps"] == 20
    rows = tuned.figures["table"]
    assert [row["validation_loss"] for row in rows] == sorted(row["validation_loss"] for row in rows)
    assert config.with_overrides(tuned.overrides).training.learning_rate == 1e-2
    report = Path(tuned.figures["report"]).read_text()
    assert "validation_loss by training.learning_rate" in report
    assert report.count("<svg") == 3
    registry = Registry(config)
    found = registry._client.search_runs([registry._experiment_id()])
    parent = next(run for run in found if run.data.tags.get("rayloop.run") == search_name(config, table))
    trials = [run for run in found if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(trials) == 3
    assert {run.info.status for run in (parent, *trials)} == {"FINISHED"}
    assert {float(run.data.params["training.learning_rate"]) for run in trials} >= {1e-2}
    assert all("validation_loss" in run.data.metrics for run in trials)


def test_a_later_search_on_the_same_subject_trains_no_point_again(config: Config, table: TableVersion) -> None:
    from app.tuning.search import tune

    # The test before has tried all three points.
    later = config.with_overrides({"tuning.searcher": "tpe", "tuning.trials": 9})
    tuned = tune(later, table)
    assert tuned.overrides == {"training.learning_rate": 1e-2}
    assert (tuned.figures["trials"], tuned.figures["reused"]) == (0, 3)


def test_the_best_of_a_named_search_is_tried_first(config: Config, table: TableVersion) -> None:
    from app.tuning.search import tune
    from app.tuning.trials import search_name

    space = {"training.learning_rate": {"kind": "log_float", "low": 1e-10, "high": 1e-1}}
    elsewhere = config.with_overrides(
        {
            "tuning.space": space, "tuning.warm_start": [search_name(config, table)], "tuning.trials": 1,
            "tuning.max_steps": 5, "training.seed": 3, "tuning.scheduler": "none",
        }
    )  # fmt: skip
    tuned = tune(elsewhere, table)
    assert tuned.overrides == {"training.learning_rate": 1e-2}
    assert tuned.figures["reused"] == 0, "another seed is another subject"
    with pytest.raises(ConfigError, match=r"there is no search 'nowhere': searches are: support-"):
        tune(elsewhere.with_overrides({"tuning.warm_start": ["nowhere"]}), table)


def test_a_failing_trial_fails_itself_only(config: Config, table: TableVersion) -> None:
    from app.tuning.search import tune

    # A block of 60,000 tokens a step is more than the table fills: such a trial cannot run.
    space = {"training.micro_batch_size": {"kind": "choice", "choices": [4, 60_000]}}
    shorter = {"tuning.space": space, "tuning.max_steps": 5, "tuning.scheduler": "none", "tuning.trials": 4}
    tuned = tune(config.with_overrides(shorter), table)
    assert tuned.overrides == {"training.micro_batch_size": 4}
    assert (tuned.figures["trials"], tuned.figures["failed"]) == (2, 1), "the space has two points"
    assert {row["values"]["training.micro_batch_size"] for row in tuned.figures["table"] if row["error"]} == {60_000}


def test_when_too_many_trials_fail_the_stage_fails_with_their_reason(config: Config, table: TableVersion) -> None:
    from app.tuning.search import tune

    space = {"training.micro_batch_size": {"kind": "choice", "choices": [60_000]}}
    with pytest.raises(StageFailed, match=r"1 of 1 trials failed .*one step takes 60000"):
        tune(config.with_overrides({"tuning.space": space, "tuning.trials": 2}), table)


def test_more_trials_at_a_time_than_the_cluster_holds_are_refused(config: Config, table: TableVersion) -> None:
    from app.tuning.search import tune

    with pytest.raises(ClusterError, match="200 workers of 1 CPU each do not fit"):
        tune(config.with_overrides({"tuning.concurrent_trials": 200}), table)


@pytest.mark.slow
@pytest.mark.fault("F15", seen="the search said that a trial's process died; the driver was killed with trials left")
def test_a_search_whose_trial_and_then_driver_are_killed_goes_on_with_its_trials(
    config: Config, table: TableVersion, tmp_path: Path, fault: Fault
) -> None:
    from app.tuning.trials import search_name

    space = {"training.learning_rate": {"kind": "log_float", "low": 1e-3, "high": 1e-2}}
    longer = config.with_overrides(
        {"tuning.space": space, "tuning.seed": 5 + fault.seed, "tuning.trials": 5, "tuning.concurrent_trials": 2}
    )
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(longer.model_dump(mode="json"), sort_keys=False))
    said = tmp_path / "said.txt"

    def start() -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "jobs.tune", "--config", str(file)]
        return subprocess.Popen(command, cwd=ROOT, stdout=said.open("ab"), stderr=subprocess.STDOUT)

    others = trial_processes()
    job = start()
    folder = Path(Storage(config.storage.uri).path("search", search_name(longer, table), "trials"))
    wait_for(job, said, lambda: trial_processes() - others)
    time.sleep(2 * fault.random.random())
    wait_for(job, said, lambda: trial_processes() - others)
    os.kill(fault.random.choice(sorted(trial_processes() - others)), signal.SIGKILL)
    wait_for(job, said, lambda: re.search(r"the process of trial \d died: it starts again", said.read_text()))
    wait_for(job, said, lambda: len(ended(folder)) >= 2 and running(folder))
    job.send_signal(signal.SIGKILL)
    job.wait()
    before, cut_short = ended(folder), running(folder)
    assert len(before) < 5
    assert cut_short
    fault.happened()
    assert start().wait(timeout=240) == 0, said.read_text()
    fault.recovered()
    line: dict[str, Any] = json.loads(said.read_text().splitlines()[-1])
    assert line["status"] == "done"
    assert f"{len(before)} of 5 trials have ended in an earlier attempt" in said.read_text()
    assert (line["figures"]["trials"], line["figures"]["failed"]) == (5, 0)
    after = ended(folder)
    assert {name: after[name] for name in before} == before, "none was run again"
    points = [json.dumps(json.loads((folder / name).read_text())["values"]) for name in after]
    assert len(points) == len(set(points)) == 5
    assert cut_short <= set(points), "what was cut short was tried again"
    losses = [row["validation_loss"] for row in line["figures"]["table"]]
    assert line["figures"]["best"]["validation_loss"] == min(losses)


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", ["pbt", "pb2"])
def test_a_population_goes_on_from_its_best_members_checkpoint(
    config: Config, table: TableVersion, scheduler: str
) -> None:
    from app.tuning.search import tune

    population = config.with_overrides(
        {
            "tuning.searcher": "random", "tuning.scheduler": scheduler, "tuning.trials": 2,
            "tuning.concurrent_trials": 2, "tuning.max_steps": 30, "tuning.grace_steps": 10,
            "tuning.space": {"training.learning_rate": {"kind": "log_float", "low": 1e-5, "high": 2e-2}},
        }
    )  # fmt: skip
    tuned = tune(population, table)
    rows = tuned.figures["table"]
    assert [row["steps"] for row in rows] == [30, 30]
    changed = [row for row in rows if row.get("changes")]
    assert changed, "one took over the other's weights"
    for row in changed:
        step, values = row["changes"][-1]
        assert step in (10, 20)
        assert 1e-5 <= values["training.learning_rate"] <= 2e-2
        # From weights of its own it would be far behind: most is learned in the first steps.
        assert row["validation_loss"] < 1.1 * rows[0]["validation_loss"]


def test_a_trial_of_several_workers_reports_through_ray_train(config: Config, table: TableVersion) -> None:
    from app.tuning.search import tune

    wide = config.with_overrides(
        {
            "tuning.num_workers": 2, "tuning.trials": 1, "tuning.concurrent_trials": 1, "tuning.max_steps": 5,
            "tuning.scheduler": "none",
        }
    )  # fmt: skip
    tuned = tune(wide, table)
    assert tuned.figures["best"]["steps"] == 5
    assert tuned.figures["failed"] == 0


def kept(folder: Path, state: str) -> dict[str, tuple[int, str]]:
    """The trials in a state: file names, with the time they were written and their values."""
    found = {}
    for file in folder.glob("*.json"):
        trial = json.loads(file.read_text())
        if trial["state"] == state:
            found[file.name] = (file.stat().st_mtime_ns, json.dumps(trial["values"]))
    return found


def ended(folder: Path) -> dict[str, tuple[int, str]]:
    """What is kept of the trials that have ended."""
    return kept(folder, "ended")


def running(folder: Path) -> set[str]:
    """The values of the trials that are under way."""
    return {values for _, values in kept(folder, "running").values()}


def trial_processes() -> set[int]:
    """Ids of the processes that trials train in, by the title that Ray gives them."""
    found = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if "".join(process.cmdline()).startswith("ray::ImplicitFunc"):
                found.add(process.pid)
    return found


def wait_for(job: "subprocess.Popen[bytes]", said: Path, done: Any) -> None:
    """Until `done()`; fails where the job ends before."""
    deadline_s = time.monotonic() + 240
    while not done():
        assert job.poll() is None, said.read_text()
        assert time.monotonic() < deadline_s, said.read_text()
        time.sleep(0.2)
