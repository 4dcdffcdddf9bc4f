"""What a trial costs in our search beside a bare `ray.tune.Tuner`: trials that report once and do nothing."""

import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from app.config import Config

TRIALS, REPETITIONS, CONCURRENT = 40, 3, 2
REPORT = {
    "step": 4, "tokens": 100, "validation_loss": 1.0, "perplexity": 2.7, "training_loss": 1.0, "tokens_per_s": 1.0,
    "learning_rate": 1e-3,
}  # fmt: skip
Figures = dict[str, float]


def nothing(values: dict[str, Any], **given: Any) -> None:
    """A trial."""
    from ray import tune as ray_tune

    ray_tune.report(REPORT)


def bare(folder: str) -> None:
    """Ray Tune by itself, with its random search and its ASHA."""
    from ray import tune as ray_tune
    from ray.tune.schedulers import ASHAScheduler

    ray_tune.Tuner(
        ray_tune.with_resources(nothing, {"CPU": 1}),
        param_space={"x": ray_tune.loguniform(1e-4, 1e-2)},
        tune_config=ray_tune.TuneConfig(
            num_samples=TRIALS,
            max_concurrent_trials=CONCURRENT,
            metric="validation_loss",
            mode="min",
            scheduler=ASHAScheduler(time_attr="step", max_t=64, grace_period=4),
        ),
        run_config=ray_tune.RunConfig(storage_path=folder, verbose=0),
    ).fit()


def ours(folder: str) -> float:
    """Our search, by chance as well; returns the seconds within it that Ray Tune's loop waited for us."""
    from app.tuning import search
    from app.tuning.record import Record, recorded
    from app.tuning.study import Study
    from app.tuning.trials import Kept
    from app.versions import TableVersion

    config = Config().with_overrides(
        {
            "storage.uri": folder, "tuning.searcher": "random", "tuning.trials": TRIALS, "tuning.max_steps": 64,
            "tuning.concurrent_trials": CONCURRENT, "tuning.grace_steps": 4,
        }
    )  # fmt: skip
    table = TableVersion("made.up", 1)
    kept, waited = Kept(config, table), defaultdict[str, float](float)
    kept.open()
    hooks = [(Record, name) for name in vars(Record) if name.startswith("on_")]
    hooks += [(search.Proposer, name) for name in ("suggest", "on_trial_complete")]
    hooks += [(search.TooManyFailures, name) for name in ("__call__", "stop_all")]
    before = {(owner, name): getattr(owner, name) for owner, name in hooks}
    trial = search.train_trial
    search.train_trial = nothing
    try:
        for (owner, name), method in before.items():
            setattr(owner, name, _timed(method, waited, name))
        with recorded(config, table, kept) as record:
            record.after({})
            search._tuner(config, table, kept, Study(config.tuning), record, TRIALS).fit()
        assert sum(entry.state == "ended" for entry in kept.read().values()) == TRIALS
    finally:
        search.train_trial = trial
        for (owner, name), method in before.items():
            setattr(owner, name, method)
    return sum(waited.values())


def _timed(method: Callable[..., Any], waited: dict[str, float], name: str) -> Callable[..., Any]:
    def call(*given: Any, **named: Any) -> Any:
        started_s = time.perf_counter()
        try:
            return method(*given, **named)
        finally:
            waited[name] += time.perf_counter() - started_s

    return call


def table() -> list[str]:
    """Both in turns, on a local Ray of its own."""
    import ray

    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    found: dict[str, list[Figures]] = {"bare Ray Tune": [], "ours": []}
    for _ in range(REPETITIONS):
        for name, of in found.items():
            with tempfile.TemporaryDirectory() as folder:
                started_s, started_cpu_s = time.monotonic(), time.process_time()
                waited = ours(folder) if name == "ours" else bare(str(Path(folder)))
                of.append(
                    {
                        "wall": (time.monotonic() - started_s) / TRIALS * 1e3,
                        "cpu": (time.process_time() - started_cpu_s) / TRIALS * 1e3,
                        "hooks": (waited or 0.0) / TRIALS * 1e3,
                    }
                )
                print(name, of[-1], flush=True)
    ray.shutdown()
    lines = [
        "## What a trial costs",
        "",
        f"{TRIALS} trials that report once, {CONCURRENT} at a time, a process each; milliseconds a trial, median of "
        f"{REPETITIONS} searches in turns (range). *Waited*: how long Ray Tune's loop waited for what we add to it: "
        "the proposal, the record of trials on storage, the hand-over to MLflow's thread. Target: at most 10 ms.",
        "",
        "| search | wall clock | CPU of the search's own process | waited |",
        "|---|---|---|---|",
    ]
    for name, of in found.items():
        cells = [_spread([figures[key] for figures in of]) for key in ("wall", "cpu", "hooks")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f}-{max(values):.1f})"
