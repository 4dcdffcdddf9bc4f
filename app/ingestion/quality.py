"""From the bytes of a record to a conversation, or to the reason why it is refused."""

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, get_args

import orjson

from app.conversation import ROLES, Message, normalised
from app.ingestion.anomalies import mojibake, repaired
from app.settings.ingestion import ColumnsConfig, DoubtfulRule, IngestionConfig


class Refusal(Exception):
    """A record breaks a rule, one of `RULES` or a check: it is data, counted and set aside, no error of the stage."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail
        self.conversation_id: str | None = None
        """Its conversation's, where it could be read."""


@dataclass(frozen=True)
class Rules:
    """What a record must keep to."""

    max_message_chars: int
    max_messages: int
    channels: frozenset[str]
    now: datetime
    """A later time is in the future."""
    languages: frozenset[str] = frozenset()
    """Empty: any."""
    intents: frozenset[str] = frozenset()
    """Empty: any."""
    warnings: frozenset[str] = frozenset()
    """Rules that only warn."""

    @classmethod
    def of(cls, ingestion: IngestionConfig, now: datetime) -> "Rules":
        """The rules of a configuration."""
        warned = (name for name in get_args(DoubtfulRule) if ingestion.rule(name).severity == "warn")
        return cls(
            ingestion.max_message_chars, ingestion.max_messages, frozenset(ingestion.channels), now,
            frozenset(ingestion.languages), frozenset(ingestion.intents), frozenset(warned),
        )  # fmt: skip


@dataclass
class Conversation:
    """A record that was accepted."""

    conversation_id: str
    channel: str
    language: str | None
    started_at: datetime | None
    intent: str | None
    messages: list[Message]
    warnings: list[str] = field(default_factory=list)
    """Rules it breaks that only warn."""
    imputed: list[str] = field(default_factory=list)
    """Columns that were filled in."""
    masked: int = 0
    """Pieces of personal data that were masked."""


class _Judge:
    """The rules applied to one record: a rule that only warns is noted, any other refuses."""

    __slots__ = ("rules", "warnings")

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.warnings: list[str] = []

    def broken(self, name: DoubtfulRule, detail: str = "") -> None:
        if name not in self.rules.warnings:
            raise Refusal(name, detail)
        if name not in self.warnings:
            self.warnings.append(name)


def parse(raw: bytes) -> dict[str, Any]:
    """The JSON object that the bytes of a record are.

    Raises:
        Refusal: They are none.
    """
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError:
        value = _parsed_slowly(raw)
    if not isinstance(value, dict):
        raise Refusal("not_a_record", f"a {type(value).__name__}")
    return value


def _parsed_slowly(raw: bytes) -> Any:
    """What Python's parser makes of bytes that the fast one rejects; it knows better where the fault is."""
    try:
        return _loaded(raw.decode())
    except UnicodeDecodeError as error:
        raise Refusal("invalid_encoding", f"byte {error.start}") from None


