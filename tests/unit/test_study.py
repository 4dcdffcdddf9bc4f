"""Searchers find what they are to find, and never propose the same point twice."""

import importlib.util
from typing import Any

import optuna
import pytest

from app.config import Config
from app.errors import ConfigError
from app.settings.tuning import TuningConfig
from app.tuning import space
from app.tuning.study import Study

optuna.logging.set_verbosity(optuna.logging.ERROR)

RANGE = {"kind": "float", "low": -1.0, "high": 1.0}
PLANE = {"training.x": RANGE, "training.y": RANGE}
CONDITIONAL = {
    "training.optimizer": {"kind": "choice", "choices": ["adamw", "muon"]},
    "training.muon_learning_rate": {
        "kind": "log_float", "low": 1e-3, "high": 1e-1, "when": {"training.optimizer": "muon"},
    },
    "training.nested": {"kind": "int", "low": 1, "high": 3, "when": {"training.optimizer": "muon"}},
}  # fmt: skip
TWO = [{"name": "validation_loss"}, {"name": "tokens_per_s", "mode": "max"}]


def tuning(searcher: str, dimensions: dict[str, Any] | None = None, **settings: Any) -> TuningConfig:
    given = {"searcher": searcher, "scheduler": "none", "space": dimensions or PLANE, "random_trials": 4, **settings}
    return Config().with_overrides({"tuning": given}).tuning


def bowl(values: dict[str, Any]) -> float:
    return float((values["training.x"] - 0.3) ** 2 + (values["training.y"] + 0.4) ** 2)


def searched(settings: TuningConfig, trials: int, value: Any = bowl) -> list[tuple[dict[str, Any], float]]:
    study, told = Study(settings), []
    for _ in range(trials):
        values = study.ask()
        assert values is not None
        told.append((values, value(values)))
        study.tell(values, [told[-1][1]])
    return told


@pytest.mark.parametrize(("searcher", "trials"), [("gp", 20), ("bayesopt", 20), ("tpe", 60), ("cma_es", 100)])
def test_a_searcher_finds_the_lowest_point_sooner_than_chance(searcher: str, trials: int) -> None:
    found, drawn = (
        sorted(min(loss for _, loss in searched(tuning(name, seed=seed), trials)) for seed in range(3))[1]
        for name in (searcher, "random")
    )
    assert found < drawn / 2


@pytest.mark.parametrize("searcher", ["gp", "tpe", "random"])
def test_dimensions_that_are_not_there_are_not_proposed(searcher: str) -> None:
    told = searched(tuning(searcher, CONDITIONAL), 12, lambda values: float(len(values)))
    shapes = {tuple(values) for values, _ in told}
    assert shapes <= {("training.optimizer",), tuple(CONDITIONAL)}
    assert sum(values["training.optimizer"] == "adamw" for values, _ in told) == 1, "it has no more than one point"


@pytest.mark.parametrize("searcher", ["gp", "tpe", "random"])
def test_every_point_of_a_small_space_is_tried_once_and_then_the_search_ends(searcher: str) -> None:
    grid = {"training.a": {"kind": "int", "low": 1, "high": 3}, "training.b": {"kind": "choice", "choices": ["u", "v"]}}
    study = Study(tuning(searcher, grid))
    seen = []
    while (values := study.ask()) is not None:
        seen.append(space.point(values))
        study.tell(values, [float(values["training.a"])])
    assert len(seen) == len(set(seen)) == 6


def test_points_that_are_being_tried_are_not_proposed_again() -> None:
    study = Study(tuning("gp", {"training.a": {"kind": "int", "low": 1, "high": 4}}))
    asked = [study.ask() for _ in range(5)]
    assert sorted(values["training.a"] for values in asked if values) == [1, 2, 3, 4]
    assert asked[4] is None


def test_a_converged_gaussian_process_learns_of_each_trial_once() -> None:
    study = Study(tuning("gp", {"training.x": RANGE}))
    for _ in range(20):
        values = study.ask()
        assert values is not None
        study.tell(values, [float(values["training.x"])])  # the best is at the edge, where it proposes to go again
    trials = study._opened().get_trials()
    complete = [trial for trial in trials if trial.state == optuna.trial.TrialState.COMPLETE]
    assert len(complete) == 20 < len(trials)


