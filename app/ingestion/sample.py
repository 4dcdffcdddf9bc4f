"""Conversations of an invented shop, Marlow & Finch: any number of them, with defects whose place is known.

Record `position` depends on the seed and the position alone, so a reader may start anywhere, and many may
share the work. The bytes are the same on every machine.

    python -c "from app.ingestion.sample import lines; print(b'\\n'.join(lines(7, 0, 5, 0.05)).decode())"
"""

import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import NamedTuple

from app.ingestion import sample_phrases as phrases
from app.ingestion.sample_defects import COPIES, DEFECT_KINDS, DefectKind, Record, encode, spoil
from app.ingestion.sample_phrases import INTENTS, Draw, Exchange, Intent, pick, say

__all__ = ["CHANNELS", "DEFECT_KINDS", "INTENTS", "Defect", "DefectKind", "defect", "line", "lines"]

CHANNELS: tuple[str, ...] = ("web", "app", "email", "phone", "social")

_TOPICS = {topic.label: topic for topic in phrases.TOPICS}
_FIRST_TOPICS = (*phrases.TOPICS, *(_TOPICS[label] for label in phrases.FREQUENT))
_TURNS = (1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 5, 6)
_VISITS_BY_HOUR = (1, 1, 0, 0, 0, 1, 3, 6, 9, 12, 13, 12, 11, 10, 10, 10, 10, 11, 12, 13, 11, 8, 5, 2)
_HOURS = tuple(hour for hour, visits in enumerate(_VISITS_BY_HOUR) for _ in range(visits))
_NEW_YEAR = datetime(2025, 1, 1)

_QUESTION_WORD = re.compile(
    r"(can|could|would|is|are|do|does|did|has|have|will|may|when|where|what|which|who|why|how)\b"
)
_SENTENCE_START = re.compile(r"(?:^|[.!?] )[a-z]")


@dataclass(frozen=True)
class Defect:
    """What is wrong with the record at a position."""

    position: int
    kind: DefectKind
    of: int | None
    """Position of the earlier, faultless record whose messages it copies."""


class _Turn(NamedTuple):
    intent: Intent
    asks: tuple[str, ...]
    replies: tuple[str, ...]
    slots: dict[str, str]
    start: str = ""
    """What may come before the question: `salutation`, `connective`."""


def lines(seed: int, start: int, stop: int, defect_fraction: float) -> Iterator[bytes]:
    """Yield the records from `start` up to, not including, `stop`."""
    for position in range(start, stop):
        yield line(seed, position, defect_fraction)


def line(seed: int, position: int, defect_fraction: float) -> bytes:
    """Return the record at a position as one JSON line, without the line feed.

    Args:
        seed: Names the shop's history; other seeds give other conversations.
        position: From 0, without an upper end.
        defect_fraction: Share of records that carry a defect, in [0, 1]. A faultless record is the same
            whatever the share.
    """
    planted = defect(seed, position, defect_fraction)
    record = _conversation(seed, position)
    if planted is None:
        return encode(record)
    if planted.of is not None:
        record["messages"] = _conversation(seed, planted.of)["messages"]
    return spoil(record, planted.kind, _draw(seed, position, "spoil"))


def defect(seed: int, position: int, defect_fraction: float) -> Defect | None:
    """Return what is wrong with the record at a position, None if nothing is."""
    key = _key(seed, position, "defect")
    if key >= defect_fraction * 2**64:
        return None
    draw = random.Random(key).random
    kind = pick(draw, DEFECT_KINDS)
    if kind not in COPIES:
        return Defect(position, kind, None)
    # A few tries only: where nearly all is defective, the search for a faultless record would have no end.
    for _ in range(8 if position else 0):
        earlier = int(draw() * position)
        if _key(seed, earlier, "defect") >= defect_fraction * 2**64:
            return Defect(position, kind, earlier)
    return Defect(position, "broken_json", None)


