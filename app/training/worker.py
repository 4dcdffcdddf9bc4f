"""What runs in each Ray Train worker: it builds the model, hands the loop its batches, and passes on its reports."""

import functools
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app import telemetry
from app.cluster import Holder
from app.config import Config
from app.errors import ModelError, RayloopError, StageFailed
from app.settings.training import TrainingConfig
from app.storage import Storage
from app.training import adapters, checkpoint, data
from app.training.base_model import source

if TYPE_CHECKING:
    from app.training.checkpoint import Snapshot

Event = dict[str, Any]
POLL_S = 0.05
STEP_METRICS = {
    "loss": telemetry.TRAINING_LOSS,
    "learning_rate": telemetry.TRAINING_LEARNING_RATE,
    "gradient_norm": telemetry.TRAINING_GRADIENT_NORM,
    "tokens_per_s": telemetry.TRAINING_TOKENS_PER_SECOND,
    "mfu": telemetry.TRAINING_MFU,
    "memory_bytes": telemetry.TRAINING_MEMORY,
    "data_stall_fraction": telemetry.TRAINING_DATA_STALL,
}
"""What of a step's event is a gauge."""


@dataclass(frozen=True)
class WorkerSettings:
    """All that a worker is told."""

    config: Config
    packed: data.Packed
    storage_path: str
    run_name: str
    board: Any
    """Actor that takes events; None: nobody listens."""
    pairs: data.Packed | None = None
    """Preference pairs, which take the place of `packed` as what is learned from."""


def work(given: WorkerSettings) -> RayloopError | None:
    """What each Ray Train worker runs. Returns why the run ends early where starting again would not help."""
    import ray.train

    training = given.config.training
    rank = ray.train.get_context().get_world_rank()
    use_threads(training)
    from app.training import loop

    tokenizer = data.load_tokenizer(given.packed)
    model = start_model(training, tokenizer)
    tell = _Teller(given, rank)
    with tell.newest() as resume:
        tell.start(resume)
        try:
            loop.run(
                model,
                tokenizer,
                training,
                data.read(given.pairs or given.packed, training.seed).take,
                data.read_validation(given.packed),
                loop.Hooks(tell.report, tell.step, tell.bad_loss, tell.newest, preempted),
                resume,
                preferences=data.read_validation(given.pairs) if given.pairs else None,
            )
        except (StageFailed, ModelError) as failure:
            return failure
        finally:
            tell.wait()
    return None


def preempted() -> bool:
    """Whether Ray has been told that the node of one of the workers is about to go."""
    import ray.train

    return ray.train.get_preemption_info() is not None


def work_alone(
    config: Config,
    packed: data.Packed,
    report: "Callable[[dict[str, float], Snapshot | None], None]",
    resume: Path | None = None,
    checkpoints: bool = False,
) -> None:
    """Train in this very process, as a group of one; `report` gets None where no checkpoints are asked for."""
    import torch.distributed as dist
    from torch._C._distributed_c10d import HashStore

    training = config.training
    use_threads(training)
    from app.training import loop

    # DeepSpeed looks for these whether or not the group is there.
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    dist.init_process_group("nccl" if training.use_gpu else "gloo", store=HashStore(), rank=0, world_size=1)
    tokenizer = data.load_tokenizer(packed)
    loop.run(
        start_model(training, tokenizer),
        tokenizer,
        training,
        data.read(packed, training.seed).take,
        data.read_validation(packed),
        loop.Hooks(report=report, step=lambda values: None),
        resume,
        checkpoints,
    )


def start_model(training: TrainingConfig, tokenizer: Any) -> Any:
    """The model that training starts from, in training mode; its adapters are attached if those are trained."""
    import torch

    from app import model as models

    model: Any
    if models.is_preset(training.base_model):
        model = models.new_model(training.base_model, tokenizer, training.block_tokens, training.seed)
    else:
        model = adapters.load_base(training, source(training.base_model))
        embeddings: Any = model.get_input_embeddings()
        if len(tokenizer) > embeddings.num_embeddings:
            torch.manual_seed(training.seed)  # the new ones are drawn by chance
            model.resize_token_embeddings(len(tokenizer))
        if training.method == "lora":
            model = adapters.attach(model, training)
    model.train()
    return model


