"""What is kept of trials comes back, and other searches know what is theirs to know."""

from pathlib import Path
from typing import Any

import pytest

from app.config import Config
from app.settings.tuning import TuningConfig
from app.tuning import schedulers
from app.tuning.trials import Kept, Trial
from app.versions import TableVersion

TABLE = TableVersion("support.conversations", 1)
RATE = "training.learning_rate"
ENDED = Trial(
    0, {RATE: 1e-3}, "ended", {"step": 40, "validation_loss": 2.0}, ((20, 3.0), (40, 2.0)), ((20, {RATE: 1e-3}),)
)


def kept(store: Path, **settings: Any) -> Kept:
    named = {key.replace("__", "."): value for key, value in settings.items()}
    made = Kept(Config().with_overrides({"storage.uri": str(store), **named}), TABLE)
    made.open()
    return made


def trial(rate: float, steps: int = 40) -> Trial:
    return Trial(0, {RATE: rate}, "ended", {"step": steps, "validation_loss": 2.0})


def test_a_trial_comes_back_as_it_was_written(tmp_path: Path) -> None:
    search = kept(tmp_path)
    search.write("a", Trial(1, {RATE: 2e-3}))
    search.write("b", ENDED)
    assert search.read() == {"a": Trial(1, {RATE: 2e-3}), "b": ENDED}


def test_another_search_on_the_same_subject_knows_the_trials_in_its_space(tmp_path: Path) -> None:
    earlier = kept(tmp_path)
    for name, made in {"in": trial(1e-3), "short": trial(2e-3, steps=10), "out": trial(5e-1), "changed": ENDED}.items():
        earlier.write(name, made)
    assert earlier.earlier() == [], "its own are not earlier ones"
    assert kept(tmp_path, tuning__seed=1).earlier() == [trial(1e-3), trial(2e-3, steps=10)]
    full = {"tuning__scheduler": "none"}
    assert kept(tmp_path, **full).earlier() == [trial(1e-3)], "without ASHA, one cut short is no answer"


@pytest.mark.parametrize(
    "change",
    [{"training__seed": 1}, {"training__optimizer": "muon"}, {"tuning__max_steps": 41}, {"tuning__num_workers": 2},
     {"training__num_workers": 7}],
)  # fmt: skip
def test_what_changes_a_result_makes_another_subject(tmp_path: Path, change: dict[str, Any]) -> None:
    kept(tmp_path).write("a", trial(1e-3))
    assert kept(tmp_path, **change).earlier() == []


@pytest.mark.parametrize("change", [{"training__learning_rate": 0.5}, {"training__zero_stage": 0}])
def test_what_a_trial_does_not_use_makes_no_other_subject(tmp_path: Path, change: dict[str, Any]) -> None:
    kept(tmp_path).write("a", trial(1e-3))
    assert kept(tmp_path, **change).earlier() == [trial(1e-3)]


def population(scheduler: str) -> TuningConfig:
    space = {
        RATE: {"kind": "log_float", "low": 1e-5, "high": 1e-2},
        "training.warmup_fraction": {"kind": "float", "low": 0.0, "high": 0.5},
    }
    settings = {"searcher": "random", "scheduler": scheduler, "space": space}
    return Config().with_overrides({"tuning": settings}).tuning


@pytest.mark.parametrize("scheduler", ["pbt", "pb2"])
def test_a_population_sees_settings_that_come_back_within_their_ranges(scheduler: str) -> None:
    tuning = population(scheduler)
    values = {RATE: 1e-5, "training.warmup_fraction": 0.25}
    assert schedulers.from_tune(tuning, schedulers.to_tune(tuning, values)) == pytest.approx(values)
    assert all(tuning.space[key].allows(value) for key, value in values.items())


def test_pb2_steps_over_no_end() -> None:
    found = schedulers.from_tune(population("pb2"), {RATE: -5.0000002, "training.warmup_fraction": 0.50000006})
    assert found == {RATE: 1e-5, "training.warmup_fraction": 0.5}
