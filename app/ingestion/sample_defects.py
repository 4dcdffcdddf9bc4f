"""The ways in which a record of the sample shop can be bad."""

import json
import re
from collections.abc import Callable
from typing import Any, Literal, get_args

from app.ingestion.sample_phrases import INTENTS, NAMES, PRODUCTS, SURNAMES, Draw, pick

Record = dict[str, Any]
DefectKind = Literal[
    "exact_duplicate",  # the messages of an earlier conversation under another conversation_id
    "near_duplicate",  # the same, but for a few filler words in what the customer wrote
    "contradictory_label",  # the same, but the first question carries another intent
    "missing_field",  # no messages, an empty message, no role, no conversation_id
    "broken_encoding",  # bytes that are not UTF-8
    "mojibake",  # UTF-8 once read as Windows-1252, or control characters
    "impossible_value",  # a time, role or channel that cannot be
    "outlier",  # a message of thousands of words, or one word hundreds of times
    "personal_data",  # the customer gives away an address or a number
    "broken_json",  # a line that ends too early
]
DEFECT_KINDS: tuple[DefectKind, ...] = get_args(DefectKind)
COPIES: tuple[DefectKind, ...] = ("exact_duplicate", "near_duplicate", "contradictory_label")
"""Kinds that repeat the messages of an earlier record."""

_encoder = json.JSONEncoder(ensure_ascii=False)

_FILLERS = ("really", "please", "just", "actually", "kindly", "now", "again", "maybe")
_UNDECODABLE = (b"\xff", b"\xfe\xff", b"\xc3(", b"\xe2\x82 ", b"caf\xe9 ", b"\xa0", b"\xf0\x9f\x98 ", b"\x80\x81")
_MISREAD = (" – it’s been ages…", " … I’m in a café", " – I paid £20", " – for my fiancée", " and that’s naïve")
_CONTROL = "\x00\x01\x07\x08\x0b\x0c\x1b\x1f\x7f"
_TIMES = ("2199-01-01T00:00:00Z", "yesterday-ish", "2025-13-41T25:61:00Z", "0001-01-01T00:00:00Z", "soon")
_CHANNELS = ("pigeon", "telegraph", "smoke signal", "???")


def encode(record: Record) -> bytes:
    """Return the record as the bytes of one JSON line, without the line feed."""
    return _encoder.encode(record).encode()


def spoil(record: Record, kind: DefectKind, draw: Draw) -> bytes:
    """Return the record with the defect in it, as bytes. `record` may be changed.

    A kind in `COPIES` expects that the record already holds the messages of the earlier one.
    """
    if kind == "broken_encoding":
        return _with_undecodable_bytes(encode(record), draw)
    if kind == "broken_json":
        text = _encoder.encode(record)
        return text[: int(len(text) * (0.2 + 0.7 * draw()))].encode()
    if kind != "exact_duplicate":
        _SPOILERS[kind](record, draw)
    return encode(record)


def _with_undecodable_bytes(encoded: bytes, draw: Draw) -> bytes:
    start = encoded.index(b'"content": "') + len(b'"content": "')
    return encoded[:start] + pick(draw, _UNDECODABLE) + encoded[start:]


