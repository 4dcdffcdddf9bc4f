import itertools
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pytest

from app.conversation import MESSAGES
from app.ingestion.columns import ACCEPTED, documents, filled, messages_of, table_of
from app.ingestion.imputation import Imputer
from app.ingestion.quality import Conversation
from app.settings.ingestion import ImputationConfig

ARRIVED = datetime(2025, 6, 1, 12, tzinfo=UTC)


def conversation(number: int, **known: Any) -> Conversation:
    fields: dict[str, Any] = {"channel": "web", "language": "en", "started_at": ARRIVED, "intent": "refund"}
    messages = [
        {"role": "user", "content": f"Where is order {number}?", "intent": "refund" if number % 2 else None},
        {"role": "assistant", "content": "On its way."},
    ][: 1 + number % 2]
    return Conversation(**({"conversation_id": f"c{number}", "messages": messages} | fields | known))


def test_conversations_are_rows_with_all_they_hold() -> None:
    found = [conversation(0, warnings=["mojibake"]), conversation(1, imputed=["channel"], masked=2, started_at=None)]
    rows = table_of(found)
    assert rows.schema.equals(ACCEPTED)
    for row, entry in zip(rows.to_pylist(), found, strict=True):
        messages = [{"intent": None} | dict(message) for message in entry.messages]
        assert row == vars(entry) | {"messages": messages}
    assert table_of([]).num_rows == 0


def test_messages_are_as_arrow_would_make_them() -> None:
    found = [conversation(number) for number in range(5)]
    assert messages_of(found).equals(pa.array([entry.messages for entry in found], MESSAGES))


def test_a_document_is_a_line_a_message() -> None:
    column = pa.array([[{"content": "one"}, {"content": "two"}], [], [{"content": "three"}]], MESSAGES)
    assert documents(column).to_pylist() == ["one\ntwo", "", "three"]
    assert documents(column[2:]).to_pylist() == ["three"]


LACKING = [dict(zip(("channel", "language", "started_at"), values, strict=True)) for values in itertools.product(
    ("web", "unknown"), ("en", None), (ARRIVED, None)
)]  # fmt: skip


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"languages": ()},
        {"channel": "app"},
        {"started_at": True},
        {"channel": "app", "languages": ("de",), "started_at": True},
    ],
)
@pytest.mark.parametrize("arrived_at", [datetime(2025, 7, 1, tzinfo=UTC), None])
def test_columns_are_filled_in_as_records_are(settings: dict[str, Any], arrived_at: datetime | None) -> None:
    imputer = Imputer(ImputationConfig(**settings))
    found = [conversation(number, **known) for number, known in enumerate(LACKING)]
    one_by_one = table_of([imputer.fill(entry, arrived_at) for entry in found]).to_pylist()
    arrived = pa.chunked_array([pa.array([arrived_at] * len(found), pa.timestamp("ms", tz="UTC"))])
    rows, right = filled(table_of(found).drop_columns(["imputed", "masked"]), imputer, arrived)
    assert right.all()
    assert rows.to_pylist() == [{name: row[name] for name in rows.column_names} for row in one_by_one]


def test_what_depends_on_the_text_is_left_to_the_imputer() -> None:
    found = [conversation(number, language=language) for number, language in enumerate(("en", None, "de"))]
    imputer = Imputer(ImputationConfig(languages=("en", "de")))
    unknown = pa.chunked_array([pa.nulls(len(found), pa.timestamp("ms", tz="UTC"))])
    rows, right = filled(table_of(found).drop_columns(["imputed", "masked"]), imputer, unknown)
    assert right.tolist() == [True, False, True]
    assert rows["imputed"].to_pylist() == [[], [], []]
