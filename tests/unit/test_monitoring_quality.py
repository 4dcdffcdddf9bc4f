import json
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.monitoring.quality import OTHER, Quality, label, measure, most_frequent
from app.traffic import Exchange, Feedback
from tests.traffic_records import SECRET, exchange, feedback, of_the_secret


def figures(exchanges: Iterable[Exchange], received: Iterable[Feedback] = ()) -> dict[str, Any]:
    return measure(exchanges, received).figures()


def test_without_traffic_counts_are_zero_and_shares_absent() -> None:
    nothing = figures([])
    assert nothing["exchanges"] == nothing["feedback"] == nothing["errors"] == 0
    assert nothing["time_to_first_token_s_p50"] is nothing["end_to_end_s_p99"] is None
    assert nothing["intent_accuracy"] is nothing["feedback_fraction"] is nothing["positive_fraction"] is None
    assert nothing["variants"] == nothing["intents"] == {}


def test_quantiles_are_those_of_numpy() -> None:
    times = np.random.default_rng(5).gamma(2.0, 0.2, size=501)
    found = figures(exchange(n, time_to_first_token_s=float(t), end_to_end_s=float(2 * t)) for n, t in enumerate(times))
    for name, q in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99)):
        assert found[f"time_to_first_token_s_{name}"] == pytest.approx(np.quantile(times, q), abs=1e-6)
        assert found[f"end_to_end_s_{name}"] == pytest.approx(2 * np.quantile(times, q), abs=1e-6)


def test_errors_and_cancelled_are_counted_and_do_not_speed_up_the_answers() -> None:
    found = figures(
        [
            exchange(1),
            exchange(2, status="error", time_to_first_token_s=None, end_to_end_s=0.001),
            exchange(3, status="cancelled", time_to_first_token_s=7.0, end_to_end_s=7.1),
        ]
    )
    assert (found["exchanges"], found["errors"], found["cancelled"]) == (3, 1, 1)
    assert found["end_to_end_s_p50"] == 0.5
    assert found["time_to_first_token_s_p99"] == pytest.approx(7.0, rel=0.02)


def test_feedback_is_joined_to_its_exchange() -> None:
    found = figures(
        [exchange(n) for n in range(10)],
        [feedback(0, rating=1), feedback(1, rating=1), feedback(2, rating=-1), feedback(3), feedback(99, rating=-1)],
    )
    assert found["feedback"] == 5
    assert found["with_feedback"] == 4
    assert found["feedback_fraction"] == pytest.approx(0.4)
    assert found["positive_fraction"] == pytest.approx(2 / 3)


def test_the_newest_feedback_on_an_answer_counts() -> None:
    received = [feedback(0, at=3, rating=-1), feedback(0, at=9, rating=1, intent="track_order")]
    for order in (received, received[::-1]):
        found = figures([exchange(0)], order)
        assert found["feedback"] == 2
        assert (found["with_feedback"], found["positive_fraction"], found["intent_accuracy"]) == (1, 1.0, 1.0)


def test_feedback_can_be_taken_back() -> None:
    found = figures([exchange(0)], [feedback(0, at=1, rating=-1), feedback(0, at=2, comment=None)])
    assert found["with_feedback"] == 0
    assert found["positive_fraction"] is None


def test_accuracy_is_over_exchanges_whose_right_intent_is_known() -> None:
    found = figures(
        [exchange(0), exchange(1), exchange(2, intent="refund"), exchange(3, intent=None), exchange(4)],
        [
            feedback(0, intent="track_order"),
            feedback(1, intent="refund"),
            feedback(2, intent="refund"),
            feedback(3, intent="refund"),
        ],
    )
    assert found["intent_labels"] == 3
    assert found["intent_accuracy"] == pytest.approx(2 / 3)
    assert found["intents"] == {"track_order": 3, "refund": 1}


