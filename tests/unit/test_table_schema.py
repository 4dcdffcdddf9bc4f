import pyarrow as pa
import pytest

from app import tables
from app.config import Config
from app.conversation import SCHEMA
from app.errors import TableError
from app.ingestion.quarantine import QUARANTINE
from app.table_schema import ADDED, check, differences, evolve
from app.versions import TableVersion
from tests.table_rows import add, ids, rows, stage, table_of

BEFORE = pa.schema([field for field in SCHEMA if field.name not in ADDED])
LATER = [name for name in ADDED if name in SCHEMA.names]
FIRST = {
    "conversations": "conversation_id channel language started_at intent messages content_hash split source position",
    "quarantine": "source position reason detail raw raw_bytes refusal_hash",
}
"""The columns of the first tables that there were."""


@pytest.fixture
def config(store: str) -> Config:
    return Config().with_overrides({"storage.uri": store})


def made_before(config: Config, *numbers: int) -> TableVersion:
    """A version of a table that an earlier version of the code made."""
    table = tables.open_table(config.storage, config.ingestion.table, BEFORE)
    file = stage(table, rows(numbers).select(BEFORE.names), "before")
    return TableVersion(config.ingestion.table, tables.append(table, [file], {}))


def test_columns_that_came_later_are_added_and_null_in_earlier_rows(config: Config) -> None:
    old = made_before(config, 1, 2)
    table = tables.open_table(config.storage, config.ingestion.table, SCHEMA)
    assert [field.name for field in table.schema().fields] == SCHEMA.names
    extra = rows([3]).set_column(SCHEMA.get_field_index("masked"), SCHEMA.field("masked"), pa.array([7], pa.int32()))
    new = TableVersion(config.ingestion.table, tables.append(table, [stage(table, extra, "new")], {}))
    found = tables.read_local(config, new, ["position", "masked", "minhash"]).sort_by("position").to_pylist()
    assert [row["masked"] for row in found] == [None, None, 7]
    assert [row["minhash"] for row in found] == [None, None, None]
    assert tables.read_local(config, old, ["masked"])["masked"].to_pylist() == [None, None], "time travel still works"
    assert tables.read_local(config, old).schema.names == SCHEMA.names


@pytest.mark.parametrize(("name", "schema"), [("conversations", SCHEMA), ("quarantine", QUARANTINE)])
def test_the_first_tables_that_there_were_can_still_be_written(config: Config, name: str, schema: pa.Schema) -> None:
    first = pa.schema([schema.field(column) for column in FIRST[name].split()])
    tables.open_table(config.storage, f"old.{name}", first)
    table = tables.open_table(config.storage, f"old.{name}", schema)
    assert [field.name for field in table.schema().fields] == schema.names


def test_opening_a_table_to_read_it_changes_nothing(config: Config) -> None:
    old = made_before(config, 1)
    table = tables.open_table(config.storage, config.ingestion.table)
    assert [field.name for field in table.schema().fields] == BEFORE.names
    assert ids(config, old) == ["conversation-1"]
    assert table.metadata_location == table_of(config).metadata_location


def test_adding_columns_twice_is_adding_them_once(config: Config) -> None:
    made_before(config, 1)
    table = table_of(config)
    assert evolve(table, SCHEMA) == LATER
    assert evolve(table, SCHEMA) == []


def test_of_two_who_add_the_columns_at_once_the_second_finds_them(config: Config) -> None:
    made_before(config, 1)
    mine, theirs = table_of(config), table_of(config)
    assert evolve(theirs, SCHEMA) == LATER
    assert evolve(mine, SCHEMA) == [], "its own commit was refused, and it looked again"
    assert [field.name for field in mine.schema().fields] == SCHEMA.names


def test_an_unexpected_column_is_refused_and_not_added(config: Config) -> None:
    add(config, [1])
    wider = SCHEMA.append(pa.field("mood", pa.string()))
    with pytest.raises(TableError, match=r"do not fit: mood is missing in the table and string to the code: let the"):
        tables.open_table(config.storage, config.ingestion.table, wider)
    assert [field.name for field in table_of(config).schema().fields] == SCHEMA.names


def test_a_column_that_another_engine_added_is_refused_by_name(config: Config) -> None:
    add(config, [1])
    with table_of(config).update_schema() as update:
        update.union_by_name(pa.schema([("mood", pa.string())]))
    with pytest.raises(TableError, match="mood is string in the table and unknown to the code"):
        add(config, [2])
    assert ids(config, tables.latest(config)) == ["conversation-1"], "reading goes on"


def test_every_difference_is_named_at_once(config: Config) -> None:
    found = pa.schema([("a", pa.int64()), ("b", pa.string()), ("c", pa.string())])
    wanted = pa.schema([("a", pa.string()), ("b", pa.large_string()), ("d", pa.list_(pa.string()))])
    assert differences(found, wanted) == [
        "a is int64 in the table and string to the code",
        "d is missing in the table and list<string> to the code",
        "c is string in the table and unknown to the code",
    ]


def test_the_order_of_columns_does_not_matter(config: Config) -> None:
    add(config, [1])
    check(table_of(config), pa.schema(list(SCHEMA)[::-1]))


def test_a_missing_column_that_is_not_known_as_added_is_refused(config: Config) -> None:
    lacking = pa.schema([field for field in SCHEMA if field.name != "language"])
    tables.open_table(config.storage, config.ingestion.table, lacking)
    with pytest.raises(TableError, match="language is missing in the table and string to the code"):
        tables.open_table(config.storage, config.ingestion.table, SCHEMA)
