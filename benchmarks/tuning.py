"""Search: trials until random's best of 200, the time of a proposal, what ASHA saves, what a trial costs in Ray Tune.

    python -m benchmarks.tuning
    python -m benchmarks.tuning --part overhead

functions   Branin, Hartmann6, a mixed Ackley, and a table of small-model runs, beside Optuna by itself
asha        the same table, trial by trial and report by report, with Ray's ASHA and with whole trials only
overhead    trials that do nothing: ours beside a bare `ray.tune.Tuner`

All but the last are searched in plain processes, two at a time, each with one thread; there is no Ray in them. Writes
benchmarks/results/<date>_<hardware>_tuning.md.
"""

import argparse
import functools
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from app.settings.tuning import TuningConfig
from app.tuning import space as spaces
from benchmarks import measured, small_models, tuning_overhead
from benchmarks.tuning_problems import Problem, Values, problems

SEEDS, TRIALS, START = 30, 200, 5
FEWEST = 50
WHOLE_TRIALS, CONCURRENT, REDUCTION = 64, 2, 4
TIMED = (25, 50, 100, 200)
"""Trials at which the time of a proposal is shown."""
ABOUT_MODELS = (
    "*Small models* looks up real runs of preset:tiny on the embedded shop, 64 steps each, one for each combination "
    "of optimizer, learning rates, warm-up and the schedule's end (benchmarks/small_models.py)."
)
Ask = Callable[[], Values | None]
Tell = Callable[[Values, float], None]

SEARCHERS = (
    "random", "gp", "Optuna GP", f"Optuna GP, {START}", "tpe", "Optuna TPE", f"Optuna TPE, {START}",
    "cma_es", "Optuna CMA-ES", f"Optuna CMA-ES, {START}",
)  # fmt: skip
"""Ours, each with Optuna's own of the same kind beside it, at its defaults; also with as many random trials first."""
MODELS = "small models"


def search(
    problem: str, searcher: str, seed: int, trials: int, target: float | None
) -> tuple[list[float], list[float]]:
    """The values found, to the first that reaches the target if that is not among the first, and the seconds each
    proposal took."""
    import optuna
    import torch

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    about = every_problem()[problem]
    found, seconds = [], []
    ask, tell = (bare if searcher.startswith("Optuna") else ours)(about, searcher, seed)
    for _ in range(trials):
        started_s = time.perf_counter()
        values = ask()
        if values is None:
            break  # every point of a finite space was tried
        seconds.append(time.perf_counter() - started_s)
        found.append(about.value(values))
        tell(values, found[-1])
        if target is not None and len(found) >= FEWEST and min(found) <= target:
            break
    return found, seconds


def every_problem() -> dict[str, Problem]:
    """The functions, and the table of real runs."""
    return {**problems(), MODELS: Problem(MODELS, lambda values: curve_of(values)[-1], small_models.SPACE)}


def curve_of(values: Values) -> small_models.Curve:
    """What a small model reaches on its way."""
    return curves()[spaces.point(values)]


curves = functools.cache(small_models.curves)


def ours(problem: Problem, searcher: str, seed: int) -> tuple[Ask, Tell]:
    """Our study."""
    from app.tuning.study import Study

    settings: dict[str, Any] = {"searcher": searcher, "space": problem.space, "seed": seed, "random_trials": START}
    study = Study(TuningConfig(scheduler="none", concurrent_trials=1, **settings))
    return study.ask, lambda values, value: study.tell(values, [value])


def bare(problem: Problem, searcher: str, seed: int) -> tuple[Ask, Tell]:
    """Optuna by itself, as its documentation writes spaces with conditions: define-by-run."""
    import optuna

    samplers: dict[str, Callable[..., Any]] = {
        "Optuna GP": optuna.samplers.GPSampler, "Optuna TPE": optuna.samplers.TPESampler,
        "Optuna CMA-ES": optuna.samplers.CmaEsSampler,
        f"Optuna GP, {START}": functools.partial(optuna.samplers.GPSampler, n_startup_trials=START),
        f"Optuna TPE, {START}": functools.partial(optuna.samplers.TPESampler, n_startup_trials=START),
        f"Optuna CMA-ES, {START}": functools.partial(optuna.samplers.CmaEsSampler, n_startup_trials=START),
    }  # fmt: skip
    study = optuna.create_study(sampler=samplers[searcher](seed=seed))
    distributions = spaces.distributions(problem.space)
    asked: list[Any] = []

    def ask() -> Values:
        trial, values = study.ask(), Values()
        for key, distribution in distributions.items():
            if spaces.is_active(problem.space, key, values):
                values[key] = trial._suggest(key, distribution)
        asked.append(trial)
        return values

    def tell(values: Values, value: float) -> None:
        study.tell(asked.pop(), value)

    return ask, tell


