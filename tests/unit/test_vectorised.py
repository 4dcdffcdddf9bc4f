import json
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.conversation import ROLES
from app.ingestion import sample
from app.ingestion.quality import Conversation, Refusal, Rules, check, known_columns, parse
from app.ingestion.vectorised import plain
from app.settings.ingestion import ColumnsConfig, IngestionConfig

NOW = datetime(2026, 1, 1, tzinfo=UTC)
COLUMNS = ColumnsConfig()
RULES = Rules.of(IngestionConfig(max_message_chars=50, max_messages=4, channels=("web", "unknown")), NOW)
STRICT = Rules(50, 4, frozenset({"web", "unknown"}), NOW, frozenset({"en"}), frozenset({"refund"}))


def one_by_one(raw: bytes, rules: Rules) -> Conversation | Refusal:
    try:
        return check(parse(raw), COLUMNS, rules, "made", known_columns(COLUMNS))
    except Refusal as refusal:
        return refusal


def agrees(records: list[bytes], rules: Rules) -> int:
    """Compare with the record by record way; returns how many were plain."""
    found = plain(pa.array(records, pa.binary()), COLUMNS, rules, known_columns(COLUMNS))
    assert list(found.places) == sorted(set(found.places.tolist()))
    for place, row in zip(found.places, found.rows.to_pylist(), strict=True):
        wanted = one_by_one(records[place], rules)
        assert isinstance(wanted, Conversation), (records[place], wanted)
        got = row | {"conversation_id": row["conversation_id"] or "made"}
        assert got == {name: getattr(wanted, name) for name in got}, records[place]
    return len(found.places)


text = st.sampled_from(["hi", "two words", " edge", "a  b", "", "é", "tab\there", "x" * 51, "4512"]) | st.text(
    max_size=8
)
message = st.fixed_dictionaries(
    {"role": st.sampled_from([*ROLES, "bot"]), "content": text},
    optional={
        "intent": st.none() | st.sampled_from(["refund", "other", ""]) | text,
        "timestamp": st.just("2025-01-01"),
        "extra": st.integers(),
    },
)
turns = st.lists(message, max_size=5) | st.lists(text, max_size=4).map(
    lambda texts: [{"role": ROLES[1 + place % 2], "content": content} for place, content in enumerate(texts)]
)
anything = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | text | st.lists(st.integers())
record = st.fixed_dictionaries(
    {"messages": turns | anything},
    optional={
        "conversation_id": text | st.integers(),
        "channel": st.sampled_from(["web", "Web", "fax", "", None]) | anything,
        "language": st.sampled_from(["en", "fr", "", None]) | anything,
        "started_at": st.sampled_from(
            ["2025-06-01T10:00:00Z", "2025-13-41T25:61:00Z", "2199-01-01T00:00:00Z", "2025-06-01 10:00:00+00:00"]
        )
        | st.datetimes().map(lambda time: time.isoformat() + "Z")
        | anything,
        "extra": anything,
    },
)


@settings(max_examples=300, deadline=None)
@given(st.lists(record.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=20), max_size=8))
def test_what_is_plain_is_what_the_rules_accept_with_the_same_values(records: list[bytes]) -> None:
    agrees(records, RULES)
    agrees(records, STRICT)


def test_nearly_all_faultless_records_of_the_shop_are_plain_and_the_rest_is_left() -> None:
    rules = Rules.of(IngestionConfig(), NOW)
    faultless = list(sample.lines(7, 0, 500, 0.0))
    assert agrees(faultless, rules) > 450  # accents are left to the rules
    assert 400 < agrees(list(sample.lines(7, 0, 500, 0.1)), rules) < agrees(faultless, rules)


def records(*numbers: int) -> list[bytes]:
    return [
        json.dumps(
            {"conversation_id": f"c{number}", "messages": [{"role": "user", "content": f"order {number}"}]}
        ).encode()
        for number in numbers
    ]


@pytest.mark.parametrize("bad", [b'{"a":', b"[]", b"", b"{}\n{}", b'{"messages": 5}', b'{"channel": [1]}', b"\xff"])
def test_one_bad_record_costs_no_other(bad: bytes) -> None:
    some = records(*range(9))
    for place in range(10):
        found = plain(pa.array([*some[:place], bad, *some[place:]], pa.binary()), COLUMNS, RULES, None)
        assert np.array_equal(found.places, np.delete(np.arange(10), place))
        assert found.rows["conversation_id"].to_pylist() == [f"c{number}" for number in range(9)]


def test_where_most_are_bad_all_are_left() -> None:
    found = plain(pa.array([b"{]}"] * 100 + records(1), pa.binary()), COLUMNS, RULES, None)
    assert len(found.places) == 0


def test_one_turn_tables_are_left() -> None:
    columns: Any = ColumnsConfig(user="text")
    assert len(plain(pa.array(records(1, 2), pa.binary()), columns, RULES, None).places) == 0