def _reword(record: Record, draw: Draw) -> None:
    """Put a filler word into one message of the customer, for every sixty words of the conversation."""
    messages = record["messages"]
    for _ in range(1 + sum(len(message["content"].split()) for message in messages) // 60):
        message = pick(draw, messages[::2])
        words = message["content"].split(" ")
        words.insert(1 + int(draw() * len(words)), pick(draw, _FILLERS))
        message["content"] = " ".join(words)


def _relabel(record: Record, draw: Draw) -> None:
    question = record["messages"][0]
    here = INTENTS.index(question["intent"])
    question["intent"] = INTENTS[(here + 1 + int(draw() * (len(INTENTS) - 1))) % len(INTENTS)]


def _drop_field(record: Record, draw: Draw) -> None:
    message = pick(draw, record["messages"])
    match pick(draw, ("messages", "no messages", "content", "role", "conversation_id")):
        case "messages":
            del record["messages"]
        case "no messages":
            record["messages"] = []
        case "content":
            message["content"] = pick(draw, ("", "   "))
        case "role":
            del message["role"]
        case _:
            del record["conversation_id"]


def _misread(record: Record, draw: Draw) -> None:
    message = record["messages"][0]
    if draw() < 0.5:
        message["content"] = (message["content"] + pick(draw, _MISREAD)).encode().decode("cp1252")
    else:
        for _ in range(3):
            at = int(draw() * len(message["content"]))
            message["content"] = message["content"][:at] + pick(draw, _CONTROL) + message["content"][at:]


def _make_impossible(record: Record, draw: Draw) -> None:
    match pick(draw, ("time", "role", "channel")):
        case "time":
            record["started_at"] = pick(draw, _TIMES)
        case "role":
            record["messages"][0]["role"] = "robot"
        case _:
            record["channel"] = pick(draw, _CHANNELS)


def _inflate(record: Record, draw: Draw) -> None:
    message = record["messages"][0]
    words = message["content"].split()
    if draw() < 0.5:
        message["content"] = " ".join([max(words, key=len)] * 300)
    else:
        vocabulary = (*words, *PRODUCTS, *NAMES)
        text = " ".join(pick(draw, vocabulary) for _ in range(5000))
        message["content"] = " ".join(text.split(" ")[:5000])


def _disclose(record: Record, draw: Draw) -> None:
    message = record["messages"][0]
    text, value = pick(draw, _DISCLOSURES)
    message["content"] = f"{message['content']} {text} {value(draw)}"


def digits(draw: Draw, count: int) -> str:
    """Return so many digits."""
    return "".join(pick(draw, "0123456789") for _ in range(count))


# All of these are reserved for examples and fiction, so that none belongs to anybody.


def email_address(draw: Draw) -> str:
    """Return an address of a domain for examples."""
    domain = pick(draw, ("example.com", "example.org", "mail.example.net"))  # RFC 2606
    return f"{pick(draw, 'abcdefghijklm')}.{pick(draw, SURNAMES).lower()}{digits(draw, 2)}@{domain}"


def _phone(draw: Draw) -> str:
    # Numbers for drama: Ofcom (London), NANPA (555-01xx), Bundesnetzagentur (Berlin, mobile).
    prefix, count = pick(draw, (("+44 20 7946 0", 3), ("+1 202 555 01", 2), ("+49 30 23125 ", 3), ("+49 171 39200", 2)))
    return prefix + digits(draw, count)


def card_number(draw: Draw) -> str:
    """Return a card number of a range for tests, with the check digit of Luhn."""
    body = "400000" + digits(draw, 9)
    # The digit before the check digit is doubled, and every second one from there to the left.
    total = sum(int(digit) for digit in body[1::2])
    total += sum(sum(divmod(2 * int(digit), 10)) for digit in body[::2])
    number = body + str(-total % 10)
    return " ".join(re.findall("....", number)) if draw() < 0.5 else number


def iban_number(draw: Draw) -> str:
    """Return an IBAN with valid check digits (ISO 13616) of a bank that does not exist."""
    country, bank, count = pick(draw, (("DE", "90000000", 10), ("GB", "TEST", 14)))
    account = bank + digits(draw, count)
    as_digits = "".join(str(int(character, 36)) for character in account + country + "00")
    number = f"{country}{98 - int(as_digits) % 97:02d}{account}"
    return " ".join(re.findall(".{1,4}", number)) if draw() < 0.5 else number


def _ip(draw: Draw) -> str:
    network = pick(draw, ("192.0.2", "198.51.100", "203.0.113"))  # RFC 5737
    return f"{network}.{1 + int(draw() * 254)}"


_DISCLOSURES: tuple[tuple[str, Callable[[Draw], str]], ...] = (
    ("Write to me at", email_address),
    ("Call me on", _phone),
    ("My card is", card_number),
    ("My IBAN is", iban_number),
    ("My IP address is", _ip),
)
_SPOILERS: dict[DefectKind, Callable[[Record, Draw], None]] = {
    "near_duplicate": _reword,
    "contradictory_label": _relabel,
    "missing_field": _drop_field,
    "mojibake": _misread,
    "impossible_value": _make_impossible,
    "outlier": _inflate,
    "personal_data": _disclose,
}
