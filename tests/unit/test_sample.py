import hashlib
import ipaddress
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from datetime import datetime
from difflib import SequenceMatcher
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import RidgeClassifier
from sklearn.pipeline import make_pipeline

from app.ingestion import sample
from app.ingestion.sample_personal import ALIKE, PLANTED, UNSEEN, personal
from app.ingestion.sample_phrases import GREETING, THANKS, TOPICS

SEED = 7
FIRST_THOUSAND = "1a577bbf33a401d7e5403a0e9d17856ea2d6ee409ba6a9a3611d0cfbbc710ec8"

fractions = st.floats(0, 1)
positions = st.integers(0, 10**9)
seeds = st.integers(-(2**40), 2**40)


@pytest.fixture(scope="module")
def clean() -> list[dict[str, Any]]:
    return [json.loads(line) for line in sample.lines(SEED, 0, 5_000, 0.0)]


@pytest.fixture(scope="module")
def planted() -> dict[sample.DefectKind, list[sample.Defect]]:
    by_kind: dict[sample.DefectKind, list[sample.Defect]] = {kind: [] for kind in sample.DEFECT_KINDS}
    for position in range(3_000):
        if found := sample.defect(SEED, position, 0.3):
            by_kind[found.kind].append(found)
    return by_kind


def spoilt(found: sample.Defect) -> bytes:
    return sample.line(SEED, found.position, 0.3)


def faultless(position: int) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(sample.line(SEED, position, 0.0))
    return record


def questions(record: dict[str, Any]) -> list[str]:
    return [message["content"] for message in record["messages"][::2]]


def replies(record: dict[str, Any]) -> list[str]:
    return [message["content"] for message in record["messages"][1::2]]


def plain(text: str) -> str:
    """Letters and digits alone, every number the same."""
    return " ".join(re.sub(r"\d+", "0", re.sub(r"[^\w ]", "", text.lower())).split())


# The same bytes, always


def test_first_thousand_lines_are_frozen() -> None:
    digest = hashlib.sha256(b"\n".join(sample.lines(SEED, 0, 1_000, 0.05))).hexdigest()
    assert digest == FIRST_THOUSAND


