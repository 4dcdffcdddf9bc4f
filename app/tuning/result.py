"""What a search came to: the winner, all trials, what mattered, and a page that shows them.

reports/tune/<search>/report.html and report.json
"""

import json
import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from app.config import Config
from app.report import Bars, Block, Card, Cards, Section, Table, Verdict, lines, render, scatter
from app.settings.tuning import DimensionConfig, TuningConfig
from app.storage import Storage
from app.tuning import space
from app.tuning.trials import Trial, ranked

EDGE = 0.01
"""Share of a range that counts as its end."""
FEWEST_TRIALS = 5
"""That the importance of parameters is told from."""


def judge(config: Config, trials: Sequence[Trial], known: Sequence[Trial] = ()) -> dict[str, Any]:
    """The figures of a search: `trials` are its own, `known` those of earlier searches that it built on.

    `overrides` are the settings of the best trial; of several objectives, of the one on the front that is best in
    the first.
    """
    tuning = config.tuning
    ended = ranked(tuning, [trial for trial in (*trials, *known) if trial.state == "ended"])
    names = [objective.name for objective in tuning.objectives]
    best = ended[0]
    figures: dict[str, Any] = {
        "trials": sum(trial.state != "running" for trial in trials),
        "failed": sum(trial.state == "failed" for trial in trials),
        "reused": len(known),
        "steps": sum(trial.steps for trial in trials),
        "best": {**dict(zip(names, best.objectives(tuning), strict=True)), "steps": best.steps},
        "overrides": best.values,
        "importance": importance(tuning, ended),
        "table": [row(tuning, trial) for trial in (*ended, *(each for each in trials if each.state == "failed"))],
    }
    if len(names) > 1:
        figures["front"] = [row(tuning, trial) for trial in front(tuning, ended)]
    return figures


def row(tuning: TuningConfig, trial: Trial) -> dict[str, Any]:
    """A trial as the table of a job's last line has it."""
    names = [str(objective.name) for objective in tuning.objectives]
    reached = {name: trial.metrics.get(name) for name in names}
    changes = {"changes": [list(change) for change in trial.changes]} if trial.changes else {}
    about = {"steps": trial.steps, "seconds": trial.seconds, "error": trial.error}
    return {"values": trial.values, **reached, **about, **changes}


def front(tuning: TuningConfig, ended: Sequence[Trial]) -> list[Trial]:
    """The trials that no other is at least as good as in every objective and better in one, by the first objective."""
    signs = np.array([1.0 if objective.mode == "min" else -1.0 for objective in tuning.objectives])
    reached = np.array([trial.objectives(tuning) for trial in ended]) * signs
    beaten = [bool((np.all(reached <= mine, axis=1) & np.any(reached < mine, axis=1)).any()) for mine in reached]
    return [trial for trial, is_beaten in zip(ended, beaten, strict=True) if not is_beaten]


def importance(tuning: TuningConfig, ended: Sequence[Trial]) -> dict[str, float]:
    """How much of the first objective's variance each key explains, summing to 1; empty where trials are too few.

    Source: Hutter, Hoos & Leyton-Brown 2014, An efficient approach for assessing hyperparameter importance.
    """
    import optuna

    values = [trial.objectives(tuning)[0] for trial in ended]
    if len(ended) < FEWEST_TRIALS or np.ptp(values) == 0.0:
        return {}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study, distributions = optuna.create_study(), space.distributions(tuning.space)
    for trial, value in zip(ended, values, strict=True):
        params = space.complete(tuning.space, trial.values)
        study.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, value=value))
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=tuning.seed)
    found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return {key: round(float(share), 4) for key, share in found.items()}


def write(config: Config, name: str, figures: dict[str, Any], trials: Sequence[Trial]) -> None:
    """Write the report's page and its figures, and put the page's address into them."""
    storage = Storage(config.storage.uri)
    place = ("reports", "tune", name)
    figures["report"] = storage.uri(*place, "report.html")
    storage.write(json.dumps(figures, default=float).encode(), *place, "report.json")
    storage.write(page(config, name, figures, trials).encode(), *place, "report.html")


def page(config: Config, name: str, figures: dict[str, Any], trials: Sequence[Trial]) -> str:
    """The report as a page; `trials` in the order in which they were known."""
    tuning = config.tuning
    ended = [trial for trial in trials if trial.state == "ended"]
    several = len(tuning.objectives) > 1
    mattered = _importance(figures["importance"])
    sections = [
        Section("The best trial", [_cards(tuning, figures), _settings(config, figures)]),
        *([Section("Trade-offs", _front(tuning, figures), FRONT_NOTE)] if several else []),
        Section("How it went", _history(tuning, ended)),
        Section("What mattered", mattered, "" if mattered else f"Importance needs {FEWEST_TRIALS} different trials."),
        Section("Slices", _slices(tuning, ended), "Each trial by each of its settings."),
        Section("All trials", [_trials(tuning, figures)], "Best first."),
    ]
    objective = tuning.objectives[0]
    reached = figures["best"][objective.name]
    sentence = f"{figures['trials']} trials, the best with {objective.name} {reached:.4g}."
    if figures["failed"]:
        sentence += f" {figures['failed']} failed."
    return render(f"Search {name}", sections, f"{tuning.searcher}, {tuning.scheduler}", Verdict(sentence, "good"))


