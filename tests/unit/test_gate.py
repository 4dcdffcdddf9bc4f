"""Budgets and gates: what misses is named with its value and its threshold."""

import math

import pytest

from app.compression import gate
from app.compression.gate import Measured, figures
from app.config import CompressionConfig, GateConfig
from app.judgement import misses

BEFORE = Measured(1_000_000, 2.0, (100.0, 400.0))
BUDGET = CompressionConfig(max_perplexity_increase=0.03, min_bytes_reduction=0.3)


@pytest.mark.parametrize(
    ("perplexity", "size", "missed"),
    [
        (2.0, 700_000, []),
        (2.06, 400_000, []),
        (1.5, 1, []),
        (
            2.1,
            400_000,
            ["perplexity went from 2 to 2.1 (+5.0%), compression.max_perplexity_increase is 3.0%"],
        ),
        (
            2.0,
            800_000,
            ["weights went from 1,000,000 to 800,000 bytes (20.0% saved), compression.min_bytes_reduction is 30.0%"],
        ),
    ],
)
def test_a_compressed_model_is_held_to_its_budget(perplexity: float, size: int, missed: list[str]) -> None:
    assert gate.misses(BUDGET, BEFORE, Measured(size, perplexity, (1.0, 1.0))) == missed


@pytest.mark.parametrize("perplexity", [math.nan, math.inf])
def test_a_broken_perplexity_is_never_accepted(perplexity: float) -> None:
    assert len(gate.misses(BUDGET, BEFORE, Measured(1, perplexity, (1.0, 1.0)))) == 1
    assert len(gate.misses(BUDGET, Measured(1_000, perplexity, (1.0, 1.0)), Measured(1, perplexity, (1.0, 1.0)))) == 1


def test_everything_that_is_missed_is_named() -> None:
    assert len(gate.misses(BUDGET, BEFORE, Measured(2_000_000, 4.0, (1.0, 1.0)))) == 2


def test_figures_are_those_of_the_contract() -> None:
    assert figures(BEFORE, Measured(300_000, 2.02, (120.04, 410.0)), accepted=True) == {
        "bytes_before": 1_000_000,
        "bytes_after": 300_000,
        "perplexity_before": 2.0,
        "perplexity_after": 2.02,
        "accepted": True,
        "tokens_per_s_before": 400.0,
        "tokens_per_s_after": 410.0,
        "tokens_per_s_one_user_before": 100.0,
        "tokens_per_s_one_user_after": 120.0,
    }


FIGURES = {"perplexity": 1.5, "token_f1": 0.6, "intent_accuracy": 0.95, "reply_intent_accuracy": 0.9}


@pytest.mark.parametrize(
    ("asked", "missed"),
    [
        ({}, []),
        ({"max_perplexity": 1.5, "min_token_f1": 0.6, "min_reply_intent_accuracy": 0.9}, []),
        ({"max_perplexity": 1.2}, ["perplexity is 1.5, evaluation.gate.max_perplexity is 1.2"]),
        (
            {"min_token_f1": 0.7, "min_intent_accuracy": 0.99},
            [
                "token_f1 is 0.6, evaluation.gate.min_token_f1 is 0.7",
                "intent_accuracy is 0.95, evaluation.gate.min_intent_accuracy is 0.99",
            ],
        ),
    ],
)
def test_a_gate_names_every_figure_that_misses_its_threshold(asked: dict[str, float], missed: list[str]) -> None:
    assert misses(GateConfig(**asked), FIGURES, {}) == missed


def test_a_threshold_on_a_figure_that_is_absent_is_missed() -> None:
    absent = {"intent_accuracy": "the held-out messages carry no intents"}
    assert misses(GateConfig(min_intent_accuracy=0.0), {"perplexity": 1.0}, absent) == [
        "intent_accuracy is asked for and absent: the held-out messages carry no intents"
    ]


def test_a_figure_that_is_not_a_number_is_missed() -> None:
    assert len(misses(GateConfig(max_perplexity=9.0), {"perplexity": math.nan}, {})) == 1
