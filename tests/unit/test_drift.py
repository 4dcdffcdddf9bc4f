import json
import math
import pickle
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from scipy.spatial.distance import jensenshannon
from scipy.stats import chi2_contingency, ks_2samp

from app.conversation import SCHEMA
from app.drift import (
    BINS,
    BUCKETS,
    CATEGORIES,
    LENGTHS,
    NAMES,
    Drift,
    Sketch,
    compare,
    js_divergence,
    ks,
    new_word_share,
    psi,
    total_variation,
)
from app.ingestion.sample import lines

POOL = 3_000
counts = st.lists(st.integers(0, 50), min_size=6, max_size=6).filter(any)


def table(records: Sequence[dict[str, Any]]) -> pa.Table:
    columns = ("conversation_id", "channel", "language", "intent")
    rows = [
        {name: record.get(name) for name in columns}
        | {"messages": [{name: message.get(name) for name in ("role", "content", "intent")} for message in messages]}
        for record in records
        for messages in [record["messages"]]
    ]
    return pa.Table.from_pylist(rows, schema=SCHEMA)


@cache
def shop() -> list[dict[str, Any]]:
    records = [json.loads(line) for line in lines(3, 0, POOL, 0.0)]
    return [record | {"intent": record["messages"][0]["intent"]} for record in records]


def record(text: str, **columns: Any) -> dict[str, Any]:
    return {"conversation_id": "c", "messages": [{"role": "user", "content": text}], **columns}


def by_name(found: Sequence[Drift]) -> dict[str, Drift]:
    return {drift.name: drift for drift in found}