def _loaded(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise Refusal("invalid_json", f"{error.msg.removesuffix(' at')} at character {error.pos}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, a list a thousand deep
        raise Refusal("invalid_json", f"beyond what is parsed: {type(error).__name__}") from None


def known_columns(columns: ColumnsConfig) -> frozenset[str] | None:
    """The columns that a mapping names, none where it takes whatever there is."""
    if "*" in columns.ignored:
        return None
    one_turn = [columns.user, *re.findall(r"\{([^{}]+)\}", columns.assistant or ""), columns.assistant, columns.intent]
    named = [columns.conversation_id, columns.channel, columns.language, columns.started_at, *columns.ignored]
    return frozenset(name for name in (*named, *(one_turn if columns.user else [columns.messages])) if name)


def check(
    row: dict[str, Any], columns: ColumnsConfig, rules: Rules, made_id: str | None, known: frozenset[str] | None = None
) -> Conversation:
    """The conversation in a row, normalised.

    Args:
        row: The source's columns.
        columns: Which of them is what.
        rules: What is accepted.
        made_id: The id of a record that has none; None where every record must have its own.
        known: From `known_columns`; None: other columns are no matter.

    Raises:
        Refusal: A rule is broken that does more than warn; the first one that is.
    """
    judge = _Judge(rules)
    if known is not None and (unexpected := [name for name in row.keys() - known if row[name] is not None]):
        judge.broken("unexpected_column", ", ".join(sorted(name[:40] for name in unexpected)[:5]))
    found = one_turn(row, columns) if columns.user is not None else row.get(columns.messages)
    messages = _messages(found, judge)
    intents = (message.get("intent") for message in messages if message["role"] == "user")
    return Conversation(
        conversation_id=_conversation_id(row.get(columns.conversation_id), made_id),
        channel=_channel(row.get(columns.channel), judge),
        language=_language(row.get(columns.language), judge),
        started_at=_started_at(row.get(columns.started_at), judge),
        intent=next((intent for intent in intents if intent), None),
        messages=messages,
        warnings=judge.warnings,
    )


def one_turn(row: dict[str, Any], columns: ColumnsConfig) -> list[dict[str, Any]]:
    """The messages of a row that holds one question and perhaps its reply."""
    assert columns.user is not None
    messages = [{"role": "user", "content": row.get(columns.user), "intent": row.get(columns.intent)}]
    if columns.assistant is None:
        return messages
    if "{" not in columns.assistant:
        return [*messages, {"role": "assistant", "content": row.get(columns.assistant)}]
    return [*messages, {"role": "assistant", "content": fill(columns.assistant, row)}]


def fill(template: str, row: dict[str, Any]) -> str:
    """The template with each {column} replaced by its value, whose underscores read as spaces."""
    return re.sub(r"\{([^{}]+)\}", lambda found: str(row.get(found[1]) or "").replace("_", " "), template)


def _messages(value: Any, judge: _Judge) -> list[Message]:
    if isinstance(value, str) and value.strip():
        value = _loaded(value)  # a CSV column holds the list as JSON
    if value is None or value == [] or isinstance(value, str):
        raise Refusal("missing_messages")
    if not isinstance(value, list):
        raise Refusal("invalid_messages", f"a {type(value).__name__}")
    if len(value) > judge.rules.max_messages:
        judge.broken("too_many_messages", str(len(value)))
    messages = [_message(index, message, judge) for index, message in enumerate(value)]
    if not alternate([message["role"] for message in messages]):
        judge.broken("roles_do_not_alternate")
    if "timestamp" in value[0] and not in_order([message.get("timestamp") for message in value]):
        judge.broken("timestamps_out_of_order")
    return messages


def alternate(roles: Sequence[str]) -> bool:
    """Whether, after a system message or none, the customer begins and the two take turns; either may end."""
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    return bool(spoken) and all(role == ROLES[1 + place % 2] for place, role in enumerate(spoken))


def in_order(times: Sequence[Any]) -> bool:
    """Whether ISO 8601 times never go back; messages without one are passed over."""
    try:
        read = [_utc(time) for time in times if time]
    except (TypeError, ValueError, OverflowError):
        return False
    return all(earlier <= later for earlier, later in itertools.pairwise(read))


def _message(index: int, value: Any, judge: _Judge) -> Message:
    if not isinstance(value, dict):
        raise Refusal("invalid_messages", f"message {index} is a {type(value).__name__}")
    role, content, intent = value.get("role"), value.get("content"), value.get("intent")
    if role not in ROLES:
        raise Refusal("missing_role" if role is None or role == "" else "unknown_role", f"message {index}")
    if content is None:
        raise Refusal("empty_content", f"message {index}")
    if not isinstance(content, str) or not (intent is None or isinstance(intent, str)):
        raise Refusal("invalid_messages", f"message {index} holds more than text")
    text = _content(content, index, judge)
    if not text:
        raise Refusal("empty_content", f"message {index}")
    if len(text) > judge.rules.max_message_chars:
        judge.broken("too_long_message", f"message {index} has {len(text)} characters")
    return {"role": role, "content": text, "intent": _intent(intent, judge) if intent else None}


def _content(value: str, index: int, judge: _Judge) -> str:
    if _is_plain(value):
        return value
    if mojibake(value):
        judge.broken("mojibake", f"message {index}")
        value = repaired(value)
    return _text(value)


def _intent(value: str, judge: _Judge) -> str | None:
    intent = _text(value) or None
    if intent and judge.rules.intents and intent not in judge.rules.intents:
        judge.broken("unknown_intent")
        return None
    return intent


def _is_plain(value: str) -> bool:
    """Whether a text is normalised: nearly every one is ASCII as it should be, and these tests run at memory speed."""
    return value.isascii() and value.isprintable() and "  " not in value and value[:1] != " " and value[-1:] != " "


def _text(value: str) -> str:
    if _is_plain(value):
        return value
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise Refusal("invalid_encoding", f"character {error.start}") from None
    return normalised(value)


def id_of(row: dict[str, Any], columns: ColumnsConfig) -> str | None:
    """A row's conversation id as it would be kept, if it has one."""
    try:
        return _conversation_id(row.get(columns.conversation_id), None)
    except Refusal:
        return None


def _conversation_id(value: Any, made_id: str | None) -> str:
    # A number is an id as well; a truth value or a list is not.
    known = str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""
    found = _text(known) or made_id
    if not found:
        raise Refusal("missing_conversation_id")
    return found


def _channel(value: Any, judge: _Judge) -> str:
    if value is None or value == "":
        return "unknown"
    channel = _text(value).casefold() if isinstance(value, str) else ""
    if channel not in judge.rules.channels:
        judge.broken("unknown_channel")
        return "unknown"
    return channel


def _language(value: Any, judge: _Judge) -> str | None:
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        judge.broken("invalid_language", f"a {type(value).__name__}")
        return None
    language = _text(value) or None
    if language and judge.rules.languages and language not in judge.rules.languages:
        judge.broken("unknown_language")
        return None
    return language


def _started_at(value: Any, judge: _Judge) -> datetime | None:
    if value is None or value == "":
        return None
    try:
        time = _utc(value)
    except (TypeError, ValueError, OverflowError):
        judge.broken("invalid_timestamp", "not ISO 8601")
        return None
    if time.year < 1970 or time > judge.rules.now:
        judge.broken("invalid_timestamp", "before 1970" if time.year < 1970 else "in the future")
        return None
    return time


def _utc(value: Any) -> datetime:
    time = datetime.fromisoformat(value)
    return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
