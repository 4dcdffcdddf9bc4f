"""From the bytes of a record to a conversation, or to the reason why it is refused."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from app.config import ColumnsConfig, IngestionConfig
from app.conversation import ROLES, Message, normalised

Reason = Literal[
    "invalid_encoding",  # bytes that are not UTF-8, or half of a surrogate pair
    "invalid_json",  # cannot be parsed
    "invalid_csv",  # a quote in the wrong place
    "wrong_column_count",  # more or fewer fields than the header
    "too_long_record",  # more than 16 MB
    "not_a_record",  # JSON, but not an object
    "missing_conversation_id",  # the source has ids, this record has none
    "missing_messages",  # none at all
    "invalid_messages",  # not a list of {role, content, intent?} of strings
    "missing_role",
    "unknown_role",
    "empty_content",  # nothing but white space
    "roles_do_not_alternate",  # not [system,] user, assistant, user, ...
    "too_long_message",
    "too_many_messages",
    "unknown_channel",
    "invalid_language",  # not a string
    "invalid_timestamp",  # not ISO 8601, before 1970 or in the future
]


class Refusal(Exception):
    """A record is refused: it is data, counted and set aside, and no error of the stage."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Rules:
    """What a record must keep to."""

    max_message_chars: int
    max_messages: int
    channels: frozenset[str]
    now: datetime

    @classmethod
    def of(cls, ingestion: IngestionConfig, now: datetime) -> "Rules":
        """The rules of a configuration; a time after `now` is in the future."""
        return cls(ingestion.max_message_chars, ingestion.max_messages, frozenset(ingestion.channels), now)


@dataclass(frozen=True)
class Conversation:
    """A record that was accepted."""

    conversation_id: str
    channel: str
    language: str | None
    started_at: datetime | None
    intent: str | None
    messages: list[Message]


def parse(raw: bytes) -> dict[str, Any]:
    """The JSON object that the bytes of a record are.

    Raises:
        Refusal: They are none.
    """
    try:
        value = _loaded(raw.decode())
    except UnicodeDecodeError as error:
        raise Refusal("invalid_encoding", f"byte {error.start}") from None
    if not isinstance(value, dict):
        raise Refusal("not_a_record", f"a {type(value).__name__}")
    return value


def _loaded(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise Refusal("invalid_json", f"{error.msg} at character {error.pos}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, a list a thousand deep
        raise Refusal("invalid_json", f"beyond what is parsed: {type(error).__name__}") from None


def check(row: dict[str, Any], columns: ColumnsConfig, rules: Rules, made_id: str | None) -> Conversation:
    """The conversation in a row, normalised.

    Args:
        row: The source's columns.
        columns: Which of them is what.
        rules: What is accepted.
        made_id: The id of a record that has none; None where every record must have its own.

    Raises:
        Refusal: A rule is broken; the first one that is.
    """
    found = one_turn(row, columns) if columns.user is not None else row.get(columns.messages)
    messages = _messages(found, rules)
    intents = (message.get("intent") for message in messages if message["role"] == "user")
    return Conversation(
        conversation_id=_conversation_id(row.get(columns.conversation_id), made_id),
        channel=_channel(row.get(columns.channel), rules.channels),
        language=_language(row.get(columns.language)),
        started_at=_started_at(row.get(columns.started_at), rules.now),
        intent=next((intent for intent in intents if intent), None),
        messages=messages,
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


def _messages(value: Any, rules: Rules) -> list[Message]:
    if isinstance(value, str) and value.strip():
        value = _loaded(value)  # a CSV column holds the list as JSON
    if value is None or value == [] or isinstance(value, str):
        raise Refusal("missing_messages")
    if not isinstance(value, list):
        raise Refusal("invalid_messages", f"a {type(value).__name__}")
    if len(value) > rules.max_messages:
        raise Refusal("too_many_messages", str(len(value)))
    messages = [_message(index, message, rules) for index, message in enumerate(value)]
    if not alternate([message["role"] for message in messages]):
        raise Refusal("roles_do_not_alternate")
    return messages


def alternate(roles: Sequence[str]) -> bool:
    """Whether, after a system message or none, the customer begins and the two take turns; either may end."""
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    return bool(spoken) and all(role == ROLES[1 + place % 2] for place, role in enumerate(spoken))


def _message(index: int, value: Any, rules: Rules) -> Message:
    if not isinstance(value, dict):
        raise Refusal("invalid_messages", f"message {index} is a {type(value).__name__}")
    role, content, intent = value.get("role"), value.get("content"), value.get("intent")
    if role is None or role == "":
        raise Refusal("missing_role", f"message {index}")
    if role not in ROLES:
        raise Refusal("unknown_role", f"message {index}")
    if content is None:
        raise Refusal("empty_content", f"message {index}")
    if not isinstance(content, str) or not (intent is None or isinstance(intent, str)):
        raise Refusal("invalid_messages", f"message {index} holds more than text")
    text = _text(content)
    if not text:
        raise Refusal("empty_content", f"message {index}")
    if len(text) > rules.max_message_chars:
        raise Refusal("too_long_message", f"message {index} has {len(text)} characters")
    return {"role": role, "content": text, "intent": (_text(intent) or None) if intent else None}


def _text(value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise Refusal("invalid_encoding", f"character {error.start}") from None
    return normalised(value)


def _conversation_id(value: Any, made_id: str | None) -> str:
    # A number is an id as well; a truth value or a list is not.
    known = str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""
    found = _text(known) or made_id
    if not found:
        raise Refusal("missing_conversation_id")
    return found


def _channel(value: Any, known: frozenset[str]) -> str:
    if value is None or value == "":
        return "unknown"
    channel = _text(value).casefold() if isinstance(value, str) else ""
    if channel not in known:
        raise Refusal("unknown_channel")
    return channel


def _language(value: Any) -> str | None:
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise Refusal("invalid_language", f"a {type(value).__name__}")
    return _text(value) or None


def _started_at(value: Any, now: datetime) -> datetime | None:
    if value is None or value == "":
        return None
    try:
        time = datetime.fromisoformat(value)
        time = time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
    except (TypeError, ValueError, OverflowError):
        raise Refusal("invalid_timestamp", "not ISO 8601") from None
    if time.year < 1970 or time > now:
        raise Refusal("invalid_timestamp", "before 1970" if time.year < 1970 else "in the future")
    return time
