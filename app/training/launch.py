"""Start Ray Train workers, hear what they say, and turn their failures into sentences."""

import functools
import itertools
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayActorError, RayError

from app import cluster
from app import model as models
from app.config import Config
from app.errors import ClusterError, ModelError, RayloopError, StageFailed, StorageError
from app.job import job_id
from app.settings.training import TrainingConfig
from app.storage import Storage
from app.training import adapters, attention, checkpoint, data, loss, preference_blocks
from app.training.base_model import source
from app.training.worker import Board, Event, WorkerSettings, work
from app.versions import TableVersion

if TYPE_CHECKING:
    from ray.train import Result

logger = logging.getLogger(__name__)

POLL_S = 1.0
STARTS = 3
"""Controllers that may fail to start where `training.max_failures` allows any number of failures."""
SNAPSHOT = "checkpoint_manager_snapshot.json"
"""Where Ray Train 2.60 keeps which checkpoints there are, in a run's folder."""
_RESUBMIT = "a job submitted again goes on from the last checkpoint"


def run_training(
    config: Config,
    table: TableVersion,
    *,
    storage_path: str,
    run_name: str,
    callbacks: Sequence[Any] = (),
    report: Callable[[Event], None] | None = None,
    board: Any = None,
) -> "Result":
    """Train on the cluster, from the newest whole checkpoint under `storage_path`/`run_name` if there is one.

    `report` hears on a thread of this process of every `kind` of event: start {pid, rank, workers, from_step}, step
    {step, loss, tokens_per_s}, bad_loss {step, loss, action}, report {the metrics} and, every second, tick; `callbacks`
    are Ray Train's. `board` is the actor that events are posted to, if there is one.

    Raises:
        ClusterError: The cluster can never hold the workers.
        StageFailed: Workers failed more often than `training.max_failures`, or the loss is bad.
    """
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.config import LoggingConfig
    from ray.train.v2.api.exceptions import TrainingFailedError

    # How often Ray Train looks at its workers: reports and failures are seen as late (2 s by default).
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    training = config.training
    if training.min_workers < training.max_workers:
        # For a while after a node has gone Ray counts on it, and waits so long for room there (60 s by default).
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "10")
    check_cluster(training)
    packed, _ = data.prepare(config, table)
    pairs = preference_blocks.prepare(config, table) if training.objective == "dpo" else None
    storage = Storage(storage_path)
    # RunConfig's types are those of Ray Train v1, which has no logging_config (Ray 2.60).
    settings: dict[str, Any] = {
        "name": run_name,
        "storage_path": storage.root_path,
        "storage_filesystem": storage.filesystem,
        "failure_config": FailureConfig(max_failures=training.max_failures),
        # Ray Train keeps the newest one besides.
        "checkpoint_config": CheckpointConfig(
            num_to_keep=training.keep_checkpoints,
            checkpoint_score_attribute="validation_loss",
            checkpoint_score_order="min",
        ),
        "callbacks": list(callbacks),
        "logging_config": LoggingConfig(log_level="WARNING"),
    }
    # Likewise ScalingConfig's, and Result's below.
    workers: dict[str, Any] = {
        "num_workers": training.num_workers,
        "elastic_resize_monitor_interval_s": training.resize_interval_s,
        "use_gpu": training.use_gpu,
        "resources_per_worker": {"CPU": training.cpus_per_worker, **({"GPU": 1} if training.use_gpu else {})},
    }
    # Two jobs would remove each other's checkpoints.
    unheld = board is None and report is not None
    held = cluster.claimed(storage.uri(run_name), job_id(), Board) if unheld else nullcontext(board)
    with held as board, _listening(board, report):
        # Bound, not given as `train_loop_config`: the controller would unpickle that, and import what workers need.
        told = WorkerSettings(config, packed, storage.root_uri, run_name, board, pairs)
        run: Any = functools.partial(work, told)
        for failures in itertools.count(1):
            _tidy(storage, run_name)
            trainer = TorchTrainer(run, scaling_config=ScalingConfig(**workers), run_config=RunConfig(**settings))
            try:
                result: Any = trainer.fit()
                break
            except TrainingFailedError as error:
                _tidy(storage, run_name)
                raise _explained(error, training) from error
            except RayActorError as error:  # the controller, and with it its workers
                most = training.max_failures
                if most < 0 and error.actor_init_failed:
                    most = STARTS
                if 0 <= most < failures:
                    raise StageFailed(f"training's controller died {failures} times ({error})", _RESUBMIT) from error
                logger.warning("training's controller died: it starts again from the last checkpoint (%s)", error)
    if result.return_value is not None:
        raise result.return_value
    ended: Result = result
    return ended


