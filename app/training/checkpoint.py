"""What a report leaves behind: a folder from which training goes on, with a model in it that can be used.

    state/           weights and optimizer state in fp32, in pieces that fit any number of workers (see pieces.py)
    model/           consolidated safetensors and tokenizer: what app.model.load reads; of an adapted model instead
    adapter/         its adapters and tokenizer, see app/training/adapters.py
    state.json       where training stood
    sha256-<rank>    digest of each file that worker wrote: `<hex>  <path>`, as sha256sum checks them

A snapshot is taken between two steps and written while the next ones run. Its model counts only once it was loaded
again and scored as the one in training; a folder only if every worker's digests are there and right, so one that was
cut short by a kill or spoilt on disk is passed over for the one before.
"""

import contextlib
import hashlib
import json
import logging
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from app import model as models
from app.adapter import FOLDER as ADAPTER
from app.errors import StageFailed, StorageError
from app.storage import Storage, local_folder
from app.training import adapters

if TYPE_CHECKING:
    import numpy as np
    import torch

logger = logging.getLogger(__name__)

FOLDER = re.compile(r"checkpoint_\d")
"""How Ray Train's folders begin; the rest is a time of day where worker 0 was. Its own records begin otherwise."""
SCORED_BLOCKS = 4
"""Held-out blocks that a checkpoint's model is scored on."""
SCORE_TOLERANCE = 0.02
"""How far that score may be from the one of the model in training: bf16 is not the same on every path."""


@dataclass(frozen=True)
class Position:
    """How far a run has come."""

    step: int = 0
    """Optimizer steps done."""
    blocks: int = 0
    """Place in the sequence of blocks, see app.training.data.Sequence."""
    tokens: int = 0
    """Tokens learned from, by all workers, without padding."""
    seconds: float = 0.0
    """Time spent on them."""


@dataclass(frozen=True)
class Score:
    """A few held-out blocks, and the perplexity that the model in training has on them."""

    blocks: "dict[str, np.ndarray]"
    perplexity: float


@dataclass(frozen=True)
class Snapshot:
    """One worker's part of a checkpoint, in memory: steps that are taken meanwhile do not change it."""

    rank: int
    state: dict[str, Any]
    pieces: "dict[str, torch.Tensor]"
    updates: int
    model: Any
    """For its configuration."""
    weights: "dict[str, torch.Tensor] | None"
    """Of the consolidated model, or of its adapters, on worker 0."""
    tokenizer: Any
    score: Score

    def write(self, folder: Path) -> None:
        """Write it into an empty folder; every worker does, and what they write goes into one.

        Raises:
            StageFailed: The written model is not the one in training.
            StorageError: It cannot be written.
        """
        try:
            self._write(folder)
        except (OSError, SafetensorError) as error:
            raise StorageError(f"cannot write a checkpoint to {folder} ({error})", "make room there") from error

    def _write(self, folder: Path) -> None:
        from app.training import pieces

        (folder / "state").mkdir(parents=True)
        pieces.write(self.pieces, self.updates, folder / "state" / f"pieces-{self.rank:05d}.safetensors")
        if self.weights is not None:
            if adapters.is_adapted(self.model):
                adapters.save(self.model, self.tokenizer, folder / ADAPTER, self.weights)
            else:
                models.save(self.model, self.tokenizer, folder / "model", self.weights)
                _check_model(folder / "model", self.score)
            (folder / "state.json").write_text(json.dumps(self.state))
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        lines = [f"{_sha256(file)}  {file.relative_to(folder)}\n" for file in files]
        (folder / f"sha256-{self.rank}").write_text("".join(lines))


def snapshot(
    engine: Any, tokenizer: Any, position: Position, run: dict[str, Any], metrics: dict[str, float], score: Score
) -> Snapshot:
    """What this worker has to write of a checkpoint; all workers call this at once. `run` is what else is to be known
    of the run to go on, as JSON."""
    import torch.distributed as dist

    from app.training import pieces

    held, updates = pieces.collect(engine)
    whole = _whole_weights(engine)
    state = {
        "workers": dist.get_world_size(),
        **run,
        "position": asdict(position),
        "metrics": metrics,
    }
    return Snapshot(dist.get_rank(), state, held, updates, engine.module, whole, tokenizer, score)


def restore(engine: Any, folder: Path) -> Position:
    """Put a checkpoint's weights and optimizer state into the engine; returns where training stood."""
    from app.training import pieces

    found = state(folder)
    files = [folder / "state" / f"pieces-{rank:05d}.safetensors" for rank in range(found["workers"])]
    pieces.put_back(engine, files)
    return Position(**found["position"])


def _whole_weights(engine: Any) -> "dict[str, torch.Tensor] | None":
    """A copy of all weights on worker 0, of an adapted model of its adapters; those that share memory still do."""
    adapted = adapters.is_adapted(engine.module)
    spread = engine.zero_optimization_stage() == 3 or engine.autotp_size() > 1
    weights = engine._consolidated_16bit_state_dict(adapted) if spread else engine.module.state_dict()
    if engine.global_rank != 0:
        return None
    copies: dict[int, torch.Tensor] = {}
    for weight in weights.values():
        if weight.data_ptr() not in copies:
            copies[weight.data_ptr()] = weight.detach().to("cpu", copy=True)
    return {name: copies[weight.data_ptr()] for name, weight in weights.items()}


