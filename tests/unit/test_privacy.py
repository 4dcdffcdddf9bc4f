import importlib.util
import itertools
import json
import pickle
import time
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.conversation import MESSAGES, Message
from app.errors import ConfigError
from app.ingestion.sample import lines
from app.personal_data import is_card, is_iban
from app.privacy import KINDS, Detector, Mask, mask_column, mask_document, mask_messages
from app.settings.ingestion import PrivacyConfig

DETECTOR = Detector.of(PrivacyConfig())

FOUND = [
    ("email", "jane.doe+shop@mail.example.co.uk"),
    ("email", "JANE_DOE%x@EXAMPLE.ORG"),
    ("email", "jörg.müller@example.com"),
    ("phone", "+44 20 7946 0123"),
    ("phone", "+49 (0)30 23125-123"),
    ("phone", "+12025550123"),
    ("phone", "(202) 555-0123"),
    ("phone", "020 7946 0123"),
    ("phone", "030/23125123"),
    ("phone", "+33 1 99 00 12 34"),
    ("card", "4111 1111 1111 1111"),
    ("card", "5500-0000-0000-0004"),
    ("card", "378282246310005"),
    ("iban", "DE89 3704 0044 0532 0130 00"),
    ("iban", "GB82WEST12345698765432"),
    ("iban", "nl91abna0417164300"),
    ("iban", "MT84MALT011000012345MTLCAST001S"),
    ("ip_address", "203.0.113.7"),
    ("ip_address", "2001:db8:85a3::8a2e:370:7334"),
    ("secret", "sk-proj_abcdefghijklmnop123456"),
    ("secret", "pk-abcdefghijklmnop123456"),
    ("secret", "AKIAIOSFODNN7EXAMPLE"),
    ("secret", "ghp_abcdefghijklmnopqrstuvwxyz0123456789"),
    ("secret", "xoxb-123456789012-abcdef"),
    ("secret", "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2lnbmF0dXJl"),
    ("secret", "-----BEGIN RSA PRIVATE KEY-----\nMIIEpAIBAAKCAQEA\n-----END RSA PRIVATE KEY-----"),
]
"""One of each kind, written in the ways in which it is met; reserved numbers and published examples."""

NOT_FOUND = [
    "order 1042 of 12 March 2025",
    "order number 2025550123",
    "tracking number 1Z999AA10123456784",
    "invoice 2024-000123-45",
    "it costs 1,299.00 and not 1.299,00",
    "2025-11-24T13:37:05Z or 24.11.2025 13:37:05",
    "4111 1111 1111 1112",  # the check digit is wrong
    "0000 0000 0000 0000",
    "DE88 3704 0044 0532 0130 00",
    "version 10.0.2.1 of the app",
    "300.1.2.3",
    "a total of $3884.66",
    "on 03.11.2025 or 03-11-2025",
    "at 12:30:45 or 00:1A:2B:3C:4D:5E",
    "my password is wrong and was rejected",
    "how do i reset my password?",
    "the pin is stuck, pin it on the wall",
    "a @ b, @home, me@home",
    "SUMMER25 off a watering can of 12 litres",
]


def found(text: str, detector: Detector = DETECTOR) -> list[tuple[str, str]]:
    return [(finding.kind, text[finding.start : finding.end]) for finding in detector.find(text)]


def masked(text: str, detector: Detector = DETECTOR) -> str:
    return Mask(detector, [text]).text(text)


def said(contents: list[str]) -> list[Message]:
    return [{"role": "user", "content": content, "intent": None} for content in contents]


def alone(contents: list[str], detector: Detector) -> tuple[list[str], int]:
    """The texts of one conversation, masked, and how many pieces there were."""
    messages, counts = mask_messages(said(contents), detector)
    return [message["content"] for message in messages], counts.total()


def masked_column(conversations: list[list[str]], detector: Detector) -> list[tuple[list[str], int]]:
    """The same of many conversations at once, as ingestion masks them."""
    messages, counts = mask_column(pa.array([said(contents) for contents in conversations], MESSAGES), detector)
    texts = [[message["content"] for message in conversation] for conversation in messages.to_pylist()]
    return list(zip(texts, counts.tolist(), strict=True))


