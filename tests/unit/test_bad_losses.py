"""Which losses of a training run are bad, and when there are too many of them."""

import json
import math
from typing import Any

import pytest

from app.config import Config
from app.errors import StageFailed
from app.training.bad_losses import FEW_LOSSES, Losses


def losses(**settings: Any) -> Losses:
    return Losses(Config().with_overrides({f"training.{key}": value for key, value in settings.items()}).training)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_is_bad_from_the_first_step_on(loss: float) -> None:
    assert not losses().is_good(loss)


def test_a_loss_has_jumped_against_the_median_of_the_latest_ones() -> None:
    watched = losses(bad_loss_factor=3.0)
    assert watched.is_good(1e6), "the first ones say little"
    for _ in range(FEW_LOSSES):
        watched.add(2.0)
    watched.add(100.0)
    assert watched.is_good(6.0)
    assert not watched.is_good(6.1)


def test_near_zero_a_loss_may_well_be_many_times_another() -> None:
    watched = losses(bad_loss_factor=3.0)
    for _ in range(FEW_LOSSES):
        watched.add(0.01)
    assert watched.is_good(1.0)
    assert not watched.is_good(1.1)


def test_the_run_ends_after_so_many_or_at_once() -> None:
    watched = losses(max_bad_losses=2)
    watched.meet(math.nan, 5, 0)
    watched.meet(math.nan, 6, 8)
    with pytest.raises(StageFailed, match=r"the loss at step 7 is nan, after 2 bad ones \(training.max_bad_losses\)"):
        watched.meet(math.nan, 7, 16)
    with pytest.raises(StageFailed, match=r"the loss at step 5 is inf and training.on_bad_loss is stop"):
        losses(on_bad_loss="stop").meet(math.inf, 5, 0)


def test_only_steps_that_made_the_run_go_back_are_left_out() -> None:
    skipped, back = losses(), losses(on_bad_loss="roll_back")
    for watched in (skipped, back):
        watched.meet(math.nan, 5, 32)
    assert (skipped.left_out, back.left_out) == (set(), {32})


def test_a_run_that_goes_on_judges_as_if_it_had_never_stopped() -> None:
    watched = losses(on_bad_loss="roll_back", max_bad_losses=2)
    for loss in (2.0,) * FEW_LOSSES:
        watched.add(loss)
    kept = json.loads(json.dumps(watched.state()))
    watched.meet(40.0, 12, 96)
    for loss in (3.0, 2.5):
        watched.add(loss)
    watched.go_back(kept)
    assert watched.state() == {"latest": [2.0] * FEW_LOSSES, "bad": 1, "left_out": [96]}
    resumed = Losses(
        losses(on_bad_loss="roll_back", max_bad_losses=2)._training, json.loads(json.dumps(watched.state()))
    )
    assert not resumed.is_good(40.0), "a jump is seen in the first step"
    resumed.meet(40.0, 14, 112)
    with pytest.raises(StageFailed, match="after 2 bad ones"):
        resumed.meet(40.0, 15, 120)
    assert resumed.left_out == {96, 112}