class Board(Holder):
    """An actor that workers post events to and the driver reads them from."""

    def __init__(self, job: str) -> None:
        super().__init__(job)
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
        self._storage, self._run_name = Storage(settings.storage_path), settings.run_name
        self._board, self._rank = settings.board, rank
        self._run = {"run": settings.run_name}
        self._gauges = {name: telemetry.gauge(metric) for name, metric in STEP_METRICS.items()}
        self._validation_loss = telemetry.gauge(telemetry.VALIDATION_LOSS)
        self._bad_losses = telemetry.counter(telemetry.TRAINING_BAD_LOSSES)
        self._latest_validation_loss: float | None = None
        self._written = threading.Event()
        """Whether no checkpoint is being written."""
        self._written.set()

    @contextmanager
    def newest(self) -> Iterator[Path | None]:
        """The newest whole checkpoint, the same one on every worker."""
        import torch.distributed as dist

        self.wait()
        dist.barrier()  # until every worker's part is there
        found = [self._found() if self._rank == 0 else None]
        dist.broadcast_object_list(found)
        with checkpoint.fetched(found[0]) as folder:
            yield folder

    def _found(self) -> str | None:
        checkpoint.remove_unfinished(self._storage, self._run_name)  # or a full disk would stay full
        return checkpoint.newest_whole(self._storage, self._run_name)

    def start(self, resume: Path | None) -> None:
        import torch.distributed as dist

        from_step = checkpoint.state(resume)["position"]["step"] if resume else 0
        start = {"rank": self._rank, "workers": dist.get_world_size(), "pid": os.getpid(), "from_step": from_step}
        self._post({"kind": "start", **start})

    def step(self, values: dict[str, float]) -> None:
        for name, gauge in self._gauges.items():
            if name in values:
                gauge.set(values[name], tags=self._run)
        if self._latest_validation_loss is not None:  # again, since Ray forgets a gauge that is not set for 20 s
            self._validation_loss.set(self._latest_validation_loss, tags=self._run)
        self._post({"kind": "step", **values})

    def bad_loss(self, event: dict[str, Any]) -> None:
        self._bad_losses.inc(tags={**self._run, "action": event["action"]})
        self._post({"kind": "bad_loss", **event})

    def report(self, metrics: dict[str, float], part: "Snapshot | None") -> None:
        """Hand a part of a checkpoint to a thread of Ray Train's that writes and uploads it; one at a time."""
        import ray.train
        from ray.train.v2.api.report_config import CheckpointUploadMode

        if part is None:
            ray.train.report(metrics)
            return
        self.wait()
        self._written.clear()
        aside = tempfile.mkdtemp(prefix="rayloop-checkpoint-")
        ray.train.report(
            metrics,
            checkpoint=ray.train.Checkpoint.from_directory(aside),
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=functools.partial(self._write, part, metrics),
            delete_local_checkpoint_after_upload=False,  # `_write` does
        )

    def wait(self) -> None:
        """Until the latest checkpoint is written, or is known to have failed."""
        self._written.wait()

    def _write(self, part: "Snapshot", metrics: dict[str, float], local: Any, name: str) -> Any:
        """Write, check and upload; what fails here ends the run's attempt with the reason."""
        import ray.train

        folder = Path(local.path)
        place = (self._run_name, name)
        try:
            part.write(folder)
            self._storage.add(folder, *place)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            self._written.set()
        if self._rank == 0:
            # It counts when the others have written theirs; where one cannot, Ray Train ends all of them.
            while not checkpoint.is_finished(self._storage, *place):
                time.sleep(POLL_S)
            self._latest_validation_loss = metrics["validation_loss"]
            self._post({"kind": "report", **metrics})
        return ray.train.Checkpoint(self._storage.path(*place), self._storage.filesystem)

    def _post(self, event: Event) -> None:
        if self._board is not None:
            self._board.post.remote(event)


def use_threads(training: TrainingConfig) -> None:
    """Let torch use as many threads as the worker has CPUs."""
    import torch

    # Logical CPUs may outnumber cores, and threads that share a core only wait for each other.
    torch.set_num_threads(max(1, min(int(training.cpus_per_worker), os.cpu_count() or 1)))