FRONT_NOTE = "On the front are the trials that no other is better than in every objective."


def _cards(tuning: TuningConfig, figures: dict[str, Any]) -> Cards:
    best = figures["best"]
    reached = [Card(each.name, best[each.name], f"mode {each.mode}", "good") for each in tuning.objectives]
    failed = Card("Failed", figures["failed"], state="bad" if figures["failed"] else "plain")
    most = tuning.max_steps * figures["trials"]
    steps = Card("Steps", figures["steps"], f"of {most:,} without early stops")
    known = Card("Known before", figures["reused"], "trials of earlier searches")
    return Cards([*reached, Card("Trials", figures["trials"]), failed, steps, known])


def _settings(config: Config, figures: dict[str, Any]) -> Table:
    rows = [
        (key, value, operator.attrgetter(key)(config), _place(config.tuning.space[key], value))
        for key, value in figures["overrides"].items()
    ]
    return Table(("setting", "best", "as configured", ""), rows)


def _place(dimension: DimensionConfig, value: Any) -> str:
    """Whether a value lies where the range may have cut off better ones."""
    if dimension.kind == "choice":
        return ""
    low, high = map(math.log, dimension.ends) if dimension.kind == "log_float" else dimension.ends
    share = ((math.log(value) if dimension.kind == "log_float" else value) - low) / (high - low)
    return "" if EDGE < share < 1 - EDGE else "at an end of its range"


def _front(tuning: TuningConfig, figures: dict[str, Any]) -> list[Block]:
    across, up = tuning.objectives[:2]
    rows = [entry for entry in figures["table"] if entry["error"] is None]
    drawn = {
        "all trials": _pairs(rows, across.name, up.name),
        "front": _pairs(figures["front"], across.name, up.name),
    }
    caption = f"{across.name} ({across.mode}) against {up.name} ({up.mode})"
    return [scatter(drawn, caption, across.name, up.name)]


def _pairs(rows: Sequence[dict[str, Any]], across: str, up: str) -> tuple[list[float], list[float]]:
    return [entry[across] for entry in rows], [entry[up] for entry in rows]


def _history(tuning: TuningConfig, ended: Sequence[Trial]) -> list[Block]:
    objective = tuning.objectives[0]
    numbers = [*range(1, len(ended) + 1)]
    reached = [trial.objectives(tuning)[0] for trial in ended]
    so_far = np.minimum.accumulate(reached) if objective.mode == "min" else np.maximum.accumulate(reached)
    history = scatter(
        {"trial": (numbers, reached)}, f"{objective.name} by trial, and the best so far", "trial", objective.name,
        line=("best so far", (numbers, [float(value) for value in so_far])),
    )  # fmt: skip
    curves = {
        f"trial {number}": ([step for step, _ in trial.curve], [value for _, value in trial.curve])
        for number, trial in zip(numbers, ended, strict=True)
    }
    return [
        history,
        lines(curves, f"{objective.name} on the way, a line a trial", "step", objective.name, legend=False),
    ]


def _importance(shares: dict[str, float]) -> list[Block]:
    return [Bars({"importance": shares}, "Share of the variance that each setting explains (fANOVA)")] if shares else []


def _slices(tuning: TuningConfig, ended: Sequence[Trial]) -> list[Block]:
    objective = tuning.objectives[0]
    found: list[Block] = []
    for key, dimension in tuning.space.items():
        there = [trial for trial in ended if key in trial.values]
        if not there:
            continue
        values = [trial.values[key] for trial in there]
        is_choice = dimension.kind == "choice"
        across = [str(value) for value in values] if is_choice else values
        reached = [trial.objectives(tuning)[0] for trial in there]
        caption = f"{objective.name} by {key}"
        log = dimension.kind == "log_float"
        found.append(scatter({"trial": (across, reached)}, caption, key, objective.name, log_x=log))
    return found


def _trials(tuning: TuningConfig, figures: dict[str, Any]) -> Table:
    names = [objective.name for objective in tuning.objectives]
    short = [key.removeprefix(space.TUNABLE) for key in tuning.space]
    rows = [
        (
            *(entry[name] for name in names),
            *(entry["values"].get(key) for key in tuning.space),
            entry["steps"],
            entry["seconds"],
            entry["error"] or "",
        )
        for entry in figures["table"]
    ]
    return Table((*names, *short, "steps", "seconds", "error"), rows)
