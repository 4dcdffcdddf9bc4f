"""What a search came to: the winner, the front, what mattered, and the page."""

from typing import Any

import numpy as np
import pytest

from app.config import Config
from app.tuning import result
from app.tuning.trials import Trial

SPACE = {
    "training.learning_rate": {"kind": "log_float", "low": 1e-4, "high": 1e-2},
    "training.optimizer": {"kind": "choice", "choices": ["adamw", "muon"]},
    "training.micro_batch_size": {"kind": "int", "low": 1, "high": 8, "when": {"training.optimizer": "muon"}},
}
TWO = [{"name": "validation_loss"}, {"name": "tokens_per_s"}]


def searching(**settings: Any) -> Config:
    return Config().with_overrides({"tuning": {"space": SPACE, "scheduler": "none", **settings}})


def trial(number: int, loss: float, speed: float = 1.0, **values: Any) -> Trial:
    named = {
        f"training.{key}": value for key, value in ({"learning_rate": 1e-3, "optimizer": "adamw"} | values).items()
    }
    metrics = {"step": 40, "validation_loss": loss, "tokens_per_s": speed}
    return Trial(number, named, "ended", metrics, ((20, loss + 1), (40, loss)))


FAILED = Trial(9, {"training.learning_rate": 0.01, "training.optimizer": "adamw"}, "failed", error="<b>no memory</b>")


def test_the_winner_is_the_best_of_this_search_and_of_those_it_knows() -> None:
    figures = result.judge(searching(), [trial(0, 2.0), FAILED], [trial(0, 1.5, learning_rate=2e-3)])
    assert figures["overrides"]["training.learning_rate"] == 2e-3
    assert (figures["trials"], figures["failed"], figures["reused"]) == (2, 1, 1)
    assert [row["validation_loss"] for row in figures["table"]] == [1.5, 2.0, None]


def test_the_front_holds_what_nothing_else_beats_in_everything() -> None:
    trials = [trial(0, 1.0, 5.0), trial(1, 2.0, 9.0), trial(2, 1.5, 4.0), trial(3, 2.0, 8.0), trial(4, 0.9, 1.0)]
    figures = result.judge(searching(objectives=TWO), trials)
    assert [(row["validation_loss"], row["tokens_per_s"]) for row in figures["front"]] == [
        (0.9, 1.0),
        (1.0, 5.0),
        (2.0, 9.0),
    ]


def test_settings_of_a_section_within_the_section_are_shown_beside_what_is_configured() -> None:
    space = {"training.lora.rank": {"kind": "int", "low": 2, "high": 64}}
    config = searching(space=space)
    ranks = [
        Trial(
            number,
            {"training.lora.rank": rank},
            "ended",
            {"step": 40, "validation_loss": 2.0 / rank},
            ((40, 2.0 / rank),),
        )
        for number, rank in enumerate((4, 32))
    ]
    figures = result.judge(config, ranks)
    assert figures["overrides"] == {"training.lora.rank": 32}
    page = result.page(config, "s", figures, ranks)
    assert str(config.training.lora.rank) in page.partition("as configured")[2].partition("</table>")[0]


def test_a_best_value_at_an_end_of_its_range_is_pointed_out() -> None:
    for rate, is_at_an_end in ((1e-2, True), (1.02e-4, True), (9e-4, False)):
        trials = [trial(0, 1.0, learning_rate=rate), trial(1, 2.0, learning_rate=8e-4)]
        config = searching()
        page = result.page(config, "s", result.judge(config, trials), trials)
        assert ("at an end of its range" in page) is is_at_an_end, rate


def test_what_decides_the_loss_is_the_most_important() -> None:
    draw = np.random.default_rng(0)
    rates = 10 ** draw.uniform(-4, -2, 40)
    kinds = draw.choice(["adamw", "muon"], 40)
    trials = [
        trial(number, abs(np.log10(rate) + 3), learning_rate=float(rate), optimizer=str(kind))
        for number, (rate, kind) in enumerate(zip(rates, kinds, strict=True))
    ]
    shares = result.importance(searching().tuning, trials)
    assert shares["training.learning_rate"] > 0.8
    assert sum(shares.values()) == pytest.approx(1.0, abs=1e-3)
    assert result.importance(searching().tuning, trials[:4]) == {}, "too few to tell"


def test_the_page_shows_history_slices_and_failures_and_escapes_them() -> None:
    config = searching(objectives=TWO)
    trials = [trial(number, 2.0 - number / 10, number) for number in range(6)]
    trials.append(trial(7, 3.0, optimizer="muon", micro_batch_size=4))
    figures = result.judge(config, [*trials, FAILED])
    page = result.page(config, "support-1", figures, [*trials, FAILED])
    assert page.count("<svg") == 6, "the front, the history, the curves, and a slice for each dimension"
    assert "&lt;b&gt;no memory" in page
    assert "<b>no memory" not in page
