import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.conversation import ROLES
from app.ingestion.quality import Refusal, Rules, alternate, check, fill, parse
from app.settings.ingestion import RULES as RULE_NAMES
from app.settings.ingestion import ColumnsConfig

NOW = datetime(2026, 1, 1, tzinfo=UTC)
RULES = Rules(max_message_chars=50, max_messages=4, channels=frozenset({"web", "unknown"}), now=NOW)
COLUMNS = ColumnsConfig()


def record(**changes: Any) -> dict[str, Any]:
    return {
        "conversation_id": "c1",
        "channel": "web",
        "language": "en",
        "started_at": "2025-06-01T10:00:00Z",
        "messages": [
            {"role": "user", "content": "where is  my order?", "intent": "order_status"},
            {"role": "assistant", "content": "On its way."},
        ],
    } | changes


def spoken(*messages: tuple[Any, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in messages]


def attempt(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Refusal as refusal:
        return refusal


def reason(row: dict[str, Any], columns: ColumnsConfig = COLUMNS, made_id: str | None = None) -> str | None:
    found = attempt(lambda: check(row, columns, RULES, made_id))
    return found.reason if isinstance(found, Refusal) else None


def test_a_good_record_is_accepted_and_normalised() -> None:
    row = record(
        messages=spoken(("system", "Be\tkind"), ("user", " cafe\u0301 \n open?\u200b "), ("assistant", "Yes")),
        channel="Web",
        started_at="2025-06-01T12:00:00+02:00",
    )
    found = check(row, COLUMNS, RULES, None)
    assert [message["content"] for message in found.messages] == ["Be kind", "café open?", "Yes"]
    assert found.channel == "web"
    assert found.started_at == datetime(2025, 6, 1, 10, tzinfo=UTC)
    assert found.intent is None
    assert check(record(), COLUMNS, RULES, None).intent == "order_status"


def test_what_a_source_lacks_is_left_open() -> None:
    found = check({"messages": record()["messages"]}, COLUMNS, RULES, "file#3")
    assert (found.conversation_id, found.channel, found.language, found.started_at) == ("file#3", "unknown", None, None)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"messages": None}, "missing_messages"),
        ({"messages": []}, "missing_messages"),
        ({"messages": "  "}, "missing_messages"),
        ({"messages": {"role": "user"}}, "invalid_messages"),
        ({"messages": ["hello"]}, "invalid_messages"),
        ({"messages": "not json"}, "invalid_json"),
        ({"messages": spoken(("user", 3))}, "invalid_messages"),
        ({"messages": [{"role": "user", "content": "hi", "intent": 3}]}, "invalid_messages"),
        ({"messages": [{"content": "hi"}]}, "missing_role"),
        ({"messages": spoken(("robot", "hi"))}, "unknown_role"),
        ({"messages": spoken((["user"], "hi"))}, "unknown_role"),
        ({"messages": spoken(("user", " \u200b "))}, "empty_content"),
        ({"messages": [{"role": "user"}]}, "empty_content"),
        ({"messages": spoken(("user", "half \ud83d"))}, "invalid_encoding"),
        ({"messages": spoken(("assistant", "hello"))}, "roles_do_not_alternate"),
        ({"messages": spoken(("user", "a"), ("user", "b"))}, "roles_do_not_alternate"),
        ({"messages": spoken(("system", "a"))}, "roles_do_not_alternate"),
        ({"messages": spoken(("user", "a"), ("system", "b"))}, "roles_do_not_alternate"),
        ({"messages": spoken(("user", "x" * 51))}, "too_long_message"),
        ({"messages": spoken(*[("user", "a"), ("assistant", "b")] * 3)}, "too_many_messages"),
        ({"conversation_id": None}, "missing_conversation_id"),
        ({"conversation_id": " "}, "missing_conversation_id"),
        ({"conversation_id": True}, "missing_conversation_id"),
        ({"channel": "pigeon"}, "unknown_channel"),
        ({"channel": 5}, "unknown_channel"),
        ({"language": 5}, "invalid_language"),
        ({"started_at": "yesterday-ish"}, "invalid_timestamp"),
        ({"started_at": "2199-01-01T00:00:00Z"}, "invalid_timestamp"),
        ({"started_at": "0001-01-01T00:00:00+14:00"}, "invalid_timestamp"),
        ({"started_at": 1_700_000_000}, "invalid_timestamp"),
        ({"messages": json.dumps(spoken(("user", "a list as text")))}, None),
        ({"conversation_id": 17}, None),
        ({"messages": spoken(("user", "a"), ("assistant", "b"), ("user", "c"))}, None),
        ({"started_at": (NOW - timedelta(seconds=1)).isoformat()}, None),
    ],
)
def test_each_rule_has_its_reason(changes: dict[str, Any], why: str | None) -> None:
    assert reason(record(**changes)) == why


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b'{"a": 1', "invalid_json"),
        (b"", "invalid_json"),
        (b"[" * 100_000, "invalid_json"),
        (b'{"n": ' + b"9" * 5_000 + b"}", "invalid_json"),
        (b'{"a": "\xff"}', "invalid_encoding"),
        (b"[1, 2]", "not_a_record"),
        (b"null", "not_a_record"),
    ],
)
def test_bytes_that_are_no_record(raw: bytes, why: str) -> None:
    with pytest.raises(Refusal) as e:
        parse(raw)
    assert e.value.reason == why