def test_bytes_do_not_depend_on_the_hash_seed_of_the_process() -> None:
    command = (
        "import hashlib; from app.ingestion.sample import lines;"
        "print(hashlib.sha256(b'\\n'.join(lines(7, 0, 1_000, 0.05))).hexdigest())"
    )
    environment = os.environ | {"PYTHONHASHSEED": "3", "LC_ALL": "C", "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == FIRST_THOUSAND


@given(seeds, positions, fractions)
def test_a_line_is_a_pure_function(seed: int, position: int, fraction: float) -> None:
    once = sample.line(seed, position, fraction)
    sample.line(seed + 1, position + 1, fraction)
    assert sample.line(seed, position, fraction) == once
    assert b"\n" not in once


@given(seeds, st.integers(0, 10**9), st.lists(st.integers(0, 8), min_size=1, max_size=4), fractions)
def test_lines_do_not_depend_on_the_chunks(seed: int, start: int, sizes: list[int], fraction: float) -> None:
    whole = list(sample.lines(seed, start, start + sum(sizes), fraction))
    chunks = []
    for size in sizes:
        chunks += list(sample.lines(seed, start, start + size, fraction))
        start += size
    assert chunks == whole


@given(seeds, positions, fractions)
def test_a_faultless_record_is_the_same_whatever_the_share_of_defects(
    seed: int, position: int, fraction: float
) -> None:
    if sample.defect(seed, position, fraction) is None:
        assert sample.line(seed, position, fraction) == sample.line(seed, position, 0.0)


def test_another_seed_gives_other_conversations() -> None:
    here = {tuple(questions(faultless(position))) for position in range(200)}
    there = {tuple(questions(json.loads(line))) for line in sample.lines(SEED + 1, 0, 200, 0.0)}
    assert len(here & there) < 10


# Faultless conversations


def test_clean_records_have_the_shape_of_a_conversation(clean: list[dict[str, Any]]) -> None:
    for position, record in enumerate(clean):
        assert list(record) == ["conversation_id", "channel", "language", "started_at", "messages"]
        assert record["conversation_id"] == f"shop-{position:08d}"
        assert record["channel"] in sample.CHANNELS
        assert record["language"] == "en"
        assert 1 <= len(record["messages"]) / 2 <= 6
        for question, reply in zip(record["messages"][::2], record["messages"][1::2], strict=True):
            assert list(question) == ["role", "content", "intent"]
            assert list(reply) == ["role", "content"]
            assert (question["role"], reply["role"]) == ("user", "assistant")
            assert question["intent"] in sample.INTENTS
            assert question["content"].strip() == question["content"] != ""
            assert reply["content"].strip() == reply["content"] != ""


def test_every_intent_channel_and_number_of_turns_is_present(clean: list[dict[str, Any]]) -> None:
    intents = Counter(message["intent"] for record in clean for message in record["messages"][::2])
    assert len(sample.INTENTS) >= 28
    assert set(intents) == set(sample.INTENTS)
    assert min(intents.values()) >= 50
    assert {record["channel"] for record in clean} == set(sample.CHANNELS)
    assert {len(record["messages"]) // 2 for record in clean} == {1, 2, 3, 4, 5, 6}


def test_conversations_start_in_2025_and_mostly_by_day(clean: list[dict[str, Any]]) -> None:
    times = [datetime.strptime(record["started_at"], "%Y-%m-%dT%H:%M:%SZ") for record in clean]
    assert {time.year for time in times} == {2025}
    assert {time.month for time in times} == set(range(1, 13))
    assert sum(time.hour < 6 for time in times) < 0.05 * len(times)


def test_conversations_are_mostly_distinct(clean: list[dict[str, Any]]) -> None:
    distinct = {tuple(message["content"] for message in record["messages"]) for record in clean}
    assert len(distinct) > 0.97 * len(clean)


def test_messages_are_short(clean: list[dict[str, Any]]) -> None:
    said = [len(text.split()) for record in clean for text in questions(record)]
    answered = [len(text.split()) for record in clean for text in replies(record)]
    assert max(said) <= 35
    assert 5 <= sum(said) / len(said) <= 12
    assert min(answered) >= 6
    assert max(answered) <= 25


def test_no_text_is_left_unfilled(clean: list[dict[str, Any]]) -> None:
    for record in clean:
        for message in record["messages"]:
            assert not re.search(r"[][{}|<>]|  | [,.?]", message["content"]), message["content"]


def test_a_question_belongs_to_one_intent(clean: list[dict[str, Any]]) -> None:
    intents: dict[str, set[str]] = {}
    for record in clean:
        for message in record["messages"][::2]:
            intents.setdefault(plain(message["content"]), set()).add(message["intent"])
    assert {text: labels for text, labels in intents.items() if len(labels) > 1} == {}


def test_a_reply_belongs_to_one_intent(clean: list[dict[str, Any]]) -> None:
    intents: dict[str, set[str]] = {}
    for record in clean:
        for question, reply in zip(record["messages"][::2], record["messages"][1::2], strict=True):
            intents.setdefault(plain(reply["content"]), set()).add(question["intent"])
    assert {text: labels for text, labels in intents.items() if len(labels) > 1} == {}


def test_a_reply_never_invents_a_number(clean: list[dict[str, Any]]) -> None:
    for record in clean:
        known: set[str] = set()
        for question, reply in zip(questions(record), replies(record), strict=True):
            known |= set(re.findall(r"\d+", question))
            assert set(re.findall(r"\d+", reply)) <= known, reply


@pytest.mark.parametrize("intent", [GREETING, THANKS, *TOPICS], ids=lambda intent: intent.label)
def test_a_reply_repeats_only_what_the_customer_named(intent: Any) -> None:
    def slots(phrase: str) -> set[str]:
        return set(re.findall(r"\{(\w+)\}", phrase)) - {"weekday"}

    for exchange in (*intent.openings, *intent.unnumbered):
        for reply in exchange.replies:
            assert all(slots(reply) <= slots(ask) for ask in exchange.asks), reply
    named = set.intersection(*(slots(ask) for exchange in intent.openings for ask in exchange.asks))
    for exchange in intent.later:
        assert all(slots(reply) <= named for reply in exchange.replies), exchange
    for exchange in intent.number:
        assert all(slots(ask) == {"order"} for ask in exchange.asks)
        assert {slot for reply in intent.openings[0].replies for slot in slots(reply)} == {"order"}


def test_topics_lead_to_topics() -> None:
    labels = {topic.label for topic in TOPICS}
    assert {label for topic in TOPICS for label in topic.leads_to} <= labels


@pytest.mark.parametrize(
    "question",
    [
        "where is my order 0",
        "where is order 0",
        "i want my money back for order 0",
        "hello",
        "how do i reset my password",
        "where is my order",
        "can i talk to a human",
    ],
)
def test_common_questions_come_in_several_spellings(question: str, clean: list[dict[str, Any]]) -> None:
    asked = [text for record in clean for text in questions(record)]
    spellings = {re.sub(r"\d+", "0", text) for text in asked if plain(text) == question}
    assert any(text == text.lower() for text in spellings)
    assert any(text[0].isupper() for text in spellings)


def test_customers_mistype_and_the_assistant_does_not(clean: list[dict[str, Any]]) -> None:
    def words(texts: list[str]) -> Counter[str]:
        return Counter(word for text in texts for word in plain(text).split())

    said = words([text for record in clean for text in questions(record)])
    answered = words([text for record in clean for text in replies(record)])
    assert sum(count == 1 for count in said.values()) > 300
    assert [word for word, count in answered.items() if count < 5] == []


def test_clean_records_hold_no_personal_data(clean: list[dict[str, Any]]) -> None:
    for record in clean:
        for text in questions(record):
            assert not re.search(r"@|\d{7}|\d+\.\d+\.\d+|\+\d|\d \d", text), text


def test_intent_is_recognised_from_the_reply(clean: list[dict[str, Any]]) -> None:
    def pairs(records: list[dict[str, Any]]) -> tuple[list[str], list[str]]:
        texts = [text for record in records for text in replies(record)]
        return texts, [message["intent"] for record in records for message in record["messages"][::2]]

    classifier = make_pipeline(TfidfVectorizer(ngram_range=(1, 2)), RidgeClassifier())
    classifier.fit(*pairs(clean[:1_500]))
    assert classifier.score(*pairs(clean[3_000:])) > 0.97


# Defects


def test_defects_come_at_their_rate_and_evenly() -> None:
    found = [sample.defect(SEED, position, 0.05) for position in range(40_000)]
    kinds = Counter(defect.kind for defect in found if defect)
    assert kinds.total() == pytest.approx(2_000, rel=0.1)
    assert set(kinds) == set(sample.DEFECT_KINDS)
    assert all(count == pytest.approx(200, rel=0.3) for count in kinds.values()), kinds


@given(seeds, positions)
def test_no_share_gives_no_defect_and_the_whole_share_nothing_else(seed: int, position: int) -> None:
    assert sample.defect(seed, position, 0.0) is None
    found = sample.defect(seed, position, 1.0)
    assert found is not None
    assert found.of is None


@given(seeds, positions, fractions)
def test_a_copy_is_of_an_earlier_faultless_record(seed: int, position: int, fraction: float) -> None:
    found = sample.defect(seed, position, fraction)
    if found and found.of is not None:
        assert found.position == position
        assert 0 <= found.of < position
        assert sample.defect(seed, found.of, fraction) is None


def test_only_copies_have_an_original(planted: dict[sample.DefectKind, list[sample.Defect]]) -> None:
    with_original = {kind for kind, found in planted.items() if any(one.of is not None for one in found)}
    assert with_original == {"exact_duplicate", "near_duplicate", "contradictory_label"}


def test_exact_duplicate_repeats_the_messages(planted: dict[sample.DefectKind, list[sample.Defect]]) -> None:
    for found in planted["exact_duplicate"]:
        assert found.of is not None
        record, original = json.loads(spoilt(found)), faultless(found.of)
        assert record["messages"] == original["messages"]
        assert record["conversation_id"] != original["conversation_id"]


def test_near_duplicate_differs_in_a_few_words(planted: dict[sample.DefectKind, list[sample.Defect]]) -> None:
    for found in planted["near_duplicate"]:
        assert found.of is not None
        here = " ".join(message["content"] for message in json.loads(spoilt(found))["messages"])
        there = " ".join(message["content"] for message in faultless(found.of)["messages"])
        assert here != there
        assert SequenceMatcher(None, here.split(), there.split(), autojunk=False).ratio() > 0.9


def test_contradictory_label_is_all_that_changes(
    planted: dict[sample.DefectKind, list[sample.Defect]],
) -> None:
    for found in planted["contradictory_label"]:
        assert found.of is not None
        here, there = json.loads(spoilt(found))["messages"], faultless(found.of)["messages"]
        assert here[0]["intent"] in sample.INTENTS
        assert here[0].pop("intent") != there[0].pop("intent")
        assert here == there


def test_missing_field_is_missing(planted: dict[sample.DefectKind, list[sample.Defect]]) -> None:
    ways = Counter[str]()
    for found in planted["missing_field"]:
        record = json.loads(spoilt(found))
        messages = record.get("messages", [])
        ways["conversation_id"] += "conversation_id" not in record
        ways["messages"] += not messages
        ways["role"] += any("role" not in message for message in messages)
        ways["content"] += any(not message["content"].strip() for message in messages)
    assert min(ways.values()) > 0
    assert ways.total() == len(planted["missing_field"])


def test_broken_encoding_is_not_utf8(planted: dict[sample.DefectKind, list[sample.Defect]]) -> None:
    for found in planted["broken_encoding"]:
        with pytest.raises(UnicodeDecodeError):
            spoilt(found).decode()
        json.loads(spoilt(found).decode(errors="replace"))


def test_mojibake_is_misread_text_or_control_characters(
    planted: dict[sample.DefectKind, list[sample.Defect]],
) -> None:
    ways = Counter[str]()
    for found in planted["mojibake"]:
        text = questions(json.loads(spoilt(found)))[0]
        if re.search(r"[\x00-\x1f\x7f]", text):
            ways["control"] += 1
        else:
            ways["misread"] += 1
            assert text.encode("cp1252").decode() != text
    assert min(ways["control"], ways["misread"]) > 0


def test_impossible_value_cannot_be(planted: dict[sample.DefectKind, list[sample.Defect]]) -> None:
    ways = Counter[str]()
    for found in planted["impossible_value"]:
        record = json.loads(spoilt(found))
        ways["time"] += not re.fullmatch(r"2025-[01]\d-[0-3]\dT[0-2]\d:[0-5]\d:[0-5]\dZ", record["started_at"])
        ways["role"] += record["messages"][0]["role"] == "robot"
        ways["channel"] += record["channel"] not in sample.CHANNELS
    assert min(ways.values()) > 0
    assert ways.total() == len(planted["impossible_value"])


def test_outlier_is_endless_or_repeats_itself(planted: dict[sample.DefectKind, list[sample.Defect]]) -> None:
    sizes = set()
    for found in planted["outlier"]:
        words = questions(json.loads(spoilt(found)))[0].split()
        sizes.add((len(words), len(set(words)) == 1))
    assert sizes == {(5_000, False), (300, True)}


def test_personal_data_is_valid(planted: dict[sample.DefectKind, list[sample.Defect]]) -> None:
    checks: dict[str, Callable[[str], object]] = {
        "Write to me at": lambda value: re.fullmatch(r"[a-z.\d]+@[a-z.]*example\.(com|org|net)", value),
        "Call me on": lambda value: re.fullmatch(r"\+\d[\d ]{8,16}\d", value),
        "My card is": lambda value: has_valid_luhn(value.replace(" ", "")),
        "My IBAN is": lambda value: has_valid_iban(value.replace(" ", "")),
        "My IP address is": lambda value: ipaddress.IPv4Address(value),
    }
    seen = set()
    for found in planted["personal_data"]:
        text = questions(json.loads(spoilt(found)))[0]
        lead, value = next((lead, text.split(f" {lead} ")[1]) for lead in checks if f" {lead} " in text)
        assert checks[lead](value), text
        seen.add(lead)
    assert seen == set(checks)


def has_valid_luhn(number: str) -> bool:
    doubled = [int(digit) * (1 + index % 2) for index, digit in enumerate(reversed(number))]
    return len(number) == 16 and sum(digit - 9 * (digit > 9) for digit in doubled) % 10 == 0


def has_valid_iban(number: str) -> bool:
    length = {"DE": 22, "GB": 22}[number[:2]]
    return len(number) == length and int("".join(str(int(c, 36)) for c in number[4:] + number[:4])) % 97 == 1


def test_the_checksums_of_these_tests_know_published_examples() -> None:
    assert has_valid_luhn("4111111111111111")
    assert not has_valid_luhn("4111111111111112")
    assert has_valid_iban("GB82WEST12345698765432")
    assert has_valid_iban("DE89370400440532013000")


def test_broken_json_ends_too_early(planted: dict[sample.DefectKind, list[sample.Defect]]) -> None:
    for found in planted["broken_json"]:
        assert sample.line(SEED, found.position, 0.0).startswith(spoilt(found))
        with pytest.raises(json.JSONDecodeError):
            json.loads(spoilt(found).decode())


# Personal data to judge a detector by


def test_personal_data_is_the_same_every_time_and_lies_where_the_label_says() -> None:
    once = list(personal(SEED, 3))
    assert once == list(personal(SEED, 3))
    assert once != list(personal(SEED + 1, 3))
    assert {labelled.kind for labelled in once} == {*PLANTED, *UNSEEN, *ALIKE}
    for labelled in once:
        planted = labelled.text[labelled.start : labelled.end]
        assert planted.strip() == planted != ""
        if labelled.kind == "email":
            assert re.fullmatch(r"[\wö.+]+@[\w.]*example\.(com|org|net)", planted, re.IGNORECASE)
        if labelled.kind == "iban":
            assert has_valid_iban(planted.replace(" ", "").upper())


def test_every_spelling_of_personal_data_is_planted_as_often() -> None:
    counts = Counter((labelled.kind, labelled.spelling) for labelled in personal(SEED, 5))
    assert set(counts.values()) == {5}
    assert len(counts) == sum(len(makes) for makes in (*PLANTED.values(), *UNSEEN.values(), *ALIKE.values()))
