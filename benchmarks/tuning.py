"""Search on functions: trials until random's best of 200, and the time of a proposal, beside Optuna by itself.

    python -m benchmarks.tuning

Functions are searched in plain processes, two at a time, each with one thread; there is no Ray in it. Writes
benchmarks/results/<date>_<hardware>_tuning.md.
"""

import argparse
import os
import statistics
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np

from app.settings.tuning import TuningConfig
from app.tuning import space as spaces
from benchmarks import measured
from benchmarks.tuning_problems import Problem, Values, problems

SEEDS, TRIALS, START = 30, 200, 5
FEWEST = 50
TIMED = (25, 50, 100, 200)
"""Trials at which the time of a proposal is shown."""
Ask = Callable[[], Values | None]
Tell = Callable[[Values, float], None]

SEARCHERS = ("random", "gp", "Optuna GP", "tpe", "Optuna TPE", "cma_es", "Optuna CMA-ES")
"""Ours, each with Optuna's own of the same kind beside it, at its defaults."""


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
    about = problems()[problem]
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


def functions(pool: ProcessPoolExecutor) -> list[str]:
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
    for name, problem in problems().items():
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
    return [*lines, "", *proposals(pool)]


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    command = "`python -m benchmarks.tuning`"
    lines = ["# Search", "", measured.heading(), "", command, ""]
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(2) as pool:
        lines += functions(pool)
    measured.write("tuning", lines)


if __name__ == "__main__":
    main()