def _check_model(folder: Path, score: Score) -> None:
    """Load a model as serving does, and compare it with the one in training."""
    from app import evaluation

    model, _ = models.load(folder)
    perplexity = evaluation.perplexity(model, score.blocks, batch_size=1)
    # Negated, so that one that is not a number is refused as well.
    if not abs(perplexity - score.perplexity) <= SCORE_TOLERANCE * score.perplexity:
        raise StageFailed(
            f"the model written at {folder} has perplexity {perplexity:.4g} on held-out blocks, "
            f"the one in training {score.perplexity:.4g}",
            "the disk or the memory is faulty, or the base model does not survive being saved",
        )


def state(folder: Path) -> dict[str, Any]:
    """The position and metrics of a checkpoint, as JSON has them."""
    content: dict[str, Any] = json.loads((folder / "state.json").read_text())
    return content


def whole(storage: Storage, run: str) -> Iterator[str]:
    """The URIs of the whole checkpoints in the folder `run` below a root, the newest first: those of later steps, of
    the same step the one with the later name."""
    for name in _reached(storage, run):
        uri = storage.uri(run, name)
        with local_folder(uri) as folder:
            damage = damaged(folder)
        if damage is None:
            yield uri
        else:
            logger.warning("checkpoint %s is passed over: %s", uri, damage)


def begun(storage: Storage, run: str) -> dict[str, Any] | None:
    """The state of the newest checkpoint that every worker has written, which may be damaged; None if there is none."""
    for name in _reached(storage, run):
        if is_finished(storage, run, name):
            with contextlib.suppress(StorageError, ValueError):
                content: dict[str, Any] = json.loads(storage.read(run, name, "state.json"))
                return content
    return None


def newest_whole(storage: Storage, run: str) -> str | None:
    """The URI of the newest of them, None if there is none."""
    return next(whole(storage, run), None)


def best_whole(storage: Storage, run: str) -> str | None:
    """The URI of the one with the lowest validation loss, the newest of equals; None if there is none."""

    def loss(uri: str) -> float:
        with local_folder(uri) as folder:
            return float(state(folder)["metrics"]["validation_loss"])

    return min(whole(storage, run), key=loss, default=None)


def _reached(storage: Storage, run: str) -> dict[str, tuple[int, float]]:
    """Step and validation loss of each checkpoint by its name, the newest first."""
    found = {name: _read(storage, run, name) for name in storage.list(run) if FOLDER.match(name)}
    return dict(sorted(found.items(), key=lambda entry: (entry[1][0], entry[0]), reverse=True))


def _read(storage: Storage, *folder: str) -> tuple[int, float]:
    """Step and validation loss of a checkpoint, without looking at the rest of it; the worst of both if it is spoilt,
    which `damaged` says."""
    try:
        found = json.loads(storage.read(*folder, "state.json"))
        return int(found["position"]["step"]), float(found["metrics"]["validation_loss"])
    except (StorageError, ValueError, KeyError, TypeError):
        return -1, math.inf


def keep_best(storage: Storage, run: str, keep: int) -> None:
    """Remove checkpoints that are neither the newest nor among so many with the lowest validation loss."""
    reached = _reached(storage, run)
    newest = next(iter(reached), None)
    for name in sorted(reached, key=lambda name: reached[name][1])[keep:]:
        if name != newest:
            storage.remove(run, name)


def remove_unfinished(storage: Storage, run: str) -> None:
    """Remove what was cut short of checkpoints that nobody writes any more."""
    for name in storage.list(run):
        if FOLDER.match(name) and not is_finished(storage, run, name):
            logger.warning("%s was cut short and is removed", storage.uri(run, name))
            storage.remove(run, name)


def is_finished(storage: Storage, *folder: str) -> bool:
    """Whether every worker has written its part to a folder below a root."""
    if not storage.exists(*folder, "state.json"):
        return False
    try:
        workers = json.loads(storage.read(*folder, "state.json"))["workers"]
    except (ValueError, KeyError):
        return True  # spoilt rather than cut short: `damaged` says so
    return all(storage.exists(*folder, f"sha256-{rank}") for rank in range(workers))


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
            lines = [line.partition("  ") for line in (folder / f"sha256-{rank}").read_text().splitlines()]
            listed = {path for _, _, path in lines}
            if not listed >= _written_by(rank) or (rank == 0 and not any(map(_is_of_model, listed))):
                return f"sha256-{rank} has lost lines"
            for expected, _, path in lines:
                if _sha256(folder / path) != expected:
                    return f"{path} has changed since it was written"
    except (OSError, ValueError, KeyError) as error:
        return str(error)
    return None


def _written_by(rank: int) -> set[str]:
    """Files that a worker's part has at least."""
    return {f"state/pieces-{rank:05d}.safetensors"} | ({"state.json"} if rank == 0 else set())


def _is_of_model(path: str) -> bool:
    return path.startswith(("model/", f"{ADAPTER}/")) and path.endswith(".safetensors")


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