def _key(seed: int, position: int, purpose: str) -> int:
    """Return a number in [0, 2**64) that stands for one record and one purpose."""
    digest = hashlib.blake2b(f"{purpose} {seed} {position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def _draw(seed: int, position: int, purpose: str) -> Draw:
    """Return the random sequence of one record for one purpose.

    Only `random()` is promised to repeat in other versions of Python; `choice` and the like are not.
    """
    return random.Random(_key(seed, position, purpose)).random


def _conversation(seed: int, position: int) -> Record:
    """Return the faultless record at a position."""
    draw = _draw(seed, position, "conversation")
    started = _NEW_YEAR + timedelta(days=int(draw() * 365), hours=pick(draw, _HOURS), seconds=int(draw() * 3600))
    return {
        "conversation_id": f"shop-{position:08d}",
        "channel": pick(draw, CHANNELS),
        "language": "en",
        "started_at": f"{started.isoformat()}Z",
        "messages": _messages(draw, started),
    }


def _messages(draw: Draw, started: datetime) -> list[dict[str, str]]:
    messages = []
    case, mark = int(draw() * 16), int(draw() * 16)
    for turn in _turns(draw, started):
        question = _spell(draw, _question(draw, turn), case, mark)
        messages.append({"role": "user", "content": question, "intent": turn.intent.label})
        messages.append({"role": "assistant", "content": say(draw, pick(draw, turn.replies), turn.slots)})
    return messages


def _turns(draw: Draw, started: datetime) -> Iterator[_Turn]:
    """Yield what happens: perhaps a greeting, one concern or more, perhaps thanks."""
    slots = _slots(draw, started)
    left = pick(draw, _TURNS)
    thankful = left > 1 and draw() < 0.6
    left -= thankful
    start = "salutation"
    if left > 1 and draw() < 0.25:
        yield _turn(draw, phrases.GREETING, phrases.GREETING.openings, slots)
        left, start = left - 1, ""
    topic = pick(draw, _FIRST_TOPICS)
    while left:
        for turn in _concern(draw, topic, slots, start, left):
            yield turn
            left -= 1
        start = "connective"
        if topic.leads_to and draw() < 0.7:
            topic = _TOPICS[pick(draw, topic.leads_to)]
        else:
            at = phrases.TOPICS.index(topic) + 1 + int(draw() * (len(phrases.TOPICS) - 1))
            topic, slots = phrases.TOPICS[at % len(phrases.TOPICS)], _slots(draw, started)
    if thankful:
        yield _turn(draw, phrases.THANKS, phrases.THANKS.openings, slots)


def _concern(draw: Draw, topic: Intent, slots: dict[str, str], start: str, most: int) -> Iterator[_Turn]:
    """Yield at most `most` turns about one topic, at least one."""
    if topic.unnumbered and most > 1 and draw() < 0.3:
        yield _turn(draw, topic, topic.unnumbered, slots, start)
        yield _turn(draw, topic, topic.number, slots)._replace(replies=topic.openings[0].replies)
        most -= 2
    else:
        yield _turn(draw, topic, topic.openings, slots, start)
        most -= 1
    for exchange in topic.later[:most]:
        if draw() < 0.75:
            yield _turn(draw, topic, (exchange,), slots)


def _turn(draw: Draw, intent: Intent, exchanges: tuple[Exchange, ...], slots: dict[str, str], start: str = "") -> _Turn:
    exchange = pick(draw, exchanges)
    return _Turn(intent, exchange.asks, exchange.replies, slots, start)


def _slots(draw: Draw, started: datetime) -> dict[str, str]:
    """Draw what a customer's phrases may name."""
    smallest = pick(draw, (1_000, 10_000, 100_000))
    product = int(draw() * len(phrases.PRODUCTS))
    other = product + 1 + int(draw() * (len(phrases.PRODUCTS) - 1))
    ordered = started - timedelta(days=2 + int(draw() * 20))
    return {
        "order": str(smallest + int(draw() * 9 * smallest)),
        "product": phrases.PRODUCTS[product],
        "other": phrases.PRODUCTS[other % len(phrases.PRODUCTS)],
        "city": pick(draw, phrases.CITIES),
        "amount": f"{5 + int(draw() * 240)}{pick(draw, ('', '.50', '.90', '.95'))}",
        "weekday": pick(draw, phrases.WEEKDAYS),
        "date": f"{ordered.day} {phrases.MONTHS[ordered.month - 1]}",
        "name": pick(draw, phrases.NAMES),
        "voucher": f"{pick(draw, phrases.VOUCHERS)}{5 * (1 + int(draw() * 10))}",
    }


def _question(draw: Draw, turn: _Turn) -> str:
    """Return what the customer wants to say, in lower case and with `?` or nothing at its end."""
    body = say(draw, pick(draw, turn.asks), turn.slots)
    asking = body.endswith("?") or _QUESTION_WORD.match(body) is not None
    body = body.rstrip("?")
    if turn.start and draw() < 0.15 and "," not in body and "please" not in body:
        body += pick(draw, phrases.PLEAS)
    if turn.start == "salutation" and turn.intent.about_order and draw() < 0.25:
        body = f"{say(draw, pick(draw, phrases.LEAD_INS), turn.slots)}{body}"
    if turn.start == "salutation" and draw() < 0.25:
        body = f"{pick(draw, phrases.SALUTATIONS).format_map(turn.slots)}{body}"
    elif turn.start == "connective" and draw() < 0.7:
        body = f"{pick(draw, phrases.CONNECTIVES)}{body}"
    return f"{body}?" if asking else body


def _spell(draw: Draw, question: str, case: int, mark: int) -> str:
    """Write a question the way this customer writes.

    Args:
        question: With `?` or nothing at its end.
        case: In [0, 16), the customer's way with capitals.
        mark: In [0, 16), the customer's way with the mark at the end.
    """
    if draw() < 0.15:
        question = _mistype(draw, question)
    body = question.rstrip("?")
    if mark < 9:
        question = question if body != question else f"{body}."
    elif mark < 15:
        question = body
    else:
        question = f"{body}??" if body != question else f"{body}!!"
    if case < 9:
        return _SENTENCE_START.sub(lambda start: start[0].upper(), question)
    return question.lower() if case < 15 else question.upper()


def _mistype(draw: Draw, text: str) -> str:
    """Swap, drop or double a letter; a number stays as it is."""
    for _ in range(4):
        at = 1 + int(draw() * (len(text) - 1))
        pair = text[at : at + 2]
        if len(pair) == 2 and pair.isalpha():
            typed = pick(draw, (pair[::-1], pair[0], pair[1], pair[0] + pair))
            return text[:at] + typed + text[at + 2 :]
    return text
