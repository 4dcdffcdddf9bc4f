import dataclasses
import json
import pickle
import string
import time
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.conversation import MESSAGES, normalised
from app.ingestion import anomalies
from app.ingestion.anomalies import FEATURES, Baseline, mojibake, repaired
from app.ingestion.sample import DEFECT_KINDS, defect, lines

RECORDS, SEED = 6_000, 7
THRESHOLD = 12.0

# Sentences with the marks that their languages write; none was misread.
SOUND = [
    "Où est ma commande n° 1042 ? « Déjà expédiée », paraît-il… Ça coûte 20 €, c’est trop.",
    "Könnten Sie bitte nachsehen? Macht das Spaß… „Größe M“ – 20 €, Straße 5",
    "¿Dónde está mi pedido? ¡Gracias! Sr. Núñez, año 2025, 30º",
    "A encomenda não chegou à minha mãe; três dias é demais. “Olá”, informações, atenção!",
    "Dov'è il mio ordine? È già partito? Perché così tardi…",
    "Waar is mijn bestelling? Eén paar schoenen, geïnteresseerd – €20",
    "Gdzie jest moje zamówienie? Źle, że tak późno. „Dziękuję” — łódź",
    "Где мой заказ? Жду уже две недели…",
    "Πού είναι η παραγγελία μου;",
    "איפה ההזמנה שלי?",
    "أين طلبي؟",
    "我的订单在哪里?",
    "注文はどこですか。ありがとう!",
    "ÄRGER! GRÖSSE ÜBERPRÜFEN… CAFÉ™ À LA CARTE",
    "Thanks 👍🏽 – it’s great… “really” £20 © 2025 ½ price, 20 °C ± 1",
    "naïve façade, jalapeño, Zoë’s piñata",
    "line one\nline two\tand a tab\r\nthe end\x0bpage\x0c",
]


def spoken(*texts: str) -> list[dict[str, Any]]:
    roles = ("user", "assistant")
    return [{"role": roles[at % 2], "content": text} for at, text in enumerate(texts)]


def features(conversations: Sequence[Sequence[dict[str, Any]]]) -> np.ndarray:
    return anomalies.features(pa.array(conversations, MESSAGES))


def row(*texts: str) -> dict[str, float]:
    return dict(zip(FEATURES, features([spoken(*texts)])[0].tolist(), strict=True))


@cache
def shop() -> tuple[list[list[dict[str, Any]]], list[str | None]]:
    """The conversations that other rules let through, as they are before normalisation, and their defects."""
    found, kinds = [], []
    for position, line in enumerate(lines(SEED, 0, RECORDS, 0.05)):
        planted = defect(SEED, position, 0.05)
        try:
            messages = json.loads(line).get("messages") or [{}]
        except ValueError:
            continue
        if all(len(m) >= 2 and "role" in m and m["content"].strip() and len(m["content"]) <= 4_000 for m in messages):
            found.append(messages)
            kinds.append(planted.kind if planted else None)
    return found, kinds


@cache
def shop_features() -> np.ndarray:
    conversations = [[{"content": normalised(m["content"])} for m in messages] for messages in shop()[0]]
    return features(conversations)


def of_kind(kind: str | None) -> np.ndarray:
    assert kind is None or kind in DEFECT_KINDS
    return np.array([found == kind for found in shop()[1]])


def test_features_are_what_their_names_say() -> None:
    found = row("Hello hello hello 42!", "Größe?")
    assert found["characters"] == pytest.approx(np.log1p(28))
    assert found["messages"] == pytest.approx(np.log1p(2))
    assert found["words_per_message"] == pytest.approx(np.log1p(2.5))
    assert found["longest_message"] == pytest.approx(np.log1p(21))
    assert found["longest_word"] == pytest.approx(np.log1p(6))
    assert found["letters"] == pytest.approx(20 / 28)
    assert found["digits"] == pytest.approx(2 / 28)
    assert found["upper_case"] == pytest.approx(2 / 28)
    assert found["punctuation"] == pytest.approx(2 / 28)
    assert found["non_ascii"] == pytest.approx(2 / 28)
    assert found["repetition"] == pytest.approx(1 / 15)
    assert found["distinct_words"] == pytest.approx(np.log(5) / np.log(6))