def drifted(old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> set[str]:
    found = compare(Sketch.of(table(old)), Sketch.of(table(new)))
    return {drift.name for drift in found if drift.drifted}


class Shop:
    """Draws sketches of any number of the shop's conversations, each independent of the others."""

    def __init__(self) -> None:
        rows = [Sketch.of(table([record])) for record in shop()]
        self.labels = {name: [next(iter(getattr(row, name))) for row in rows] for name in CATEGORIES}
        self.lengths = {name: csr_matrix([getattr(row, name) for row in rows]).T for name in (*LENGTHS, "words")}

    def draw(self, size: int, chance: np.random.Generator) -> Sketch:
        times = chance.multinomial(size, np.full(POOL, 1 / POOL))
        fields: dict[str, Any] = {name: matrix @ times for name, matrix in self.lengths.items()}
        for name, labels in self.labels.items():
            fields[name] = Counter()
            for label, count in zip(labels, times.tolist(), strict=True):
                fields[name][label] += count
        return Sketch(size=size, **fields)


@pytest.fixture(scope="module")
def population() -> Shop:
    return Shop()


@given(counts, counts)
def test_divergence_is_scipys_square(p: list[int], q: list[int]) -> None:
    found = js_divergence(np.array(p), np.array(q))
    assert found == pytest.approx(jensenshannon(p, q, base=2) ** 2, abs=1e-9)
    assert 0 <= found <= 1 + 1e-12
    assert found == pytest.approx(js_divergence(np.array(q), np.array(p)), abs=1e-12)


@given(st.lists(st.integers(1, 50), min_size=6, max_size=6), st.lists(st.integers(1, 50), min_size=6, max_size=6))
def test_weighted_divergence_is_the_likelihood_ratio(p: list[int], q: list[int]) -> None:
    total = sum(p) + sum(q)
    wanted = chi2_contingency([p, q], lambda_="log-likelihood", correction=False).statistic
    found = js_divergence(np.array(p), np.array(q), weight=sum(p) / total)
    assert 2 * math.log(2) * total * found == pytest.approx(wanted, abs=1e-6)


@given(st.lists(st.integers(0, 9), min_size=4, max_size=60), st.lists(st.integers(0, 9), min_size=4, max_size=60))
def test_distance_of_histograms_is_that_of_samples(first: list[int], second: list[int]) -> None:
    found = ks(np.bincount(first, minlength=10), np.bincount(second, minlength=10))
    assert found == pytest.approx(ks_2samp(first, second, method="asymp").statistic)


@given(counts, counts)
def test_stability_index_and_variation_are_nought_only_where_shares_are_equal(p: list[int], q: list[int]) -> None:
    first, second = np.array(p), np.array(q)
    assert psi(first, first) == 0 == total_variation(first, first)
    assert psi(first, second) >= 0
    assert 0 <= total_variation(first, second) <= 1 + 1e-12
    assert total_variation(first, 3 * first) == pytest.approx(0, abs=1e-12)


def test_stability_index_of_a_known_shift() -> None:
    found = psi(np.array([50_000, 50_000]), np.array([60_000, 40_000]))
    assert found == pytest.approx(0.1 * math.log(1.2) - 0.1 * math.log(0.8), rel=1e-3)
    assert math.isfinite(psi(np.array([10, 0]), np.array([0, 10])))


def test_a_sketch_counts_conversations() -> None:
    rows = table(
        [
            record("Where is order 1042? where", intent="order", language="en", channel="web"),
            record("Refund 99 and order 2001!", intent="order", channel="web"),
        ]
    )
    found = Sketch.of(rows)
    assert found.size == 2
    assert found.intents == {"order": 2}
    assert found.languages == {"en": 1, "": 1}
    assert found.channels == {"web": 2}
    assert (found.characters.shape, found.messages.shape, found.words.shape) == ((BINS,), (BINS,), (BUCKETS,))
    assert found.characters.sum() == found.messages.sum() == 2
    assert found.words.sum() == 4 + 5  # where is order 0000 | refund 00 and order 0000
    assert (found.words == 2).sum() == 2


@pytest.mark.parametrize("cut", [0, 1, 700, POOL])
def test_sketches_of_parts_make_the_sketch_of_the_whole(cut: int) -> None:
    rows = table(shop())
    whole, parts = Sketch.of(rows), Sketch.of(rows[:cut]).merged(Sketch.of(rows[cut:]))
    assert parts.to_json() == whole.to_json()
    assert Sketch().merged(whole).to_json() == whole.to_json()
    assert Sketch.of(pa.concat_tables([rows[:cut], rows[cut:]])).to_json() == whole.to_json()


def test_a_sketch_survives_json_and_pickling_in_a_few_kb() -> None:
    found = Sketch.of(table(shop()))
    stored = json.dumps(found.to_json())
    assert len(stored) < 8_000
    assert Sketch.from_json(json.loads(stored)).to_json() == found.to_json()
    assert pickle.loads(pickle.dumps(found)).to_json() == found.to_json()
    assert "order" not in found.to_json()["words"]


def test_empty_batches_have_not_drifted() -> None:
    empty, full = Sketch.of(table([])), Sketch.of(table(shop()[:100]))
    assert empty.to_json() == Sketch().to_json()
    assert compare(empty, full) == compare(full, empty) == compare(empty, empty) == []


def test_a_batch_without_words_or_labels_can_be_compared() -> None:
    found = compare(Sketch.of(table([record("?")] * 300)), Sketch.of(table([record("!!")] * 300)))
    assert [drift.name for drift in found] == list(NAMES)
    assert json.loads(json.dumps([asdict(drift) for drift in found], allow_nan=False))
    assert {drift.name for drift in found if drift.drifted} == {"characters"}


@pytest.mark.parametrize(
    ("old", "new"),
    [(100, 100), (100, 1_000), (1_000, 100), (1_000, 1_000), (100, 100_000), (100_000, 100), (100_000, 100_000)],
)
def test_batches_of_the_same_kind_raise_few_false_alarms(population: Shop, old: int, new: int) -> None:
    """Of the statistics alone; the least effect would hide alarms of large batches."""
    rate, tries = 0.1, 150
    chance = np.random.default_rng(old + new)
    alarms: Counter[str] = Counter()
    for _ in range(tries):
        found = compare(population.draw(old, chance), population.draw(new, chance), rate)
        alarms.update({drift.name for drift in found if drift.statistic > drift.threshold} or {"none"})
    # Three standard deviations of a binomial above the rate: of all together, and of each alone.
    assert tries - alarms["none"] <= tries * rate + 3 * math.sqrt(tries * rate)
    each = rate / len(NAMES)
    assert max(alarms[name] for name in NAMES) <= tries * each + 3 * math.sqrt(tries * each)


def test_thresholds_fall_as_batches_grow_and_rise_as_alarms_must_be_rarer(population: Shop) -> None:
    chance = np.random.default_rng(1)
    small, large = population.draw(200, chance), population.draw(20_000, chance)
    of_small, of_large = by_name(compare(small, small)), by_name(compare(large, large))
    assert of_large["characters"].threshold < of_small["characters"].threshold / 5
    rare = by_name(compare(small, small, 0.0001))
    assert all(rare[name].threshold > of_small[name].threshold for name in NAMES)
    assert not any(drift.drifted for drift in compare(small, large, 0.0))


def test_huge_batches_do_not_drift_for_nothing(population: Shop) -> None:
    old = population.draw(1_000_000, np.random.default_rng(1))
    intents = Counter(old.intents)
    (most, _), (second, _) = old.intents.most_common(2)
    intents[most] -= 20_000
    intents[second] += 20_000
    found = by_name(compare(old, replace(old, intents=intents)))["intents"]
    assert found.statistic > found.threshold
    assert found.effect == pytest.approx(0.02)
    assert not found.drifted


def every(step: int, records: Sequence[dict[str, Any]], **changes: Any) -> list[dict[str, Any]]:
    """The records, each `step`-th one changed."""
    return [record | changes if at % step == 0 else record for at, record in enumerate(records)]


def spoken(records: Sequence[dict[str, Any]], change: Callable[[str], str]) -> list[dict[str, Any]]:
    """The records with all texts changed."""
    return [
        record | {"messages": [message | {"content": change(message["content"])} for message in record["messages"]]}
        for record in records
    ]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("intents", lambda rows: every(10, rows, intent="refund")),
        ("intents", lambda rows: every(10, rows, intent=None)),
        ("channels", lambda rows: every(10, rows, channel="kiosk")),
        ("languages", lambda rows: every(10, rows, language="de")),
        ("characters", lambda rows: spoken(rows, lambda text: text + text[: len(text) * 3 // 10])),
        ("messages", lambda rows: [row | {"messages": row["messages"] * (1 + at % 2)} for at, row in enumerate(rows)]),
        ("words", lambda rows: spoken(rows, lambda text: text.replace("order", "hoverboard"))),
    ],
    ids=["intents", "unlabelled", "channels", "languages", "longer texts", "more messages", "a word for another"],
)
def test_a_shift_is_found_in_a_thousand_conversations(
    name: str, change: Callable[[Sequence[dict[str, Any]]], list[dict[str, Any]]]
) -> None:
    old, new = shop()[:1_000], shop()[1_000:2_000]
    assert drifted(old, new) == set()
    assert name in drifted(old, change(new))


def test_a_new_product_is_found_in_a_thousand_conversations() -> None:
    """It is spoken of in every thirtieth."""
    old, new = shop()[:1_000], shop()[1_000:2_000]
    asked = every(30, new, messages=[{"role": "user", "content": "Does the hoverboard need new firmware?"}])
    found = by_name(compare(Sketch.of(table(old)), Sketch.of(table(asked))))["words"]
    assert found.drifted
    assert found.effect == pytest.approx(1 / 30, abs=0.01)
    assert new_word_share(Sketch.of(table(old)), Sketch.of(table(asked))) > new_word_share(
        Sketch.of(table(old)), Sketch.of(table(new))
    )


def test_order_numbers_are_no_new_words() -> None:
    old = [record(f"where is order {at:05}") for at in range(500)]
    new = [record(f"where is order {90_000 + at}") for at in range(500)]
    assert drifted(old, new) == set()
    assert new_word_share(Sketch.of(table(old)), Sketch.of(table(new))) == 0