def test_the_detail_never_holds_what_the_customer_wrote() -> None:
    secret = "4111111111111111"
    for changes in ({"messages": spoken(("user", secret * 9))}, {"channel": secret}, {"started_at": secret}):
        with pytest.raises(Refusal) as e:
            check(record(**changes), COLUMNS, RULES, None)
        assert secret not in e.value.detail


def test_a_one_turn_row_becomes_question_and_reply() -> None:
    columns = ColumnsConfig(user="text", intent="category", assistant="About {category}: {text}")
    row = {"text": "card lost", "category": "lost_or_stolen_card"}
    found = check(row, columns, RULES, "f#0")
    assert found.messages == [
        {"role": "user", "content": "card lost", "intent": "lost_or_stolen_card"},
        {"role": "assistant", "content": "About lost or stolen card: card lost", "intent": None},
    ]
    assert found.intent == "lost_or_stolen_card"
    column = ColumnsConfig(user="text", assistant="reply")
    assert check(row | {"reply": "Ok."}, column, RULES, "f#0").messages[1]["content"] == "Ok."
    assert len(check(row, ColumnsConfig(user="text"), RULES, "f#0").messages) == 1
    assert reason({"text": ""}, columns, "f#0") == "empty_content"


def test_a_template_reads_columns_and_nothing_else() -> None:
    assert fill("{a b}{missing} {x.__class__}", {"a b": "one_two"}) == "one two "


@given(st.lists(st.sampled_from(ROLES), max_size=6))
def test_roles_alternate_after_an_optional_system_message(roles: list[str]) -> None:
    code = "".join(role[0] for role in roles)
    allowed = {system + ("ua" * 3)[:turns] for system in ("", "s") for turns in range(1, 7)}
    assert alternate(roles) == (code in allowed)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_record_or_refused(raw: bytes) -> None:
    found = attempt(lambda: parse(raw))
    assert isinstance(found, dict) or found.reason in RULE_NAMES


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=60),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
messages = st.fixed_dictionaries(
    {}, optional={"role": st.sampled_from([*ROLES, "bot"]) | anything, "content": anything, "intent": anything}
)
rows = st.fixed_dictionaries(
    {},
    optional={
        "conversation_id": anything,
        "messages": st.lists(messages, max_size=5) | anything,
        "channel": st.sampled_from(["web", "fax"]) | anything,
        "language": anything,
        "started_at": st.datetimes().map(lambda time: time.isoformat()) | anything,
    },
)


@given(rows)
def test_whatever_is_accepted_keeps_to_every_rule(row: dict[str, Any]) -> None:
    found = attempt(lambda: check(row, COLUMNS, RULES, None))
    if isinstance(found, Refusal):
        assert found.reason in RULE_NAMES
        return
    assert found.conversation_id
    assert found.channel in RULES.channels
    assert found.started_at is None or found.started_at <= NOW
    assert alternate([message["role"] for message in found.messages])
    for message in found.messages:
        assert 0 < len(message["content"]) <= RULES.max_message_chars
        message["content"].encode()
