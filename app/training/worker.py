"""What runs in each Ray Train worker: it builds the model, hands the loop its batches, and passes on its reports."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app import telemetry
from app.config import Config, TrainingConfig
from app.storage import Storage
from app.training import checkpoint, data

Event = dict[str, Any]


@dataclass(frozen=True)
class WorkerSettings:
    """All that a worker is told."""

    config: Config
    packed: data.Packed
    storage_path: str
    run_name: str
    board: Any
    """Actor that takes events; None: nobody listens."""


def work(given: WorkerSettings) -> None:
    """What each Ray Train worker runs."""
    import ray.train
    import torch.distributed as dist

    training = given.config.training
    context = ray.train.get_context()
    rank = context.get_world_rank()
    _use_threads(training)
    from app.training import loop

    tokenizer = data.load_tokenizer(given.packed)
    model = start_model(training, tokenizer)
    found = [checkpoint.newest_whole(Storage(given.storage_path), given.run_name) if rank == 0 else None]
    dist.broadcast_object_list(found)
    shard = ray.train.get_dataset_shard("train")
    tell = _Teller(given, rank)
    with checkpoint.fetched(found[0]) as resume:
        tell.start(resume)
        loop.run(
            model,
            tokenizer,
            training,
            lambda epoch: data.shuffled(shard, training.micro_batch_size, training.seed + epoch),
            data.read_validation(given.packed),
            loop.Hooks(report=tell.report, step=tell.step),
            resume,
        )


def work_alone(config: Config, packed: data.Packed, report: Callable[[dict[str, float]], None]) -> None:
    """Train in this very process, as a group of one, and keep no checkpoints."""
    import torch.distributed as dist
    from torch._C._distributed_c10d import HashStore

    training = config.training
    _use_threads(training)
    from app.training import loop

    # DeepSpeed looks for these whether or not the group is there.
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    dist.init_process_group("nccl" if training.use_gpu else "gloo", store=HashStore(), rank=0, world_size=1)
    tokenizer = data.load_tokenizer(packed)
    dataset = data.read(packed).iterator()
    loop.run(
        start_model(training, tokenizer),
        tokenizer,
        training,
        lambda epoch: data.shuffled(dataset, training.micro_batch_size, training.seed + epoch),
        data.read_validation(packed),
        loop.Hooks(report=lambda metrics, folder: report(metrics), step=lambda values: None),
        checkpoints=False,
    )


def start_model(training: TrainingConfig, tokenizer: Any) -> Any:
    """The model that training starts from, in training mode."""
    from app import model as models

    if models.is_preset(training.base_model):
        model = models.new_model(training.base_model, tokenizer, training.block_tokens, training.seed)
    else:
        model, _ = models.load(data.source(training.base_model))
        embeddings: Any = model.get_input_embeddings()
        if len(tokenizer) > embeddings.num_embeddings:
            model.resize_token_embeddings(len(tokenizer))
    model.train()
    return model


class Board:
    """An actor that workers post events to and the driver reads them from."""

    def __init__(self) -> None:
        self._events: list[Event] = []

    def post(self, event: Event) -> None:
        """Add an event."""
        self._events.append(event)

    def drain(self) -> list[Event]:
        """Everything posted since the last call."""
        events, self._events = self._events, []
        return events


class _Teller:
    """A worker's reports: to Ray Train, to the board, to the metrics."""

    def __init__(self, settings: WorkerSettings, rank: int) -> None:
        self._board, self._rank = settings.board, rank
        self._run = {"run": settings.run_name}
        self._loss = telemetry.gauge(telemetry.TRAINING_LOSS)
        self._validation_loss = telemetry.gauge(telemetry.VALIDATION_LOSS)
        self._tokens_per_s = telemetry.gauge(telemetry.TRAINING_TOKENS_PER_SECOND)
        self._latest_validation_loss: float | None = None

    def start(self, resume: Path | None) -> None:
        from_step = checkpoint.state(resume)["position"]["step"] if resume else 0
        self._post({"kind": "start", "rank": self._rank, "pid": os.getpid(), "from_step": from_step})

    def step(self, values: dict[str, float]) -> None:
        self._loss.set(values["loss"], tags=self._run)
        self._tokens_per_s.set(values["tokens_per_s"], tags=self._run)
        if self._latest_validation_loss is not None:  # again, since Ray forgets a gauge that is not set for 20 s
            self._validation_loss.set(self._latest_validation_loss, tags=self._run)
        self._post({"kind": "step", **values})

    def report(self, metrics: dict[str, float], folder: Path | None) -> None:
        import ray.train

        assert folder is not None

        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(str(folder)))
        if self._rank == 0:
            self._latest_validation_loss = metrics["validation_loss"]
            self._post({"kind": "report", **metrics})

    def _post(self, event: Event) -> None:
        if self._board is not None:
            self._board.post.remote(event)


def _use_threads(training: TrainingConfig) -> None:
    import torch

    # Logical CPUs may outnumber cores, and threads that share a core only wait for each other.
    torch.set_num_threads(max(1, min(int(training.cpus_per_worker), os.cpu_count() or 1)))