@given(st.lists(st.lists(st.text(), min_size=1, max_size=4), max_size=5))
def test_any_text_has_finite_features(conversations: list[list[str]]) -> None:
    found = features([spoken(*texts) for texts in conversations])
    assert found.shape == (len(conversations), len(FEATURES))
    assert found.dtype == np.float32
    assert np.isfinite(found).all()
    assert (found >= 0).all()


def test_features_of_a_part_are_those_of_the_whole_and_a_row_without_messages_has_some() -> None:
    whole = pa.array([spoken("hello", "hi"), None, spoken("Where is my order?"), []], MESSAGES)
    assert (anomalies.features(whole[2:3]) == anomalies.features(whole)[2:3]).all()
    assert (anomalies.features(whole)[1] == anomalies.features(whole)[3]).all()


def test_shares_of_characters_count_those_of_a_slow_count() -> None:
    text = string.printable + "äöü€漢字😀" * 3
    found = row(text)
    assert found["letters"] == pytest.approx((52 + 21) / len(text))
    assert found["punctuation"] == pytest.approx(sum(c in string.punctuation for c in text) / len(text))
    assert found["non_ascii"] == pytest.approx(21 / len(text))


def test_faultless_conversations_are_not_flagged_and_one_word_300_times_always_is() -> None:
    found = shop_features()
    scores = Baseline.fit(found[:2_000]).scores(found)
    assert scores.dtype == np.float32
    assert (scores[of_kind(None)] > 8.0).mean() < 0.0005
    assert of_kind("outlier").sum() >= 8
    assert (scores[of_kind("outlier")] > 2 * THRESHOLD).all()


@pytest.mark.parametrize(
    "change",
    [
        lambda text: " ".join([text] * 20),
        lambda text: "QUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVphYmNkZWY" * 8,
        lambda text: "".join(f'<div class="c{at}">{word}</div>' for at, word in enumerate((text * 5).split())),
        lambda text: "0123456789" * 30,
        lambda text: "Ъ" + "где мой заказ " * 20,
        lambda text: "!?" * 200,
    ],
    ids=["repeated", "base64", "markup", "digits", "another script", "punctuation"],
)
def test_what_is_no_customers_text_is_flagged(change: Any) -> None:
    usual = Baseline.fit(shop_features()[of_kind(None)][:2_000])
    sound = [messages for messages, kind in zip(*shop(), strict=True) if kind is None][2_000:2_200]
    changed = [[messages[0] | {"content": change(messages[0]["content"])}, *messages[1:2]] for messages in sound]
    assert (usual.scores(features(changed)) > THRESHOLD).mean() > 0.9


def test_a_combination_is_flagged_whose_parts_are_usual() -> None:
    draw = np.random.default_rng(3)
    sample = np.zeros((2_000, len(FEATURES)))
    sample[:, 0] = draw.normal(5, 1, 2_000)
    sample[:, 3] = sample[:, 0] - 1 + draw.normal(0, 0.05, 2_000)
    usual = Baseline.fit(sample.astype(np.float32))
    together, apart = sample[:1].copy(), sample[:1].copy()
    together[0, [0, 3]] = 8, 7
    apart[0, [0, 3]] = 8, 1
    assert usual.parts(together)["distance"][0] < 4
    assert usual.parts(apart)["distance"][0] > 2 * usual.parts(together)["distance"][0]
    assert usual.scores(apart)[0] > usual.scores(together)[0]


def test_a_forest_isolates_what_is_a_little_unusual_in_many_ways() -> None:
    sample = np.random.default_rng(5).normal(0, 1, (3_000, len(FEATURES))).astype(np.float32)
    usual = Baseline.fit(sample)
    odd = np.full((1, len(FEATURES)), 3, np.float32)
    assert usual.parts(odd)["feature"][0] < 4
    assert usual.parts(odd)["forest"][0] > usual.parts(sample)["forest"].max()


def test_twenty_thousand_conversations_are_scored_in_about_a_second() -> None:
    usual = Baseline.fit(shop_features()[:5_000])
    many = np.resize(shop_features(), (20_000, len(FEATURES)))
    start = time.process_time()
    usual.scores(many)
    assert time.process_time() - start < 2
    assert len(pickle.dumps(usual)) < 8 << 20


def test_the_forest_counts_as_much_as_it_is_told_to() -> None:
    found = shop_features()[:1_000]
    light, heavy = (Baseline.fit(found, weight).parts(found) for weight in (1.0, 3.0))
    assert heavy["forest"] == pytest.approx(3 * light["forest"])
    assert (heavy["distance"] == light["distance"]).all()