@pytest.mark.parametrize(
    ("searcher", "trials"), [("gp", 16), ("bayesopt", 16), ("tpe", 40), ("cma_es", 80), ("random", 9)]
)
def test_a_study_that_knows_the_earlier_trials_goes_on_from_them(searcher: str, trials: int) -> None:
    told = searched(tuning(searcher), trials)
    study = Study(tuning(searcher))
    for values, loss in told:
        study.know(values, [loss])
    found = []
    for _ in range(8):
        values = study.ask()
        assert values is not None
        found.append(bowl(values))
        study.tell(values, [found[-1]])
    assert not {loss for _, loss in told} & set(found), "none was tried again"
    if searcher != "random":
        early = sorted(bowl(values) for values, _ in told[:8])[4]
        assert sorted(found)[4] < early / 2, "it starts where the other ended"


def test_points_to_be_tried_first_are_tried_first_unless_their_result_is_known() -> None:
    first = [{"training.x": 0.1, "training.y": 0.2}, {"training.x": 0.5, "training.y": 0.5}, {"training.x": 9.0}]
    study = Study(tuning("gp"), first)
    study.know(first[1], [1.0])
    assert study.ask() == first[0]
    assert study.ask() not in first


def test_a_failed_point_is_not_tried_again() -> None:
    study = Study(tuning("tpe", {"training.a": {"kind": "int", "low": 1, "high": 2}}))
    first = study.ask()
    assert first is not None
    study.tell(first, None)
    second = study.ask()
    assert second is not None
    assert second != first
    assert study.ask() is None


@pytest.mark.parametrize("searcher", ["gp", "tpe", "nsga2", "random"])
def test_several_objectives_are_told_together(searcher: str) -> None:
    study = Study(tuning(searcher, objectives=TWO))
    study.know({"training.x": 0.0, "training.y": 0.0}, [1.0, 2.0])
    for _ in range(8):
        values = study.ask()
        assert values is not None
        study.tell(values, [values["training.x"], values["training.y"]])


def test_a_searcher_whose_extra_is_missing_is_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"install the extra: pip install '\.\[bayesopt\]'"):
        Study(tuning("bayesopt"))


LEARNING_RATE = {"kind": "log_float", "low": 1e-4, "high": 1e-2}
BATCH = {"kind": "int", "low": 1, "high": 8}
CHOICE = {"kind": "choice", "choices": [0, 2]}


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"searcher": "cma_es", "space": {"training.a": CHOICE, "training.b": BATCH}}, r"training\.a is choice"),
        ({"searcher": "cma_es", "space": {"training.a": BATCH}}, "needs two dimensions"),
        ({"searcher": "bayesopt", "space": {"training.a": BATCH}}, r"training\.a is int"),
        ({"searcher": "bayesopt", "space": {"training.a": RANGE}, "objectives": TWO}, "knows one objective"),
        ({"searcher": "nsga2"}, "name two"),
        ({"searcher": "random", "scheduler": "asha", "objectives": TWO}, "compares trials by one objective"),
        ({"scheduler": "pbt"}, "proposes settings itself, got searcher gp"),
        ({"searcher": "random", "scheduler": "pb2", "num_workers": 2}, "one worker, got num_workers 2"),
        ({"searcher": "random", "scheduler": "pbt", "trials": 1}, "needs a population"),
        ({"searcher": "random", "scheduler": "pbt", "grace_steps": 40}, "got 40 of 40 steps"),
        (
            {"searcher": "random", "scheduler": "pbt", "space": {"training.weight_decay": RANGE}},
            "which training.weight_decay is not one of",
        ),
        ({"objectives": [TWO[0], TWO[0]]}, "all different"),
        ({"space": {"training.a": CHOICE | {"when": {"training.b": 1}}}}, "does not stand before it"),
        (
            {"space": {"training.a": CHOICE, "training.b": BATCH | {"when": {"training.a": 1}}}},
            r"waits for training\.a = 1, which it never is",
        ),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused_with_the_reason(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Config().with_overrides({"tuning": {"space": {"training.learning_rate": LEARNING_RATE}, **settings}})