def test_variants_are_apart_and_add_up() -> None:
    found = figures(
        [exchange(n, variant="champion" if n % 3 else "candidate", completion_tokens=n) for n in range(9)],
        [feedback(0, rating=-1), feedback(1, rating=1)],
    )
    candidate, champion = found["variants"]["candidate"], found["variants"]["champion"]
    assert (candidate["exchanges"], champion["exchanges"]) == (3, 6)
    assert (candidate["positive_fraction"], champion["positive_fraction"]) == (0.0, 1.0)
    assert candidate["completion_tokens"] + champion["completion_tokens"] == found["completion_tokens"] == 36


def test_handovers_are_counted_by_reason() -> None:
    found = figures([exchange(0, handover="intent"), exchange(1, handover="reply_confidence"), exchange(2)])
    assert found["handovers"] == {"intent": 1, "reply_confidence": 1}


def test_no_word_of_a_customer_gets_into_the_figures() -> None:
    received = [feedback(0, intent=SECRET, rating=1), feedback(1, intent="track_order")]
    found = figures([exchange(0), exchange(1), exchange(2, intent=SECRET), exchange(3, variant=SECRET)], received)
    text = json.dumps(found)
    assert of_the_secret(text) == []
    assert found["intents"] == {"track_order": 3, OTHER: 1}
    assert found["intent_accuracy"] == 0.5


@pytest.mark.parametrize("name", ["track_order", "reverted_card_payment?", "FindRestaurants", "a b", "größe"])
def test_names_are_labels(name: str) -> None:
    assert label(name) == name


@pytest.mark.parametrize("text", ["", "a\nb", "x" * 65, 'a"b', "a\x1b[31m", "anna@example.com", "\ud800"])
def test_what_is_no_name_becomes_other(text: str) -> None:
    assert label(text) == OTHER


@given(st.dictionaries(st.text("abc", min_size=1), st.integers(1, 9)), st.integers(1, 5))
def test_the_rarest_labels_are_added_up(counts: dict[str, int], limit: int) -> None:
    kept = most_frequent(Counter(counts), limit)
    assert sum(kept.values()) == sum(counts.values())
    assert len(kept) <= limit + 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_an_impossible_latency_is_left_out(value: float) -> None:
    found = figures([exchange(0), exchange(1, time_to_first_token_s=value, end_to_end_s=value)])
    assert found["exchanges"] == 2
    assert found["time_to_first_token_s_p99"] == 0.1
    assert found["end_to_end_s_p99"] == 0.5


@pytest.mark.parametrize(
    "damage",
    [
        {"prompt_tokens": "ten"},
        {"end_to_end_s": None},
        {"intent": ["track_order"]},
        {"status": 3},
        {"response_id": {}},
        {"time_to_first_token_s": "soon"},
    ],
    ids=lambda damage: next(iter(damage)),
)
def test_a_record_with_a_wrong_type_is_left_out_and_counted(damage: dict[str, Any]) -> None:
    found = figures([exchange(0), exchange(1, **damage)], [feedback(0, rating=1), feedback(0, rating="good")])
    assert (found["exchanges"], found["feedback"], found["unreadable"]) == (1, 1, 2)
    assert found["positive_fraction"] == 1.0


exchanges = st.builds(
    exchange,
    st.integers(0, 9),
    variant=st.sampled_from(["a", "b"]),
    status=st.sampled_from(["ok", "error", "cancelled"]),
    intent=st.sampled_from([None, "x", "y"]),
    time_to_first_token_s=st.none() | st.floats(0, 9),
)
ratings = st.builds(feedback, st.integers(0, 12), st.integers(0, 59), rating=st.sampled_from([None, 1, -1]))


@given(st.lists(exchanges), st.lists(ratings))
def test_shares_are_shares_and_variants_add_up(made: list[Exchange], received: list[Feedback]) -> None:
    quality: Quality = measure(made, received)
    for tally in (quality.whole, *quality.variants.values()):
        for share in (tally.feedback_fraction, tally.positive_fraction, tally.intent_accuracy):
            assert share is None or 0 <= share <= 1
        assert tally.statuses.total() == tally.exchanges
        assert tally.positive + tally.negative <= tally.with_feedback <= tally.exchanges
    assert sum(tally.exchanges for tally in quality.variants.values()) == quality.whole.exchanges == len(made)
    json.dumps(quality.figures(), allow_nan=False)