def test_scores_do_not_depend_on_anomalies_in_the_history() -> None:
    sound, odd = shop_features()[of_kind(None)][:3_000], shop_features()[of_kind("outlier")]
    spoiled = np.concatenate([sound, odd[np.arange(15) % len(odd)]])  # five per mille
    assert (Baseline.fit(spoiled).scores(odd) > THRESHOLD).all()


def test_a_history_in_which_all_are_alike_leaves_room_for_others() -> None:
    usual = Baseline.fit(features([spoken("Where is my order?", "It is on its way.")] * 200))
    assert usual.scores(features([spoken("When does my parcel come?", "It is there tomorrow.")]))[0] < THRESHOLD
    assert usual.scores(features([spoken("order " * 300, "It is on its way.")]))[0] > THRESHOLD


def test_a_baseline_of_one_conversation_can_be_made() -> None:
    one = features([spoken("hello")])
    assert Baseline.fit(one).scores(one)[0] < 1
    assert Baseline.fit(one).scores(one[:0]).shape == (0,)


def test_the_reason_names_what_stands_out_first() -> None:
    usual = Baseline.fit(shop_features()[:2_000])
    loud = features([spoken("WHERE IS MY ORDER? I WANT TO RETURN THE LAMP!", "IT ARRIVES TOMORROW.")])[0]
    repeated = features([spoken("refund " * 300, "It is on its way.")])[0]
    assert usual.reason(loud).startswith("upper_case +")
    assert usual.reason(repeated).startswith("repetition +")


def test_a_baseline_is_deterministic_survives_pickling_and_sums_itself_up_for_json() -> None:
    found = shop_features()[:1_000]
    usual = Baseline.fit(found)
    assert (Baseline.fit(found).scores(found) == usual.scores(found)).all()
    assert (pickle.loads(pickle.dumps(usual)).scores(found) == usual.scores(found)).all()
    summary = json.loads(json.dumps(usual.summary()))
    assert summary["conversations"] == 1_000
    assert tuple(summary["median"]) == FEATURES
    assert dataclasses.is_dataclass(usual)


def test_mojibake_is_found_in_the_shop_and_nothing_else_is_taken_for_it() -> None:
    hits = np.array([any(mojibake(m["content"]) for m in messages) for messages in shop()[0]])
    assert not hits[of_kind(None)].any()
    assert of_kind("mojibake").sum() > 20
    assert hits[of_kind("mojibake")].mean() >= 0.98  # vertical tabs and form feeds alone are white space


@pytest.mark.parametrize("text", SOUND)
def test_what_was_read_rightly_is_no_mojibake_and_stays_as_it_is(text: str) -> None:
    assert not mojibake(text)
    assert repaired(text) == text


@pytest.mark.parametrize("codec", ["cp1252", "latin-1"])
@pytest.mark.parametrize("text", [text for text in SOUND if not text.isascii()])
def test_what_was_misread_is_found_and_repaired(text: str, codec: str) -> None:
    misread = misreading(text, codec)
    assert mojibake(misread)
    assert repaired(misread) == text
    assert repaired(misreading(misread, codec)) == text


def misreading(text: str, codec: str) -> str:
    """UTF-8 read as another character set, as browsers do it: bytes that it lacks become C1 controls."""
    return "".join(bytes([byte]).decode(codec, "ignore") or chr(byte) for byte in text.encode())


def test_a_misread_part_is_found_beside_a_part_that_is_right() -> None:
    assert repaired("Zoë’s cafÃ© â€“ 漢字") == "Zoë’s café – 漢字"


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("my na\x00me", "my name"),
        ("it\x92s \x93late\x94 \x85", "it’s “late” …"),
        ("caf\ufffd", "caf\ufffd"),
        ("\x1b[31mred", "[31mred"),
    ],
)
def test_control_and_replacement_characters_are_mojibake(text: str, meant: str) -> None:
    assert mojibake(text)
    assert repaired(text) == meant


@given(st.text(alphabet=st.one_of(st.sampled_from("Ãâ€™\x80\x9dÂÐ¸é漢😀 a\x00\ufffd"), st.characters(codec="utf-8"))))
def test_what_was_repaired_is_no_mojibake(text: str) -> None:
    again = repaired(text)
    assert "\ufffd" in again or not mojibake(again)
    assert repaired(again) == again
    assert mojibake(text) or again == text
