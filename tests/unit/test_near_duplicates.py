import random
import re
from itertools import combinations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.conversation import SIGNATURE_BYTES
from app.ingestion import signatures as kernels
from app.ingestion.near_duplicates import BANDS, band_keys, bins_a_band, losing, pairs
from app.ingestion.near_duplicates import similarity as estimated
from app.ingestion.signatures import matrix, shingles, signatures

THRESHOLD = 0.8
VOCABULARY = [f"word{number}" for number in range(5_000)]


def signed(*texts: str | None) -> np.ndarray:
    return signatures(pa.array(texts, pa.string()))


def grams(text: str) -> set[tuple[str, ...]]:
    """The word 3-grams of a text, the slow way."""
    words = ["", "", *re.findall(r"[\w']+", text.lower()), "", ""]
    return set(zip(words, words[1:], words[2:], strict=False)) if len(words) > 4 else set()


def jaccard(first: str, second: str) -> float:
    here, there = grams(first), grams(second)
    return len(here & there) / max(1, len(here | there))


def near_pairs(count: int, words: int, seed: int, least: float = 0.55, most: float = 1.0) -> list[tuple[str, str]]:
    """Texts beside the same ones with some words replaced."""
    draw = random.Random(seed)
    found = []
    while len(found) < count:
        text = draw.choices(VOCABULARY, k=words)
        target, other = draw.uniform(least, most), list(text)
        while jaccard(" ".join(text), " ".join(other)) > target:
            other[draw.randrange(words)] = draw.choice(VOCABULARY)
        found.append((" ".join(text), " ".join(other)))
    return found


def edges_of(signatures: np.ndarray, held: int = 0, threshold: float = THRESHOLD) -> set[tuple[int, int]]:
    found = [pairs(band_keys(signatures, threshold, band), signatures, threshold, held) for band in range(BANDS)]
    return {(int(left), int(right)) for left, right in np.concatenate(found)}


# 3-grams and signatures


@pytest.mark.parametrize(
    "text", ["one two three one two three one", "", "Hello", "a b", "x y z", "...", "it's the end of_it all", "née Ö"]
)
def test_shingles_are_as_many_as_the_distinct_3_grams_of_a_slow_count(text: str) -> None:
    assert len(set(shingles(text).tolist())) == len(grams(text))


@settings(deadline=None)
@given(st.lists(st.text(st.characters(max_codepoint=127)), max_size=5))
def test_ascii_texts_have_the_signature_that_they_have_beside_others(texts: list[str]) -> None:
    column = pa.array(["first", *texts], pa.string())[1:]
    slowly = kernels._signed(*kernels._shingles(*kernels._words(column)))
    assert (signatures(column) == slowly).all()


def test_a_texts_signature_does_not_depend_on_its_neighbours_or_on_letter_case() -> None:
    texts = [first for first, _ in near_pairs(30, 20, seed=1)]
    whole = signed(*texts, "", None)
    assert whole.shape == (32, SIGNATURE_BYTES)
    assert whole.dtype == np.uint8
    for place, text in enumerate(texts):
        assert (signed(text.upper())[0] == whole[place]).all()
    assert not whole[30:].any()
    assert (signatures(pa.array(["skipped", *texts])[1:]) == whole[:30]).all()


def test_a_signature_is_the_same_on_every_machine() -> None:
    filled = {place: int(value) for place, value in enumerate(signed("Where is my order 1042?")[0]) if value}
    assert filled == {2: 4, 23: 16, 34: 64, 35: 48, 61: 12, 86: 3, 106: 1}


@pytest.mark.parametrize(("words", "spread"), [(12, 0.05), (50, 0.03), (100, 0.03), (400, 0.03), (800, 0.04)])
def test_the_estimate_is_near_the_jaccard_similarity_and_unbiased(words: int, spread: float) -> None:
    found = near_pairs(150 if words < 200 else 30, words, seed=words)
    exact = np.array([jaccard(*pair) for pair in found])
    error = estimated(signed(*(pair[0] for pair in found)), signed(*(pair[1] for pair in found))) - exact
    assert error.std() < spread
    assert abs(error.mean()) < 0.008


def test_texts_that_have_nothing_in_common_are_not_similar_however_short_they_are() -> None:
    draw = random.Random(5)
    texts = [" ".join(draw.sample(VOCABULARY, draw.randrange(1, 4))) for _ in range(400)]
    found = signed(*dict.fromkeys(texts))
    left, right = np.array(list(combinations(range(len(found)), 2))).T
    assert estimated(found[left], found[right]).max() < THRESHOLD


def test_a_text_is_as_similar_as_can_be_to_itself_and_one_without_words_to_none() -> None:
    found = signed("hello", "Where is my order?", "", "!?")
    assert estimated(found, found).tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize(
    "sentence",
    [
        "我的订单在哪里？已经等了两个星期了，请尽快帮我查一下物流信息。",
        "注文した商品がまだ届きません。いつ届くか教えていただけますか。",
        "주문한 상품이 아직 도착하지 않았습니다. 언제 도착하는지 알려 주세요.",
        "สินค้าที่สั่งยังไม่มาถึง ช่วยตรวจสอบให้หน่อยได้ไหม",
        "Где мой заказ? Я жду уже две недели, проверьте, пожалуйста, где он находится.",
        "أين طلبي؟ أنتظر منذ أسبوعين، من فضلك تحقق من مكانه الآن.",
        "Πού είναι η παραγγελία μου; Περιμένω δύο εβδομάδες, ελέγξτε παρακαλώ.",
    ],
)
def test_any_script_has_words_to_be_compared(sentence: str) -> None:
    other = "Where is my order? I have been waiting for two weeks, please check it."
    found = signed(sentence * 3, sentence * 3 + " ok", other * 3)
    assert 0.6 < estimated(found[:1], found[1:2])[0] < 1
    assert estimated(found[:1], found[2:])[0] < 0.2