@pytest.mark.parametrize(("kind", "value"), FOUND)
@pytest.mark.parametrize(
    "sentence", ["{}", "My own is {}.", "({})", "Is it {}? Order 1042, please!", '"{}"', "it: {}, thanks", "12 {} 7"]
)
def test_every_kind_is_found_in_any_sentence(kind: str, value: str, sentence: str) -> None:
    if sentence == "12 {} 7" and kind == "phone":
        pytest.skip("digits before and after are digits of a telephone number")
    assert (kind, value) in found(sentence.format(value))


@pytest.mark.parametrize("text", NOT_FOUND)
def test_what_looks_alike_is_not_found(text: str) -> None:
    assert found(text) == []


def test_the_examples_are_of_every_kind() -> None:
    assert {kind for kind, _ in FOUND} == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_configured_kinds_are_found(kind: str) -> None:
    text = " | ".join(value for _, value in FOUND)
    assert {name for name, _ in found(text, Detector(kinds=(kind,)))} == {kind}


def test_national_numbers_are_those_of_the_configured_countries() -> None:
    assert found("ring 01 99 00 12 34", Detector(phone_regions=("FR",))) == [("phone", "01 99 00 12 34")]
    assert found("ring 01 99 00 12 34", Detector(phone_regions=("US",))) == []


# Checksums


@settings(deadline=None)
@given(st.text("0123456789", min_size=14, max_size=14))
def test_of_ten_check_digits_one_is_right(digits: str) -> None:
    assert sum(is_card(f"4{digits}{check}") for check in range(10)) == 1


@pytest.mark.parametrize("number", ["4111111111111111", "5555555555554444", "6011111111111117", "30569309025904"])
def test_card_numbers_of_every_issuer_are_known_and_a_changed_digit_is_not(number: str) -> None:
    assert is_card(number)
    assert not is_card(f"{number[:-1]}{(int(number[-1]) + 1) % 10}")


@settings(deadline=None)
@given(st.sampled_from(["DE89370400440532013000", "GB82WEST12345698765432", "FR1420041010050500013M02606"]), st.data())
def test_an_iban_with_one_character_changed_is_none(iban: str, data: st.DataObject) -> None:
    place = data.draw(st.integers(2, len(iban) - 1))
    other = data.draw(st.sampled_from("0123456789").filter(lambda digit: digit != iban[place]))
    assert is_iban(iban)
    assert not is_iban(iban[:place] + other + iban[place + 1 :])


def test_an_iban_ends_where_its_country_says() -> None:
    text = "DE12 is no iban but DE89 3704 0044 0532 0130 00 and then more words"
    assert found(text) == [("iban", "DE89 3704 0044 0532 0130 00")]


def test_a_card_number_is_found_beside_other_digits() -> None:
    for text in ("order 4711 4111 1111 1111 1111 thanks", "4111 1111 1111 1111 12 27 123", "12 4111111111111111"):
        assert [kind for kind, value in found(text) if value.replace(" ", "") == "4111111111111111"] == ["card"]


# Passwords and the like


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("my password is Tr0ub4dor", "Tr0ub4dor"),
        ("Password: hunter", "hunter"),
        ("api_key=abcd", "abcd"),
        ("mein Passwort ist s3hr-geheim.", "s3hr-geheim."),
        ("PIN 1234", "1234"),
        ("the pin code is 98765", "98765"),
        ("pin1234", "1234"),
        ("cvv: 123", "123"),
        ('{"password": "hunter"}', "hunter"),
        (r"{\"access token\":\"abcd1234\"}", "abcd1234"),
    ],
)
def test_what_is_said_to_be_a_secret_is_masked_and_the_words_before_it_stay(text: str, secret: str) -> None:
    assert found(text) == [("secret", secret)]
    assert masked(text) == text.replace(secret, "[SECRET_1]")


def test_a_password_that_holds_an_address_is_masked_whole() -> None:
    assert masked("password: Tr0ub&P@ss.word!x thanks") == "password: [SECRET_1][EMAIL_1][SECRET_2] thanks"


