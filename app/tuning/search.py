"""Find better training settings: Ray Tune runs trials, a study proposes them, a scheduler stops what lags behind.

    ray job submit --working-dir . -- python -m jobs.tune --config jobs/configs/demo.yaml

A trial is a whole training run of `app.training`, only shorter. How each ended is kept under `search/<name>`, so
that a job submitted again after any kind of end knows of them and runs the trials that are left.
"""

import logging
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray import tune as ray_tune
from ray.tune.search import BasicVariantGenerator, Searcher

from app import cluster
from app.config import Config
from app.errors import StageFailed
from app.job import job_id
from app.training import data
from app.training.base_model import pinned
from app.training.launch import check_base_model, check_cluster, room_for_workers, run_training
from app.training.worker import work_alone
from app.tuning import result, schedulers, space
from app.tuning.record import ERROR, NO_ANSWER, Record, recorded
from app.tuning.space import Values
from app.tuning.study import Study, check_installed
from app.tuning.trials import FOLDER, Kept, Trial
from app.versions import TableVersion

if TYPE_CHECKING:
    from app.training.checkpoint import Snapshot

logger = logging.getLogger(__name__)

COORDINATOR_CPUS = 0.01
"""Logical CPUs of a trial that starts several workers and waits for them."""
RUNS = "runs"
"""Checkpoints of trials of several workers, below the search's folder."""
RAY = "ray"
"""What Ray Tune keeps while it works, there too."""
CHECKPOINTS = 3
"""Kept of each trial that others may go on from: it may be read while the next two are written."""


@dataclass(frozen=True)
class Tuned:
    """What a search gave."""

    overrides: dict[str, Any]
    """The winner's settings, as `config.with_overrides` takes them."""
    figures: dict[str, Any]


def tune(config: Config, table: TableVersion) -> Tuned:
    """Search `tuning.space` for the best `tuning.objectives` after `tuning.max_steps` steps.

    Raises:
        ConfigError: The space names something that is no training setting, or the searcher is not installed.
        ModelError: The base model cannot be loaded.
        RegistryError: The base model is a version that is not registered.
        ClusterError: The cluster cannot hold the trials that run at a time, or another job makes the same search.
        StageFailed: More trials failed than `tuning.max_failed_fraction` allows.
    """
    space.check(config)
    config, _ = pinned(config)
    check_installed(config.tuning)
    check_base_model(config)
    check_cluster(space.trial_config(config, {}).training, groups=config.tuning.concurrent_trials or 1)
    kept = Kept(config, table)
    with cluster.claimed(kept.storage.uri(FOLDER, kept.name), job_id()):
        return _search(config, table, kept)


def _search(config: Config, table: TableVersion, kept: Kept) -> Tuned:
    first = kept.named(config.tuning.random_trials)
    for values in space.data_settings(config):  # trials find them made: they hold the CPUs that making them takes
        data.prepare(space.trial_config(config, values), table)
    kept.open()
    before = kept.read()
    ended = [trial for trial in before.values() if trial.state == "ended"]
    failed = _failed_before(config, before.values())
    others = [] if schedulers.changes_trials(config.tuning) else kept.earlier()
    if ended:
        print(f"tune: {len(ended)} of {config.tuning.trials} trials have ended in an earlier attempt", flush=True)
    if others:
        print(f"tune: {len(others)} trials of earlier searches are known", flush=True)
    with recorded(config, table, kept) as record:
        record.after(before)
        left = config.tuning.trials - len(ended) - len(failed)
        if left > 0:
            cut_short = [trial.values for trial in before.values() if trial.state == "running"]
            study = Study(config.tuning, [*cut_short, *first])
            for trial in (*ended, *others):
                study.know(trial.values, trial.objectives(config.tuning))
            for trial in failed:
                study.know(trial.values, None)
            _tuner(config, table, kept, study, record, left).fit()
        for folder in (RUNS, RAY):  # whose checkpoints nobody reads any more
            kept.storage.remove(FOLDER, kept.name, folder)
        made = [*ended, *failed, *record.trials.values()]
        _check_failures(config, made, others)
        figures = result.judge(config, made, others)
        result.write(config, kept.name, figures, [*others, *sorted(made, key=lambda trial: trial.number)])
        return Tuned(figures["overrides"], figures)


def train_trial(seen: Values, config: Config, table: TableVersion, storage_path: str) -> None:
    """One trial: train with the proposed values and let Tune hear each report.

    What goes wrong within a trial is its answer, and the search goes on; a process that dies gives none.

    One worker trains in the trial's own process: Ray Train's controller and helpers are eight processes more,
    which cost 25 CPU-seconds to start and are worth it where there are several workers to hold together.
    """
    try:
        _train(space.trial_config(config, schedulers.from_tune(config.tuning, seen)), table, storage_path)
    except Exception as error:
        logger.exception("the trial failed")
        ray_tune.report({ERROR: f"{type(error).__name__}: {' '.join(str(error).split())}"})


def _train(config: Config, table: TableVersion, storage_path: str) -> None:
    if config.training.num_workers == 1:
        packed = data.prepare(config, table)[0]
        with _resumed() as resume:
            work_alone(config, packed, _report, resume, checkpoints=schedulers.changes_trials(config.tuning))
        return
    from ray.tune.integration.ray_train import TuneReportCallback

    run_training(
        config,
        table,
        storage_path=storage_path,
        run_name=f"trial-{ray_tune.get_context().get_trial_id()}",
        callbacks=[TuneReportCallback()],
    )


def _report(metrics: dict[str, float], part: "Snapshot | None") -> None:
    if part is None:
        ray_tune.report(metrics)
        return
    with tempfile.TemporaryDirectory() as folder:
        part.write(Path(folder))
        ray_tune.report(metrics, checkpoint=ray_tune.Checkpoint.from_directory(folder))


