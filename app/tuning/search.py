"""Find better training settings: Ray Tune, a Gaussian process that proposes, ASHA that stops what lags behind.

    ray job submit --working-dir . -- python -m jobs.tune --config jobs/configs/demo.yaml

A trial is a whole training run of `app.training`, only shorter. How each ended is kept under `search/<name>`, so
that a job submitted again after any kind of end knows of them and runs the trials that are left.
"""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray import tune as ray_tune

from app.config import Config
from app.errors import StageFailed
from app.job import job_id
from app.registry import Registry
from app.storage import Storage
from app.telemetry import Progress, progress
from app.training import data
from app.training.launch import check_base_model, check_cluster, run_training
from app.training.worker import work_alone
from app.tuning import space
from app.versions import TableVersion, as_json, code_version, digest

if TYPE_CHECKING:
    from ray.tune.experiment import Trial

logger = logging.getLogger(__name__)

METRIC = "validation_loss"
COORDINATOR_CPUS = 0.01
"""Logical CPUs of a trial that starts several workers and waits for them."""


@dataclass(frozen=True)
class Tuned:
    """What a search gave."""

    overrides: dict[str, Any]
    """The winner's settings, as `config.with_overrides` takes them."""
    figures: dict[str, Any]


def tune(config: Config, table: TableVersion) -> Tuned:
    """Search `tuning.space` for the lowest validation loss after `tuning.max_steps` steps.

    Raises:
        ConfigError: The space names something that is no training setting.
        ModelError: The base model cannot be loaded.
        ClusterError: The cluster cannot hold the trials that run at a time.
        StageFailed: Every trial failed.
    """
    space.check(config)
    check_base_model(config)
    shape = space.trial_config(config, {})
    check_cluster(shape.training, groups=config.tuning.concurrent_trials)
    data.prepare(shape, table)  # trials find it made
    name = search_name(config, table)
    rows = _ended_trials(config, name)
    if rows:
        print(f"tune: {len(rows)} of {config.tuning.trials} trials have ended in an earlier attempt", flush=True)
    with _recorded(config, table, name) as record:
        if len(rows) < config.tuning.trials:
            results = _tuner(config, table, name, record, rows).fit()
            rows = [*rows, *(_row(results[index]) for index in range(len(results)))]
        return _judged(rows)


def search_name(config: Config, table: TableVersion) -> str:
    """Names a search: the same for the same table version, tuning and training sections and code."""
    sections = config.digest("tuning", "training")
    return f"{config.registry.model}-{digest([as_json(table), sections, code_version('training', 'tuning')])[:16]}"


def trial(values: dict[str, Any], config: Config, table: TableVersion, storage_path: str) -> None:
    """One trial: train with the drawn values and let Tune hear each report.

    One worker trains in the trial's own process: Ray Train's controller and helpers are eight processes more,
    which cost 25 CPU-seconds to start and are worth it where there are several workers to hold together.
    """
    chosen = space.trial_config(config, values)
    if chosen.training.num_workers == 1:
        work_alone(chosen, data.prepare(chosen, table)[0], ray_tune.report)
        return
    from ray.tune.integration.ray_train import TuneReportCallback

    run_training(
        chosen,
        table,
        storage_path=storage_path,
        run_name=f"trial-{ray_tune.get_context().get_trial_id()}",
        callbacks=[TuneReportCallback()],
    )


def _tuner(
    config: Config, table: TableVersion, name: str, record: "_Record", earlier: list[dict[str, Any]]
) -> ray_tune.Tuner:
    """A search for the trials that are left, which knows how the earlier ones ended."""
    # Tune's and Optuna's own reports would stand between the lines of the job's log.
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    from optuna import logging as optuna_logging
    from optuna.samplers import GPSampler
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.optuna import OptunaSearch

    optuna_logging.set_verbosity(optuna_logging.WARNING)
    tuning, storage = config.tuning, Storage(config.storage.uri)
    parameters = {"config": config, "table": table, "storage_path": storage.uri("search", name, "runs")}
    return ray_tune.Tuner(
        ray_tune.with_resources(ray_tune.with_parameters(trial, **parameters), _resources(config)),
        tune_config=ray_tune.TuneConfig(
            num_samples=tuning.trials - len(earlier),
            max_concurrent_trials=tuning.concurrent_trials,
            search_alg=OptunaSearch(
                space.distributions(tuning.space),
                metric=METRIC,
                mode="min",
                sampler=GPSampler(seed=tuning.seed + len(earlier), n_startup_trials=tuning.random_trials),
                points_to_evaluate=[row["values"] for row in earlier],
                evaluated_rewards=[row[METRIC] for row in earlier],
            ),
            scheduler=ASHAScheduler(
                time_attr="step",
                metric=METRIC,
                mode="min",
                max_t=tuning.max_steps,
                grace_period=min(tuning.grace_steps, tuning.max_steps),
                reduction_factor=tuning.reduction_factor,
            ),
        ),
        run_config=ray_tune.RunConfig(
            name="ray",
            storage_path=storage.path("search", name),
            storage_filesystem=storage.filesystem,
            callbacks=[record],
            verbose=0,
        ),
    )


def _resources(config: Config) -> dict[str, float]:
    """What a trial's own process reserves."""
    if config.tuning.num_workers > 1:
        return {"CPU": COORDINATOR_CPUS}
    return {"CPU": config.training.cpus_per_worker, "GPU": float(config.training.use_gpu)}


