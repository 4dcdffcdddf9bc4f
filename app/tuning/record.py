"""A search as the storage, MLflow and the job's log show it."""

import logging
import math
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ray import tune as ray_tune

from app.config import Config
from app.job import job_id
from app.registry import Registry, closing
from app.telemetry import Progress, progress
from app.tuning.schedulers import from_tune
from app.tuning.trials import Kept, Trial
from app.versions import TableVersion

if TYPE_CHECKING:
    from ray.tune.experiment import Trial as TuneTrial

logger = logging.getLogger(__name__)

ERROR = "error"
"""What a trial that cannot go on reports: why."""
METRICS = ("validation_loss", "perplexity", "training_loss", "tokens_per_s", "learning_rate")
NO_ANSWER = "its process died"


class Record(ray_tune.Callback):
    """Hears of every trial: keeps it, and gives it an MLflow run under the search's own.

    MLflow's store is written by a thread of its own, so that the search does not wait for it.
    """

    def __init__(self, config: Config, table: TableVersion, kept: Kept, bar: Progress) -> None:
        self.trials: dict[str, Trial] = {}
        """Those of this attempt, by Ray Tune's id."""
        self._tuning, self._kept, self._bar = config.tuning, kept, bar
        self._registry, self._writer = Registry(config), ThreadPoolExecutor(1, "mlflow")
        self._written: list[Future[Any]] = []
        self._runs: dict[str, str] = {}
        self._first_number = 0
        tags = {"rayloop.run": kept.name, "rayloop.table": table.table, "rayloop.snapshot_id": str(table.snapshot_id)}
        self._parent = self._registry.unfinished_run(kept.name) or self._registry.start_run(
            "tune", {"table": str(table), **config.tuning.model_dump(mode="json")}, {**tags, "rayloop.job": job_id()}
        )

    def __getstate__(self) -> dict[str, Any]:
        # Tune keeps its callbacks with the search; another job's record is of no use to the one that goes on.
        return {}

    @property
    def failed(self) -> int:
        """Trials that have failed."""
        return sum(trial.state == "failed" for trial in self.trials.values())

    def after(self, earlier: dict[str, Trial]) -> None:
        """Go on after trials of earlier attempts: number on from them, and close the runs of those cut short."""
        self._first_number = 1 + max((trial.number for trial in earlier.values()), default=-1)
        for trial_id, trial in earlier.items():
            if trial.state == "running" and (run := self._registry.unfinished_run(f"trial-{trial_id}")):
                self._registry.end_run(run, "KILLED")

    def on_step_begin(self, iteration: int, trials: "list[TuneTrial]", **info: Any) -> None:
        """Tune's own turn, many a second."""
        running = sum(trial.status == "RUNNING" for trial in trials)
        steps = sum(trial.steps for trial in self.trials.values())
        self._bar.update(steps, f"({len(trials)} trials begun, {running} running)")

    def on_trial_start(self, iteration: int, trials: "list[TuneTrial]", trial: "TuneTrial", **info: Any) -> None:
        """A trial begins, or goes on."""
        values, begun = from_tune(self._tuning, trial.config), self.trials.get(trial.trial_id)
        if begun is None:
            begun = Trial(self._first_number + len(self.trials), values)
            self._later(self._start_run, trial.trial_id, values)
        elif (
            values != begun.values and (step := int((trial.last_result or {}).get("step", 0))) < self._tuning.max_steps
        ):
            # After the last step a scheduler may still change a trial, which then does nothing with it.
            changes = (*begun.changes, (step, values))
            begun = replace(begun, values=values, changes=changes)
            print(f"tune: trial {begun.number} goes on from a better one's checkpoint with {values}", flush=True)
        self.trials[trial.trial_id] = begun
        self._kept.write(trial.trial_id, begun)

    def on_trial_result(
        self, iteration: int, trials: "list[TuneTrial]", trial: "TuneTrial", result: dict[str, Any], **info: Any
    ) -> None:
        """A trial has reported."""
        found = self.trials[trial.trial_id]
        if ERROR in result:
            self.trials[trial.trial_id] = replace(found, error=result[ERROR])
            return
        metrics = {name: result[name] for name in ("step", "tokens", *METRICS)}
        point = (int(result["step"]), float(result[self._tuning.objectives[0].name]))
        self.trials[trial.trial_id] = replace(found, metrics=metrics, curve=(*found.curve, point))
        shown = {name: metrics[name] for name in METRICS}
        self._later(lambda: self._registry.log_metrics(self._runs[trial.trial_id], shown, point[0]))

    def on_trial_complete(self, iteration: int, trials: "list[TuneTrial]", trial: "TuneTrial", **info: Any) -> None:
        """A trial has ended, the scheduler has ended it, or it has said why it cannot go on."""
        found = self.trials[trial.trial_id]
        if found.error is None and not self._is_scored(found):
            self.trials[trial.trial_id] = found = replace(found, error="it reported no finite value of the objectives")
        self._end(trial, "ended" if found.error is None else "failed")

    def on_trial_recover(self, iteration: int, trials: "list[TuneTrial]", trial: "TuneTrial", **info: Any) -> None:
        """A trial's process has died, and is started again."""
        logger.warning("the process of trial %d died: it starts again", self.trials[trial.trial_id].number)

    def on_trial_error(self, iteration: int, trials: "list[TuneTrial]", trial: "TuneTrial", **info: Any) -> None:
        """A trial's process has died too often."""
        found = self.trials.get(trial.trial_id) or Trial(self._first_number + len(self.trials), dict(trial.config))
        self.trials[trial.trial_id] = replace(found, error=NO_ANSWER)
        self._end(trial, "failed")

    def close(self, status: str) -> None:
        """The search is over; raises what MLflow's store had to say against it."""
        self._later(lambda: self._registry.end_run(self._parent, status))
        self._writer.shutdown(wait=True)
        for written in self._written:
            written.result()

    def _is_scored(self, trial: Trial) -> bool:
        return bool(trial.metrics) and all(math.isfinite(value) for value in trial.objectives(self._tuning))

    def _end(self, trial: "TuneTrial", state: Any) -> None:
        seconds = round((trial.last_result or {}).get("time_total_s", 0.0), 1)
        found = replace(self.trials[trial.trial_id], state=state, seconds=seconds)
        self.trials[trial.trial_id] = found
        self._kept.write(trial.trial_id, found)
        status = "FINISHED" if state == "ended" else "FAILED"
        self._later(lambda: self._registry.end_run(self._runs[trial.trial_id], status))
        if state == "ended":
            name = self._tuning.objectives[0].name
            said = f"{name} {found.metrics[name]:.3f} after {found.steps} steps"
        else:
            said = f"failed ({found.error})"
        print(f"tune: {said} with {found.values}", flush=True)

    def _start_run(self, trial_id: str, values: dict[str, Any]) -> None:
        tags = {"mlflow.parentRunId": self._parent, "rayloop.run": f"trial-{trial_id}"}
        self._runs[trial_id] = self._registry.start_run("trial", values, tags)

    def _later(self, write: Callable[..., None], *arguments: Any) -> None:
        self._written.append(self._writer.submit(write, *arguments))


@contextmanager
def recorded(config: Config, table: TableVersion, kept: Kept) -> Iterator[Record]:
    """A record whose MLflow run is closed as what became of it."""
    with progress("tune", config.tuning.trials * config.tuning.max_steps, "steps") as bar:
        record = Record(config, table, kept, bar)
        with closing(record.close):
            yield record
