"""The frame of every job: last line, exit codes, receipts, dry run, signals."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from app.config import Config
from app.errors import SourceError, StageRefused
from app.job import Job, Outcome, job_id

KEYS = ["stage", "status", "inputs", "outputs", "figures", "seconds", "error"]


class Counting:
    """A stage that counts its runs; `act` may raise."""

    def __init__(self, act: Any = None) -> None:
        self.runs = 0
        self.act = act
        self.there = True
        self.source = 1

    def run(self, config: Config, inputs: dict[str, Any]) -> Outcome:
        self.runs += 1
        if self.act:
            self.act()
        return Outcome({"table": {"table": "t", "snapshot_id": self.runs}}, {"rows": 3})

    def job(self) -> Job:
        return Job(
            stage="ingest",
            run=self.run,
            inputs=lambda config: {"source": self.source},
            plan=lambda config, inputs: {"reads": "1 file, 10 bytes"},
            sections=("ingestion",),
            packages=("ingestion",),
            still_there=lambda config, outputs: self.there,
            needs_cluster=False,
        )


@pytest.fixture
def arguments(tmp_path: Path, store: str) -> list[str]:
    (tmp_path / "c.yaml").write_text(f"storage: {{uri: {store}}}")
    return ["--config", str(tmp_path / "c.yaml")]


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    line: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(line) == KEYS
    return line


def test_a_stage_that_ran_is_up_to_date_afterwards(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    stage = Counting()
    assert stage.job().main(arguments) == 0
    first = last_line(capsys)
    assert stage.job().main(arguments) == 0
    second = last_line(capsys)
    assert (first["status"], second["status"], stage.runs) == ("done", "up_to_date", 1)
    assert second["outputs"] == first["outputs"]
    assert second["figures"] == {"rows": 3}


@pytest.mark.parametrize("change", ["setting", "input", "output gone"])
def test_a_change_makes_it_run_again(arguments: list[str], change: str) -> None:
    stage = Counting()
    stage.job().main(arguments)
    if change == "setting":
        arguments += ["--set", "ingestion.sample.seed=8"]
    elif change == "input":
        stage.source = 2
    else:
        stage.there = False
    stage.job().main(arguments)
    assert stage.runs == 2


def test_another_sections_setting_does_not(arguments: list[str]) -> None:
    stage = Counting()
    stage.job().main(arguments)
    stage.job().main([*arguments, "--set", "training.seed=5"])
    assert stage.runs == 1


def test_a_dry_run_says_the_plan_and_writes_nothing(
    arguments: list[str], store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = Counting()
    assert stage.job().main([*arguments, "--dry-run"]) == 0
    assert last_line(capsys)["figures"] == {"plan": {"reads": "1 file, 10 bytes"}}
    assert stage.runs == 0
    assert not Path(store).exists()


def raiser(error: BaseException) -> Any:
    def act() -> None:
        raise error

    return act


@pytest.mark.parametrize(
    ("error", "code", "status", "said"),
    [
        (SourceError("no file at /x", "check the path"), 1, "failed", "no file at /x: check the path"),
        (StageRefused("perplexity 9", "", {"perplexity": 9}), 1, "refused", "perplexity 9"),
        (KeyError("oops"), 1, "failed", "unexpected KeyError"),
    ],
)
def test_a_failure_ends_with_its_code_and_sentence(
    arguments: list[str], capsys: pytest.CaptureFixture[str], error: Exception, code: int, status: str, said: str
) -> None:
    stage = Counting(raiser(error))
    assert stage.job().main(arguments) == code
    line = last_line(capsys)
    assert line["status"] == status
    assert said in line["error"]
    stage.job().main(arguments)
    assert stage.runs == 2, "a failure leaves no receipt"


def test_a_wrong_configuration_exits_with_two(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert Counting().job().main([*arguments, "--set", "ingestion.tabel=x"]) == 2
    assert "did you mean 'table'?" in last_line(capsys)["error"]


def test_sigterm_ends_it_with_143_after_cleaning_up(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    cleaned = []

    def act() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        finally:
            cleaned.append(True)

    before = signal.getsignal(signal.SIGTERM)
    try:
        assert Counting(act).job().main(arguments) == 143
    finally:
        signal.signal(signal.SIGTERM, before)
    assert cleaned
    assert "submit the job again" in last_line(capsys)["error"]


def test_outside_a_submitted_job_the_id_is_local() -> None:
    assert job_id() == "local"