def _ended_trials(config: Config, name: str) -> list[dict[str, Any]]:
    """The trials that ended well in earlier attempts. Tune's own state is not used: a kill can leave it torn."""
    storage = Storage(config.storage.uri)
    files = storage.list("search", name, "trials")
    return [json.loads(storage.read("search", name, "trials", file)) for file in files if file.endswith(".json")]


def _judged(rows: list[dict[str, Any]]) -> Tuned:
    """The winner, and the table of all trials.

    Raises:
        StageFailed: No trial got as far as a report.
    """
    ended = [row for row in rows if row[METRIC] is not None]
    if not ended:
        reasons = sorted({row["error"] for row in rows if row["error"]})
        raise StageFailed(
            f"all {len(rows)} trials failed ({'; '.join(reasons) or 'no reason was given'})",
            "see the trials' logs on the dashboard, and the values in tuning.space",
        )
    best = min(ended, key=lambda row: row[METRIC])
    figures = {
        "trials": len(rows),
        "failed": sum(row["error"] is not None for row in rows),
        "best": {METRIC: best[METRIC], "steps": best["steps"]},
        "overrides": best["values"],
        "table": sorted(rows, key=lambda row: (row[METRIC] is None, row[METRIC])),
    }
    return Tuned(best["values"], figures)


def _row(result: Any) -> dict[str, Any]:
    error = str(result.error).strip().splitlines()[-1] if result.error else None
    return _summary(result.config or {}, result.metrics or {}, error)


def _summary(values: dict[str, Any], result: dict[str, Any], error: str | None) -> dict[str, Any]:
    return {
        "values": dict(values),
        METRIC: result.get(METRIC),
        "steps": result.get("step", 0),
        "seconds": round(result.get("time_total_s", 0.0), 1),
        "error": error,
    }


@contextmanager
def _recorded(config: Config, table: TableVersion, name: str) -> Iterator["_Record"]:
    """A record whose MLflow run is closed as what became of it."""
    with progress("tune", config.tuning.trials * config.tuning.max_steps, "steps") as bar:
        record = _Record(config, table, name, bar)
        status = "KILLED"
        try:
            yield record
            status = "FINISHED"
        except Exception:
            status = "FAILED"
            raise
        finally:
            record.close(status)


class _Record(ray_tune.Callback):
    """The search as MLflow and the job's log show it: one run, with a run for each trial under it."""

    def __init__(self, config: Config, table: TableVersion, name: str, bar: Progress) -> None:
        self._registry, self._bar = Registry(config), bar
        self._storage, self._name = Storage(config.storage.uri), name
        self._steps: dict[str, int] = {}
        self._runs: dict[str, str] = {}
        tags = {"rayloop.run": name, "rayloop.table": table.table, "rayloop.snapshot_id": str(table.snapshot_id)}
        self._parent = self._registry.unfinished_run(name) or self._registry.start_run(
            "tune", {"table": str(table), **config.tuning.model_dump(mode="json")}, {**tags, "rayloop.job": job_id()}
        )

    def __getstate__(self) -> dict[str, Any]:
        # Tune keeps its callbacks with the search; another job's record is of no use to the one that goes on.
        return {}

    def on_step_begin(self, iteration: int, trials: "list[Trial]", **info: Any) -> None:
        """Tune's own turn, many a second."""
        running = sum(trial.status == "RUNNING" for trial in trials)
        self._bar.update(sum(self._steps.values()), f"({len(trials)} trials begun, {running} running)")

    def on_trial_start(self, iteration: int, trials: "list[Trial]", trial: "Trial", **info: Any) -> None:
        """A trial begins."""
        if trial.trial_id not in self._runs:
            tags = {"mlflow.parentRunId": self._parent, "rayloop.run": f"trial-{trial.trial_id}"}
            self._runs[trial.trial_id] = self._registry.start_run("trial", dict(trial.config), tags)

    def on_trial_result(
        self, iteration: int, trials: "list[Trial]", trial: "Trial", result: dict[str, Any], **info: Any
    ) -> None:
        """A trial has reported."""
        if METRIC not in result:
            return
        self._steps[trial.trial_id] = result["step"]
        names = (METRIC, "training_loss", "perplexity", "tokens_per_s")
        self._registry.log_metrics(
            self._runs[trial.trial_id], {name: result[name] for name in names}, int(result["step"])
        )

    def on_trial_complete(self, iteration: int, trials: "list[Trial]", trial: "Trial", **info: Any) -> None:
        """A trial has ended, or ASHA has ended it."""
        row = _summary(trial.config, trial.last_result or {}, None)
        if row[METRIC] is not None:
            self._storage.write(json.dumps(row).encode(), "search", self._name, "trials", f"{trial.trial_id}.json")
        self._end(trial, "FINISHED")

    def on_trial_error(self, iteration: int, trials: "list[Trial]", trial: "Trial", **info: Any) -> None:
        """A trial has failed."""
        logger.warning("trial %s failed", trial.trial_id, extra={"fields": dict(trial.config)})
        self._end(trial, "FAILED")

    def close(self, status: str) -> None:
        """The search is over."""
        self._registry.end_run(self._parent, status)

    def _end(self, trial: "Trial", status: str) -> None:
        if trial.trial_id in self._runs:
            self._registry.end_run(self._runs[trial.trial_id], status)
        loss = (trial.last_result or {}).get(METRIC)
        said = f"{METRIC} {loss:.3f} after {trial.last_result['step']} steps" if loss is not None else "failed"
        print(f"tune: {said} with {dict(trial.config)}", flush=True)