def _tidy(storage: Storage, run_name: str) -> None:
    """Remove what was cut short of checkpoints that nobody writes any more. Ray Train's own record goes too where it
    names one that is gone, or was cut short itself: with such a one it would never start again."""
    try:
        checkpoint.remove_unfinished(storage, run_name)
        _check_snapshot(storage, run_name)
    except StorageError as error:  # must not hide why training ended; the next attempt does it
        logger.warning("what was cut short of checkpoints stays for now (%s)", error)


def _check_snapshot(storage: Storage, run_name: str) -> None:
    if not storage.exists(run_name, SNAPSHOT):
        return
    try:
        known = json.loads(storage.read(run_name, SNAPSHOT))["checkpoint_results"]
        lost = {entry["checkpoint_dir_name"] for entry in known} - set(storage.list(run_name))
        why = f"{', '.join(sorted(lost))}, which it names, is gone" if lost else ""
    except (ValueError, KeyError, TypeError) as error:
        why = f"it is damaged ({error})"
    if why:
        logger.warning("%s is set aside: %s", storage.uri(run_name, SNAPSHOT), why)
        storage.remove_file(run_name, SNAPSHOT)


def check_base_model(config: Config) -> None:
    """Refuse a base model that cannot be loaded, before any worker starts.

    Raises:
        ModelError: Saying what is wrong with it.
    """
    base_model = config.training.base_model
    if models.is_preset(base_model):
        models.preset(base_model)
    else:
        place = source(base_model)
        model = adapters.load_base(config.training, place)
        loss.check(model)
        attention.check(model, config.training)
        tokenizer = models.load_tokenizer(place)
        if config.training.method == "lora":
            adapters.check(config.training, model, tokenizer)
        elif config.training.objective == "dpo" and tokenizer.chat_template is None:
            raise ModelError(
                f"{base_model} has no chat template, so replies cannot be compared as it would write them",
                "train it on conversations first (training.objective=sft), or use one with a template",
            )


def check_cluster(training: TrainingConfig, groups: int = 1) -> None:
    """Refuse to wait for workers that no node will ever have room for; `groups` runs train at a time.

    Raises:
        ClusterError: Saying what is needed and what there is.
    """
    needed, room = _needed(training), room_for_workers(training)
    workers = training.min_workers * groups
    if room < workers:
        there = ray.cluster_resources()
        raise ClusterError(
            f"{workers} workers of {_listed(needed)} each do not fit: the cluster has "
            f"{_listed({kind: there.get(kind, 0.0) for kind in needed})}, room for {room}",
            "lower training.num_workers or training.cpus_per_worker, or add nodes",
        )


def room_for_workers(training: TrainingConfig) -> int:
    """How many workers the cluster's nodes can hold, with nothing else on them."""
    needed = _needed(training)
    return sum(
        int(min(node["Resources"].get(kind, 0.0) // amount for kind, amount in needed.items()))
        for node in ray.nodes()
        if node["Alive"]
    )


def _needed(training: TrainingConfig) -> dict[str, float]:
    """What a worker reserves."""
    return {"CPU": training.cpus_per_worker, **({"GPU": 1.0} if training.use_gpu else {})}


@contextmanager
def _listening(board: Any, report: Callable[[Event], None] | None) -> Iterator[None]:
    """While a board's events reach `report` on a thread of this process, the last ones before the way out."""
    if report is None:
        yield
        return
    stop = threading.Event()
    failures: list[Exception] = []

    def tell(event: Event) -> None:
        try:
            report(event)
        except Exception as error:  # one that is not told must not cost those that come after it
            logger.warning("an event of kind %s was not recorded (%s)", event["kind"], error)
            failures.append(error)

    def listen() -> None:
        last = False
        while not last:
            last = stop.wait(POLL_S)
            try:
                events = ray.get(board.drain.remote())
            except RayError as error:
                failures.append(error)
                return
            for event in [*events, {"kind": "tick"}]:
                tell(event)

    thread = threading.Thread(target=listen, name="training-events", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=30)
    if failures:
        logger.error("%d events of the training were not recorded, the first since %s", len(failures), failures[0])


def _explained(error: Any, training: TrainingConfig) -> RayloopError:
    failures = getattr(error, "worker_failures", None) or {0: getattr(error, "controller_failure", error)}
    rank, cause = next(iter(failures.items()))
    cause = getattr(cause, "_base_exc", cause)
    if isinstance(cause, RayloopError):
        return cause
    return StageFailed(
        f"training ended with a failure of worker {rank} after {training.max_failures} restarts "
        f"({type(cause).__name__}: {str(cause).strip().splitlines()[-1] if str(cause).strip() else ''})",
        f"see the worker's log on the dashboard's Train page; {_RESUBMIT}",
    )


def _listed(resources: dict[str, float]) -> str:
    return " and ".join(f"{amount:g} {kind}" for kind, amount in resources.items())
