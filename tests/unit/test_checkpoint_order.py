"""Which checkpoint of a run is the newest, which are kept, and what tells one base model from another."""

import json
import shutil
from pathlib import Path

from app.storage import Storage
from app.training import checkpoint, data

FIRST, SECOND, THIRD = (
    "checkpoint_2026-10-25_01-59-00",
    "checkpoint_2026-10-25_01-05-00",
    "checkpoint_2026-10-25_01-30-00",
)
"""The clock was put back after the first."""


def written(root: Path, losses: dict[str, tuple[int, float]]) -> Storage:
    storage = Storage(str(root))
    for name, (step, loss) in losses.items():
        state = {"workers": 1, "position": {"step": step}, "metrics": {"validation_loss": loss}}
        storage.write(json.dumps(state).encode(), "run", name, "state.json")
    return storage


def test_later_steps_are_newer_whatever_the_clock_said(tmp_path: Path) -> None:
    storage = written(tmp_path, {FIRST: (10, 1.0), SECOND: (20, 2.0), THIRD: (20, 3.0)})
    storage.write(b"{", "run", "checkpoint_2026-10-25_02-00-00", "state.json")
    storage.write(b"{}", "run", "checkpoint_manager_snapshot.json")
    names = [*checkpoint._reached(storage, "run")]
    assert names == [THIRD, SECOND, FIRST, "checkpoint_2026-10-25_02-00-00"], "of one that is spoilt nothing is known"


def test_the_best_are_kept_and_the_newest(tmp_path: Path) -> None:
    storage = written(tmp_path, {FIRST: (10, 1.0), SECOND: (20, 2.0), THIRD: (30, 3.0)})
    checkpoint.keep_best(storage, "run", 2)
    assert storage.list("run") == sorted([FIRST, SECOND, THIRD])
    checkpoint.keep_best(storage, "run", 1)
    assert storage.list("run") == sorted([FIRST, THIRD])


def test_a_base_model_is_told_by_what_is_in_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    (folder / "intent").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "intent" / "model.json").write_text("{}")
    before = data._fingerprint(str(folder))
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "model.safetensors").touch()
    assert data._fingerprint(str(tmp_path / "copy")) == before
    (tmp_path / "copy" / "model.safetensors").write_bytes(b"weighty")
    assert data._fingerprint(str(tmp_path / "copy")) != before