def best_of_random(problem: Problem) -> list[float]:
    """Random's best of 200, once a seed."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    found = []
    for seed in range(SEEDS):
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1_000 + seed))
        distributions = spaces.distributions(problem.space)
        drawn = (study.ask(distributions).params for _ in range(TRIALS))
        found.append(min(problem.value(spaces.active(problem.space, values)) for values in drawn))
    return found


def functions(pool: ProcessPoolExecutor, chosen: list[str]) -> list[str]:
    """The table of trials until random's best, and of the time of a proposal."""
    lines = [
        "## Trials until random's best of 200",
        "",
        f"Median over {SEEDS} seeds (quartiles) of the trials until a value as low as the median of random's best of "
        f"{TRIALS}; {TRIALS} where it was not reached. *After {FEWEST}*: the median of the best value then.",
        "",
        "| problem (target) | searcher | trials | reached | best after 50 | trials, of random's |",
        "|---|---|---|---|---|---|",
    ]
    for name in chosen:
        problem = every_problem()[name]
        target = statistics.median(best_of_random(problem))
        base = None
        for searcher in SEARCHERS:
            if "cma" in searcher.lower() and not problem.is_continuous:
                continue  # it knows no choices
            runs = [pool.submit(search, name, searcher, seed, TRIALS, target) for seed in range(SEEDS)]
            ended = [run.result()[0] for run in runs]
            after = statistics.median(min(values[:FEWEST]) for values in ended)
            reached = [min(values) <= target for values in ended]
            counts = [next((at for at, value in enumerate(values, 1) if value <= target), TRIALS) for values in ended]
            low, middle, high = np.percentile(counts, [25, 50, 75])
            base = base or middle
            lines.append(
                f"| {name} ({target:.4g}) | {searcher} | {middle:.0f} ({low:.0f}-{high:.0f}) | "
                f"{sum(reached)} of {SEEDS} | {after:.4g} | {middle / base:.2f} |"
            )
            print(lines[-1], flush=True)
    return [*lines, "", ABOUT_MODELS, "", *proposals(pool)]


def proposals(pool: ProcessPoolExecutor) -> list[str]:
    """How long a proposal takes as trials grow in number."""
    lines = [
        "## Time of a proposal",
        "",
        "Milliseconds on Hartmann6, median of the ten proposals up to that trial, over 3 seeds (most).",
        "",
        f"| searcher | {' | '.join(f'trial {count}' for count in TIMED)} |",
        f"|---|{'---|' * len(TIMED)}",
    ]
    for searcher in SEARCHERS:
        runs = [pool.submit(search, "Hartmann6", searcher, seed, TRIALS, None) for seed in range(3)]
        seconds = np.array([run.result()[1] for run in runs]) * 1e3
        cells = [seconds[:, count - 10 : count] for count in TIMED]
        lines.append(f"| {searcher} | {' | '.join(f'{np.median(cell):.1f} ({cell.max():.0f})' for cell in cells)} |")
        print(lines[-1], flush=True)
    return lines