@contextmanager
def _resumed() -> Iterator[Path | None]:
    """The checkpoint that this trial is to go on from."""
    checkpoint = ray_tune.get_checkpoint()
    if checkpoint is None:
        yield None
        return
    with checkpoint.as_directory() as folder:
        yield Path(folder)


def _tuner(
    config: Config, table: TableVersion, kept: Kept, study: Study, record: Record, trials: int
) -> ray_tune.Tuner:
    """A search for so many trials more."""
    # Tune's own reports would stand between the lines of the job's log.
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    # A trial that cannot go on reports why, and no metric.
    os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"
    tuning, storage = config.tuning, kept.storage
    parameters = {"config": config, "table": table, "storage_path": storage.uri(FOLDER, kept.name, RUNS)}
    keep = CHECKPOINTS if schedulers.changes_trials(tuning) else None
    return ray_tune.Tuner(
        ray_tune.with_resources(ray_tune.with_parameters(train_trial, **parameters), _resources(config)),
        param_space=schedulers.ranges(tuning) if schedulers.changes_trials(tuning) else None,
        tune_config=ray_tune.TuneConfig(
            num_samples=trials,
            max_concurrent_trials=None if schedulers.changes_trials(tuning) else _at_a_time(config),
            search_alg=_population(config, study, trials)
            if schedulers.changes_trials(tuning)
            else Proposer(config, study),
            scheduler=schedulers.scheduler(tuning),
        ),
        run_config=ray_tune.RunConfig(
            name=RAY,
            storage_path=storage.path(FOLDER, kept.name),
            storage_filesystem=storage.filesystem,
            callbacks=[record],
            stop=TooManyFailures(config, record),
            failure_config=ray_tune.FailureConfig(max_failures=config.training.max_failures),
            checkpoint_config=ray_tune.CheckpointConfig(num_to_keep=keep),
            verbose=0,
        ),
    )


class Proposer(Searcher):
    """A study as Ray Tune asks it."""

    def __init__(self, config: Config, study: Study) -> None:
        super().__init__(config.tuning.objectives[0].name, config.tuning.objectives[0].mode)
        self._study, self._tuning = study, config.tuning
        self._asked: dict[str, Values] = {}

    def suggest(self, trial_id: str) -> Any:
        """The next point; the end where there is none left."""
        values = self._study.ask()
        if values is None:
            return str(Searcher.FINISHED)
        self._asked[trial_id] = values
        return dict(values)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """What came of it."""
        names = [objective.name for objective in self._tuning.objectives]
        answered = result is not None and ERROR not in result and all(name in result for name in names)
        self._study.tell(
            self._asked.pop(trial_id), [float((result or {})[name]) for name in names] if answered else None
        )

    def save(self, checkpoint_path: str) -> None:
        """Nothing: what is kept of the trials is all that a search goes on from."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing."""


class TooManyFailures(ray_tune.Stopper):
    """Ends a search in which more trials failed than may."""

    def __init__(self, config: Config, record: Record) -> None:
        self._most, self._record = _most_failures(config), record

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Whether this trial is to end."""
        return False

    def stop_all(self) -> bool:
        """Whether the search is to end."""
        return self._record.failed > self._most


def _population(config: Config, study: Study, trials: int) -> BasicVariantGenerator:
    """The members that pbt and pb2 start from."""
    members = [values for _ in range(trials) if (values := study.ask()) is not None]
    return BasicVariantGenerator(
        points_to_evaluate=[schedulers.to_tune(config.tuning, values) for values in members],
        max_concurrent=config.tuning.concurrent_trials or 0,
    )


def _resources(config: Config) -> dict[str, float]:
    """What a trial's own process reserves."""
    if config.tuning.num_workers > 1:
        return {"CPU": COORDINATOR_CPUS}
    return {"CPU": config.training.cpus_per_worker, "GPU": float(config.training.use_gpu)}


def _at_a_time(config: Config) -> int | None:
    """Trials at a time; None: Ray Tune sees for itself what there is room for."""
    tuning = config.tuning
    if tuning.concurrent_trials is not None or tuning.num_workers == 1:
        return tuning.concurrent_trials
    # A trial's own process reserves next to nothing: its workers do, and only once it has begun.
    return max(1, room_for_workers(space.trial_config(config, {}).training) // tuning.num_workers)


def _failed_before(config: Config, trials: Iterable[Trial]) -> list[Trial]:
    """Trials of an earlier attempt that said why they failed, so that they are not tried again.

    None where that attempt ended since too many had: whoever submits it again has mended something.
    """
    failed = [trial for trial in trials if trial.state == "failed" and trial.error != NO_ANSWER]
    return failed if len(failed) <= _most_failures(config) else []


def _most_failures(config: Config) -> int:
    return int(config.tuning.max_failed_fraction * config.tuning.trials)


def _check_failures(config: Config, trials: Sequence[Trial], known: Sequence[Trial]) -> None:
    """Refuse to name a winner where too much went wrong.

    Raises:
        StageFailed: With the trials' reasons.
    """
    failed = [trial for trial in trials if trial.state == "failed"]
    ended = [trial for trial in (*trials, *known) if trial.state == "ended"]
    if ended and len(failed) <= _most_failures(config):
        return
    reasons = "; ".join(sorted({trial.error or "no reason was given" for trial in failed}))
    raise StageFailed(
        f"{len(failed)} of {len(trials)} trials failed ({reasons or 'the others were cut short'})",
        "see the trials' logs on the dashboard, and the values in tuning.space; "
        f"tuning.max_failed_fraction ({config.tuning.max_failed_fraction:g}) allows {_most_failures(config)}",
    )