@settings(deadline=None, max_examples=50)
@given(st.lists(st.one_of(st.none(), st.text()), max_size=6))
def test_any_text_has_a_signature(texts: list[str | None]) -> None:
    found = signed(*texts)
    assert found.shape == (len(texts), SIGNATURE_BYTES)
    assert len(edges_of(found)) <= len(texts) ** 2


def test_a_column_of_signatures_is_read_back() -> None:
    made = signed("one two three four", "five six seven", "eight")
    column = pa.chunked_array([pa.array([bytes(row) for row in made], pa.binary(SIGNATURE_BYTES))[1:], []])
    assert (matrix(column) == made[1:]).all()
    assert matrix(pa.chunked_array([], pa.binary(SIGNATURE_BYTES))).shape == (0, SIGNATURE_BYTES)


# Bands and pairs


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.8, 0.9, 0.99])
def test_the_higher_the_threshold_the_more_a_band_asks_for(threshold: float) -> None:
    assert 1 <= bins_a_band(threshold) <= bins_a_band(min(1.0, threshold + 0.1)) <= 16


@pytest.mark.parametrize("words", [30, 100, 500])
def test_pairs_that_are_similar_meet_in_a_band(words: int) -> None:
    found = near_pairs(200 if words < 200 else 100, words, seed=words, least=THRESHOLD, most=0.9)
    rows = signed(*(text for pair in found for text in pair))
    close = {
        (2 * place, 2 * place + 1) for place, near in enumerate(estimated(rows[::2], rows[1::2]) >= THRESHOLD) if near
    }
    assert len(close) > 0.3 * len(found)
    assert len(close & edges_of(rows)) >= 0.98 * len(close)


def test_only_similar_rows_are_a_pair() -> None:
    texts = [text for pair in near_pairs(100, 60, seed=9) for text in pair]
    rows = signed(*texts)
    found = edges_of(rows)
    right = {
        pair for pair in combinations(range(len(texts)), 2) if jaccard(texts[pair[0]], texts[pair[1]]) >= THRESHOLD
    }
    assert len(right) > 20
    assert 2 * len(found & right) / (len(found) + len(right)) > 0.93
    assert all(jaccard(texts[left], texts[right]) > THRESHOLD - 0.1 for left, right in found)


def test_rows_of_a_crowded_bucket_are_still_tied_together() -> None:
    rows = np.concatenate([signed("Where is my order?").repeat(500, axis=0), signed("hello there you all")])
    found = np.array(sorted(edges_of(rows)))
    assert losing(found, np.arange(501)).tolist() == list(range(1, 500))


def test_held_rows_are_compared_with_new_ones_only() -> None:
    rows = signed(*["Where is my order?"] * 3, "Is it you?", *["Where is my order?"] * 2)
    assert edges_of(rows, held=4) == {(0, 4), (1, 4), (2, 4), (0, 5), (1, 5), (2, 5), (4, 5)}
    assert edges_of(rows, held=6) == set()
    assert edges_of(rows[:0]) == set()


@pytest.mark.parametrize("seed", range(5))
def test_in_two_batches_the_same_pairs_are_found_as_at_once(seed: int) -> None:
    draw = random.Random(seed)
    texts = [text for pair in near_pairs(60, 25, seed=seed, least=0.75) for text in pair]
    draw.shuffle(texts)
    rows = signed(*texts)
    half = draw.randrange(20, 100)
    first = edges_of(rows[:half])
    second = edges_of(rows, held=half)
    assert all(right >= half for _, right in second)
    assert first | second == edges_of(rows)


# Which of them stay


def test_the_best_of_a_cluster_stays() -> None:
    edges = np.array([[0, 1], [1, 2], [0, 2], [3, 4]])
    assert losing(edges, np.array([2, 0, 1, 4, 3])).tolist() == [0, 2, 3]


def test_of_a_chain_not_all_but_one_go() -> None:
    edges = np.array([[place, place + 1] for place in range(6)])
    assert losing(edges, np.arange(7)).tolist() == [1, 3, 5]


def test_without_pairs_none_goes() -> None:
    assert losing(np.empty((0, 2), np.int64), np.arange(3)).tolist() == []


@given(st.integers(2, 12).flatmap(lambda count: st.tuples(
    st.permutations(range(count)),
    st.sets(st.tuples(st.integers(0, count - 1), st.integers(0, count - 1)).filter(lambda pair: pair[0] < pair[1])),
)))  # fmt: skip
def test_who_goes_is_like_a_better_one_that_stays_and_those_that_stay_are_unlike(
    drawn: tuple[list[int], set[tuple[int, int]]],
) -> None:
    rank, edges = drawn
    gone = set(losing(np.array(sorted(edges), np.int64).reshape(-1, 2), np.array(rank)).tolist())
    for left, right in edges:
        assert left in gone or right in gone
    for row in gone:
        others = {left + right - row for left, right in edges if row in (left, right)}
        assert any(other not in gone and rank[other] < rank[row] for other in others)
