"""What a report leaves behind: a folder from which training goes on, with a model in it that can be used.

    engine/          DeepSpeed's shards, one set a worker
    model/           consolidated safetensors and tokenizer: what app.model.load reads
    state.json       where training stood
    sha256-<rank>    digest of each file that worker wrote: `<hex>  <path>`, as sha256sum checks them

A folder counts only if every worker's digests are there and right, so one that was cut short by a kill or
spoilt on disk is passed over for the one before.
"""

import contextlib
import hashlib
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from app import model as models
from app.storage import Storage, local_folder

logger = logging.getLogger(__name__)

FOLDER = re.compile(r"checkpoint_\d")
"""How Ray Train's folders begin; the rest is a time, so names sort by age. Its own records begin otherwise."""
TAG = "shards"


@dataclass(frozen=True)
class Position:
    """How far a run has come."""

    step: int = 0
    """Optimizer steps done."""
    epoch: int = 0
    """Epoch it is in."""
    batch: int = 0
    """Micro batches each worker has taken in that epoch."""
    tokens: int = 0
    """Tokens learned from, by all workers, without padding."""
    seconds: float = 0.0
    """Time spent on them."""


def save(engine: Any, tokenizer: Any, folder: Path, position: Position, metrics: dict[str, float]) -> None:
    """Write this worker's part of a checkpoint; every worker calls this, each with a folder of its own."""
    (folder / "engine" / TAG).mkdir(parents=True)
    engine.save_checkpoint(str(folder / "engine"), tag=TAG)
    spread = engine.zero_optimization_stage() == 3
    weights = engine._consolidated_16bit_state_dict() if spread else None
    if engine.global_rank == 0:
        models.save(engine.module, tokenizer, folder / "model", weights)
        models.check_folder(folder / "model")
        state = {"workers": engine.world_size, "position": asdict(position), "metrics": metrics}
        (folder / "state.json").write_text(json.dumps(state))
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    lines = [f"{_sha256(file)}  {file.relative_to(folder)}\n" for file in files]
    (folder / f"sha256-{engine.global_rank}").write_text("".join(lines))


def restore(engine: Any, folder: Path) -> Position:
    """Put a checkpoint's weights and optimizer state into the engine; returns where training stood."""
    engine.load_checkpoint(str(folder / "engine"), tag=TAG)
    return Position(**json.loads((folder / "state.json").read_text())["position"])


def state(folder: Path) -> dict[str, Any]:
    """The position and metrics of a checkpoint, as JSON has them."""
    content: dict[str, Any] = json.loads((folder / "state.json").read_text())
    return content


def newest_whole(storage: Storage, run: str) -> str | None:
    """The URI of the newest whole checkpoint in the folder `run` below a root, None if there is none."""
    for name in reversed(storage.list(run)):
        if not FOLDER.match(name):
            continue
        uri = storage.uri(run, name)
        with local_folder(uri) as folder:
            damage = damaged(folder)
        if damage is None:
            return uri
        logger.warning("checkpoint %s is passed over: %s", uri, damage)
    return None


@contextlib.contextmanager
def fetched(uri: str | None) -> Iterator[Path | None]:
    """A local view of a checkpoint; of none, None."""
    if uri is None:
        yield None
        return
    with local_folder(uri) as folder:
        yield folder


def damaged(folder: Path) -> str | None:
    """What is wrong with a checkpoint, None if it is whole."""
    try:
        workers = state(folder)["workers"]
        for rank in range(workers):
            for line in (folder / f"sha256-{rank}").read_text().splitlines():
                expected, _, path = line.partition("  ")
                if _sha256(folder / path) != expected:
                    return f"{path} has changed since it was written"
    except (OSError, ValueError, KeyError) as error:
        return str(error)
    return None


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
