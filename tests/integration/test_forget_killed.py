"""Forgetting is killed at any point and continued: in the end no trace is left, and everything else is there."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from app import tables
from app.forget import forget
from app.registry import Registry
from tests import forgettable
from tests.forgettable import GONE, SETTINGS, STAY, Forgettable, traces
from tests.table_rows import ids, table_of


def killed(store: str, step: int) -> bool:
    """Whether a run in a process of its own was killed before its step."""
    command = [sys.executable, "-m", "tests.killed_forget", store, str(step)]
    run = subprocess.run(command, cwd=os.getcwd(), capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode in (0, -signal.SIGKILL), run.stderr
    return run.returncode != 0


def check_continued(made: Forgettable, store: str) -> None:
    """Run it again, and look everywhere."""
    before = ids(made.config, tables.latest(made.config))
    assert set(STAY) <= set(before) <= {*STAY, *GONE}, "readers see whole versions all the time"
    forget(made.config, GONE, SETTINGS)
    assert traces(store) == {}
    assert ids(made.config, tables.latest(made.config)) == STAY
    assert ids(made.config, tables.resolve(made.config, "raw")) == [each for each in STAY if each < "conversation-110"]
    assert ids(made.config, made.learned) == [each for each in STAY if each < "conversation-120"]
    assert "rayloop.forgotten" in Registry(made.config).tags(made.model)
    assert set(table_of(made.config).refs()) == {"main", "raw"}
    assert not list((Path(store) / "forgetting").glob("*"))


@pytest.mark.parametrize("step", [3, 12])
def test_a_run_that_is_killed_is_continued(store: str, step: int) -> None:
    made = forgettable.make(store)
    assert killed(store, step)
    check_continued(made, store)


@pytest.mark.slow
def test_a_run_that_is_killed_at_every_step_is_continued(tmp_path: Path) -> None:
    step = 0
    while True:
        # MLflow keeps connections to a file that it knows, so that each turn has a folder of its own.
        store = str(tmp_path / f"store-{step}")
        made = forgettable.make(store)
        if not killed(store, step):
            break
        check_continued(made, store)
        shutil.rmtree(store)
        step += 1
    assert step > 30, "so many steps it has at least"
    assert traces(store) == {}