def replay(searcher: str, scheduler: str, seed: int, target: float) -> tuple[int, int]:
    """Steps and trials that a search of the table takes until a whole trial is as good as the target.

    `CONCURRENT` trials train in turns, a report each; how far they come is decided by Ray's own scheduler.
    """
    from ray.tune.schedulers import TrialScheduler

    from app.tuning import schedulers
    from app.tuning.study import Study

    settings: dict[str, Any] = {"searcher": searcher, "scheduler": scheduler, "space": small_models.SPACE, "seed": seed}
    tuning = TuningConfig(
        **settings, random_trials=START, concurrent_trials=CONCURRENT, max_steps=small_models.STEPS,
        grace_steps=small_models.EVERY, reduction_factor=REDUCTION,
    )  # fmt: skip
    study, judge, none = Study(tuning), schedulers.scheduler(tuning), cast(Any, None)
    steps, begun, under_way = 0, 0, list[tuple[SimpleNamespace, small_models.Curve]]()
    while True:
        while len(under_way) < CONCURRENT and (values := study.ask()) is not None:
            trial = SimpleNamespace(trial_id=str(begun), values=values, reports=0)
            begun += 1
            judge.on_trial_add(none, cast(Any, trial))
            under_way.append((trial, curve_of(values)))
        if not under_way:
            raise RuntimeError(f"every point was tried and none is as good as {target}")
        trial, curve = under_way.pop(0)
        trial.reports += 1
        steps += small_models.EVERY
        told = {"step": trial.reports * small_models.EVERY, "validation_loss": curve[trial.reports - 1]}
        if trial.reports == len(curve):
            if curve[-1] <= target:
                return steps, begun
        elif judge.on_trial_result(none, cast(Any, trial), told) == TrialScheduler.CONTINUE:
            under_way.append((trial, curve))
            continue
        judge.on_trial_complete(none, cast(Any, trial), told)
        study.tell(trial.values, [told["validation_loss"]])


def asha(pool: ProcessPoolExecutor) -> list[str]:
    """The table of steps until the best of a search of whole trials."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    distributions, bests = spaces.distributions(small_models.SPACE), []
    for seed in range(SEEDS):
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=2_000 + seed))
        drawn = [study.ask(distributions).params for _ in range(WHOLE_TRIALS)]
        bests.append(min(curve_of(spaces.active(small_models.SPACE, values))[-1] for values in drawn))
    target = statistics.median(bests)
    lines = [
        "## What ASHA saves",
        "",
        f"Steps until a whole trial ({small_models.STEPS} steps) of the small models has a validation loss of "
        f"{target:.4f}, the median of random's best of {WHOLE_TRIALS} whole trials. Median over {SEEDS} seeds "
        f"(quartiles). ASHA may stop a trial from step {small_models.EVERY} on and keeps one in {REDUCTION} at each "
        f"rung; {CONCURRENT} trials at a time. Target: 4 times fewer steps than without it.",
        "",
        "| searcher | scheduler | steps | trials begun | fewer steps than whole trials by random |",
        "|---|---|---|---|---|",
    ]
    base = None
    for searcher in ("random", "gp"):
        for scheduler in ("none", "asha"):
            runs = [pool.submit(replay, searcher, scheduler, seed, target) for seed in range(SEEDS)]
            ended = np.array([run.result() for run in runs])
            (low, middle, high), trials = np.percentile(ended[:, 0], [25, 50, 75]), np.median(ended[:, 1])
            base = base or middle
            lines.append(
                f"| {searcher} | {scheduler} | {middle:,.0f} ({low:,.0f}-{high:,.0f}) | {trials:.0f} | "
                f"{base / middle:.1f}x |"
            )
            print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=("functions", "asha", "overhead"), help="none: all of them")
    parser.add_argument("--problem", action="append", help="of the functions, or 'small models'; none: all of them")
    given = parser.parse_args()
    parts = given.part or ["functions", "asha", "overhead"]
    command = f"`python -m benchmarks.tuning {' '.join(sys.argv[1:])}`"
    lines = ["# Search", "", measured.heading(), "", command, ""]
    os.environ["OMP_NUM_THREADS"] = "1"
    if "functions" in parts or "asha" in parts:
        small_models.curves()
    with ProcessPoolExecutor(2) as pool:
        if "functions" in parts:
            lines += [*functions(pool, given.problem or [*every_problem()]), ""]
        if "asha" in parts:
            lines += [*asha(pool), ""]
    if "overhead" in parts:
        lines += tuning_overhead.table()
    measured.write("tuning", lines)


if __name__ == "__main__":
    main()