def test_patterns_of_ones_own_are_found_by_their_name() -> None:
    detector = Detector.of(PrivacyConfig(secrets={"customer_number": r"\bMF-\d{6}\b"}))
    assert masked("I am MF-123456, not MF-12", detector) == "I am [CUSTOMER_NUMBER_1], not MF-12"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kinds": ("email", "name")}, "name is not known"),
        ({"secrets": {"mine": "("}}, "no regular expression"),
        ({"secrets": {"My-Own": "x"}}, "cannot name a placeholder"),
    ],
)
def test_a_detector_that_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Detector.of(PrivacyConfig(**settings))


def test_a_detector_survives_pickling() -> None:
    assert pickle.loads(pickle.dumps(DETECTOR)) == DETECTOR


# Placeholders


def test_a_value_keeps_its_placeholder_throughout_a_conversation_however_it_is_written() -> None:
    texts = [
        "I am jane@example.com, card 4111 1111 1111 1111.",
        "Is that JANE@example.com with 4111-1111-1111-1111?",
        "No, joe@example.com. The other one was jane@example.com.",
    ]
    messages = [
        {"role": role, "content": text} for role, text in zip(("user", "assistant", "user"), texts, strict=True)
    ]
    result, counts = mask_messages(messages, DETECTOR)  # type: ignore[arg-type]
    assert [message["content"] for message in result] == [
        "I am [EMAIL_1], card [CARD_1].",
        "Is that [EMAIL_1] with [CARD_1]?",
        "No, [EMAIL_2]. The other one was [EMAIL_1].",
    ]
    assert counts == {"email": 4, "card": 2}
    assert messages[0]["content"] == texts[0]


def test_a_placeholder_that_is_there_already_keeps_its_number() -> None:
    assert masked("[EMAIL_3] wrote, and jane@example.com") == "[EMAIL_3] wrote, and [EMAIL_4]"


FRAGMENTS = [
    *(value for _, value in FOUND), "my password is ", "pin", "cvv2", "api key: ", "[EMAIL_1]", "order ", "version ",
    "+", "-", ".", ":", "::", "@", " ", "\n", "1", "42", "2025550123", "4111", "DE", "ab", "é", "Ъ", "٣", "\\", '"',
]  # fmt: skip
texts = st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=4)), max_size=12).map("".join)


@settings(deadline=None)
@given(texts)
def test_masking_twice_changes_nothing(text: str) -> None:
    once = masked(text)
    assert masked(once) == once
    assert DETECTOR.find(once) == []


@settings(deadline=None)
@given(texts)
def test_findings_are_in_order_and_do_not_overlap(text: str) -> None:
    findings = DETECTOR.find(text)
    assert all(0 <= finding.start < finding.end <= len(text) for finding in findings)
    assert all(first.end <= second.start for first, second in itertools.pairwise(findings))


@settings(deadline=None)
@given(texts)
def test_conversations_in_a_column_are_masked_as_each_alone(text: str) -> None:
    column = [["hello"], [text], [], [text, "hello", text]]
    assert masked_column(column, DETECTOR) == [alone(contents, DETECTOR) for contents in column]


def test_hardly_any_faultless_text_is_looked_at_closely_and_none_is_changed() -> None:
    records = [json.loads(line)["messages"] for line in lines(7, 0, 1_000, 0.0)]
    contents = [message["content"] for messages in records for message in messages]
    assert DETECTOR.suspect_texts(pa.array(contents)).mean() < 0.05
    for messages in records:
        assert mask_messages(messages, DETECTOR) == (messages, {})


@pytest.mark.parametrize("pattern", [r"(?<=a)b", "b"], ids=["only Python knows it", "Arrow knows it too"])
def test_a_pattern_of_ones_own_is_masked_in_a_column_too(pattern: str) -> None:
    detector = Detector(patterns=(("own", pattern),))
    assert masked_column([["hello"], ["ab"], ["ab", "ab"]], detector) == [
        (["hello"], 0), (["a[OWN_1]"], 1), (["a[OWN_1]", "a[OWN_1]"], 2),
    ]  # fmt: skip


# Adversaries


