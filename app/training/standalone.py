"""Training without Ray, under any launcher that starts one process a worker and says who is who.

    torchrun --nproc-per-node 2 -m app.training.standalone --config F --name NAME [--set k=v ...]
    deepspeed --num_accelerators 2 --module app.training.standalone --config F --name NAME   # CPU: DS_ACCELERATOR=cpu

The workers read the blocks that an earlier run packed (`packed/<digest>` on storage: those of the table version, or
the ones that `--packed` names), learn from them in the order that they have under Ray Train, and leave the same
checkpoints under `checkpoints/<NAME>`, from the newest of which the same command goes on, as would Ray Train. Nothing
is registered. `--events FILE` keeps worker 0's events; its last line is JSON: the figures of the last report.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from app import tables
from app.config import Config, load
from app.errors import ConfigError, RayloopError, StageFailed
from app.settings.training import TrainingConfig
from app.storage import Storage
from app.training import checkpoint, data
from app.training.base_model import pinned
from app.training.worker import start_model, use_threads

Event = dict[str, Any]


def train(config: Config, name: str, events: IO[str], packed_digest: str | None = None) -> dict[str, float]:
    """Train as one of the workers of the launcher; returns the last report's metrics.

    Raises:
        ConfigError: `training.num_workers` is not the number of processes, or the objective is dpo.
        StageFailed: The blocks are not packed yet.
    """
    import torch
    import torch.distributed as dist

    config, _ = pinned(config)
    training = config.training
    if training.objective == "dpo":
        raise ConfigError("training.objective=dpo needs preference pairs, which jobs.train makes", "run jobs.train")
    workers = int(os.environ["WORLD_SIZE"])
    if not training.min_workers <= workers <= training.max_workers:
        raise ConfigError(
            f"training.num_workers={training.num_workers}, but the launcher started {workers} processes",
            f"--set training.num_workers={workers}",
        )
    use_threads(training)
    packed = find_packed(config, packed_digest)
    from app.training import loop

    if training.use_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if training.use_gpu else "gloo")
    tokenizer = data.load_tokenizer(packed)
    storage = Storage(config.storage.uri)
    _from_first(lambda: _begun(storage, name, training, packed.digest))
    teller = _Teller(storage, name, training.keep_checkpoints, events)
    with teller.newest() as resume:
        teller.start(resume)
        loop.run(
            start_model(training, tokenizer),
            tokenizer,
            training,
            data.read(packed, training.seed).take,
            data.read_validation(packed),
            loop.Hooks(teller.report, teller.step, teller.bad_loss, teller.newest),
            resume,
        )
    dist.destroy_process_group()
    return teller.last


def _begun(storage: Storage, name: str, training: TrainingConfig, packed_digest: str) -> None:
    """Keep what a run learns from and by, and remove what an earlier attempt was cut short in.

    Raises:
        ConfigError: A run of this name has begun with something else.
    """
    place = ("checkpoints", name)
    learns = {"blocks": packed_digest, **training.identity()}
    if storage.exists(*place, "learns.json"):
        begun = json.loads(storage.read(*place, "learns.json"))
        other = sorted(key for key in begun if learns.get(key) != begun[key])
        if other:
            raise ConfigError(
                f"run {name} has begun with {other[0]}={begun[other[0]]!r}, got {learns.get(other[0])!r}",
                "give this run another --name",
            )
    checkpoint.remove_unfinished(storage, "/".join(place))
    storage.write(json.dumps(learns).encode(), *place, "learns.json")


def find_packed(config: Config, packed_digest: str | None = None) -> data.Packed:
    """The blocks of a digest; with none, of the table version that the configuration names.

    Raises:
        StageFailed: They are not packed yet.
    """
    name = packed_digest or data.data_digest(config, tables.version(config))
    packed = data.find(Storage(config.storage.uri), name)
    if packed is None:
        raise StageFailed(
            f"there are no blocks under {Storage(config.storage.uri).uri('packed', name)}",
            "pack them with a run of jobs.train of the same table, tokenizer and training.block_tokens",
        )
    return packed


class _Teller:
    """A worker's reports: its part of each checkpoint to storage, and events to a file."""

    def __init__(self, storage: Storage, name: str, keep: int, events: IO[str]) -> None:
        self._storage, self._name, self._keep, self._events = storage, name, keep, events
        self.last: dict[str, float] = {}

    @contextmanager
    def newest(self) -> Iterator[Path | None]:
        """The newest whole checkpoint, the same one on every worker."""
        uri = _from_first(lambda: checkpoint.newest_whole(self._storage, f"checkpoints/{self._name}"))
        with checkpoint.fetched(uri) as folder:
            yield folder

    def start(self, resume: Path | None) -> None:
        from_step = checkpoint.state(resume)["position"]["step"] if resume else 0
        self._tell({"kind": "start", "rank": int(os.environ["RANK"]), "pid": os.getpid(), "from_step": from_step})

    def step(self, values: dict[str, float]) -> None:
        self._tell({"kind": "step", **values})

    def bad_loss(self, event: dict[str, Any]) -> None:
        self._tell({"kind": "bad_loss", **event})

    def report(self, metrics: dict[str, float], part: checkpoint.Snapshot | None) -> None:
        """Write the checkpoint and drop older ones, but for the best and the newest, as Ray Train does."""
        import torch.distributed as dist

        if part is not None:
            place = ("checkpoints", self._name)
            folder = _from_first(lambda: f"checkpoint_{datetime.now():%Y-%m-%d_%H-%M-%S.%f}")  # Ray Train's names
            with tempfile.TemporaryDirectory() as aside:
                part.write(Path(aside))
                self._storage.add(Path(aside), *place, folder)
            dist.barrier()
            if dist.get_rank() == 0:
                checkpoint.keep_best(self._storage, "/".join(place), self._keep)
        self.last = metrics
        self._tell({"kind": "report", **metrics})

    def _tell(self, event: Event) -> None:
        self._events.write(json.dumps(event) + "\n")
        self._events.flush()


def _from_first(find: Callable[[], Any]) -> Any:
    """What worker 0 finds, on every worker; so are our errors."""
    import torch.distributed as dist

    found: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            found = [find()]
        except RayloopError as error:
            found = [error]
    dist.broadcast_object_list(found)
    if isinstance(found[0], RayloopError):
        raise found[0]
    return found[0]


def main() -> int:
    """Run as a worker; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--name", required=True, help="names the checkpoints")
    parser.add_argument("--packed", metavar="DIGEST", help="blocks to train on; none: those of the table version")
    parser.add_argument("--events", type=Path, help="file for worker 0's events, a line of JSON each")
    parser.add_argument("--local_rank", type=int, help="given by deepspeed; LOCAL_RANK is read instead")
    given = parser.parse_args()
    first = os.environ.get("RANK") == "0"
    try:
        with given.events.open("w") if given.events and first else open(os.devnull, "w") as events:
            figures = train(load(given.config, given.set), given.name, events, given.packed)
    except RayloopError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    if first:
        print(json.dumps({"stage": "train", "status": "done", "figures": figures}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