@pytest.mark.parametrize(
    "unit",
    [
        "a", "a.", "a@", "a-", "@", "1", "1 ", "1-1 ", "1.", "(1) ", "a:", ":", "::", "+1", "DE12 ", "DE12A",
        "1.1.1.1 ",
        "password is ", "password=", "pin ", "sk-", "eyJaaaaaaaa.", "-----BEGIN PRIVATE KEY-----", "\\u0040", "\\",
        "[EMAIL_1]",
        "jane@example.com ", "4111 1111 1111 1111 ", "+49 30 23125123 ", "2025550123 ",
    ],
)  # fmt: skip
def test_long_input_made_to_be_slow_takes_no_longer_than_its_length_says(unit: str) -> None:
    def seconds(length: int) -> float:
        text = (unit * length)[:length]
        start = time.thread_time()  # the process has threads of Ray by the time this runs
        mask_document(text, DETECTOR)
        return time.thread_time() - start

    seconds(100)
    short, long = seconds(4_000), seconds(64_000)
    assert long < 6, f"{unit!r}: {long:.1f} s for 64,000 characters"
    assert long < 0.5 + 16 * 4 * short


# Refused records


@pytest.mark.parametrize("ensure_ascii", [True, False])
@pytest.mark.parametrize("before", ["", "line\n", "tab\t", "\r\n", "\x01", "\x0c", "é ", "😀", "\\", "/", '"'])
@pytest.mark.parametrize(("kind", "value"), [entry for entry in FOUND if "\n" not in entry[1] and "ö" not in entry[1]])
def test_what_json_escapes_hides_nothing(kind: str, value: str, before: str, ensure_ascii: bool) -> None:
    raw = json.dumps({"text": f"{before}{value}\nand more"}, ensure_ascii=ensure_ascii)
    escaped = raw.replace("@", "\\u0040").replace("+", "\\u002b").replace("/", "\\/")
    for document in (raw, escaped, raw[: len(raw) - 3]):
        shown = mask_document(document, DETECTOR)
        assert value not in shown
        assert f"[{kind.upper()}_1]" in shown


def test_a_document_without_personal_data_stays_as_it_is() -> None:
    raw = '{"text": "a\\u00e9\\n\\/ \\ud83d\\ude00 \\u0000 \\q'
    assert mask_document(raw, DETECTOR) == raw


@settings(deadline=None)
@given(texts)
def test_any_document_can_be_masked_and_masked_again(text: str) -> None:
    for document in (text, json.dumps(text), json.dumps({"a": [text]}, ensure_ascii=False)[:-2]):
        assert DETECTOR.find(mask_document(mask_document(document, DETECTOR), DETECTOR)) == []


# Presidio


def test_presidio_is_asked_for_only_where_it_is_installed() -> None:
    if importlib.util.find_spec("presidio_analyzer"):
        pytest.skip("Presidio is installed")
    with pytest.raises(ConfigError, match="Presidio is not installed"):
        Detector.of(PrivacyConfig(engine="presidio"))


def test_presidio_finds_more_than_the_patterns_and_they_find_what_they_found() -> None:
    pytest.importorskip("presidio_analyzer", reason="the extra `presidio` is not installed")
    detector = Detector.of(PrivacyConfig(engine="presidio"))
    text = "Pay jane@example.com, or 1A1zP1eP5QGefi2DMPTfTL5SLmv7DivfNa; order 1042"
    assert masked(text, DETECTOR) == "Pay [EMAIL_1], or 1A1zP1eP5QGefi2DMPTfTL5SLmv7DivfNa; order 1042"
    assert masked(text, detector) == "Pay [EMAIL_1], or [CRYPTO_1]; order 1042"
    assert masked(masked(text, detector), detector) == masked(text, detector)
    assert masked_column([[text]], detector) == [(["Pay [EMAIL_1], or [CRYPTO_1]; order 1042"], 2)]


def test_a_spacy_pipeline_that_is_not_installed_is_named() -> None:
    pytest.importorskip("presidio_analyzer", reason="the extra `presidio` is not installed")
    with pytest.raises(ConfigError, match="xx_no_such_pipeline is not installed"):
        Detector.of(PrivacyConfig(engine="presidio", presidio_model="xx_no_such_pipeline"))
