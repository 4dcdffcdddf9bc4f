import json
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest

from app import tables
from app.config import Config
from app.conversation import SCHEMA
from app.errors import TableError
from app.table_diff import compared, diff, write_report
from app.table_versions import rollback
from app.versions import TableVersion
from tests.table_rows import add, row, stage, table_of


@pytest.fixture
def config(store: str) -> Config:
    return Config().with_overrides({"storage.uri": store})


def keys(*pairs: tuple[str | None, str]) -> pl.DataFrame:
    return pl.DataFrame(
        {"conversation_id": [pair[0] for pair in pairs], "content_hash": [pair[1] for pair in pairs]},
        schema={"conversation_id": pl.String, "content_hash": pl.String},
    )


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ([], [], (0, 0, 0)),
        ([("a", "1")], [("a", "1")], (0, 0, 0)),
        ([("a", "1")], [("a", "2")], (0, 0, 1)),
        ([("a", "1")], [("b", "1")], (1, 1, 0)),
        ([("a", "1")], [("a", "1"), ("a", "1")], (1, 0, 0)),
        ([("a", "1"), ("a", "2")], [("a", "3")], (0, 1, 1)),
        ([(None, "1"), (None, "2")], [(None, "2"), (None, "3")], (1, 1, 0)),
    ],
)
def test_rows_are_compared_by_id_and_content(
    old: list[tuple[str | None, str]], new: list[tuple[str | None, str]], expected: tuple[int, int, int]
) -> None:
    assert compared(keys(*old), keys(*new)) == expected


def replaced(config: Config, numbers: list[int], rows: list[dict[str, Any]]) -> TableVersion:
    """A version in which the file that holds `numbers` holds other rows."""
    from app.table_commits import replace
    from app.table_files import Manifests

    table = table_of(config)
    files = Manifests(table).data_files(table.current_snapshot()).values()
    gone = [file for file in files if file.record_count == len(numbers)]
    staged = stage(table, pa.Table.from_pylist(rows, schema=SCHEMA), tables.fresh_name())
    return TableVersion(config.ingestion.table, replace(table, gone, [staged], {}))


def test_what_was_added_removed_and_changed_is_counted(config: Config) -> None:
    add(config, range(100))
    old = add(config, [200, 201, 202])
    new = replaced(config, [200, 201, 202], [row(200), row(201, again=5), row(300), row(301)])
    found = diff(config, old, new)
    assert (found.old_rows, found.new_rows) == (103, 104)
    assert (found.added, found.removed, found.changed) == (2, 1, 1)
    assert found.files_compared == 2, "the file that both have is not compared"
    back = diff(config, new, old)
    assert (back.added, back.removed, back.changed) == (1, 2, 1)


def test_a_version_does_not_differ_from_itself(config: Config) -> None:
    version = add(config, range(5))
    found = diff(config, version, version)
    assert (found.added, found.removed, found.changed, found.files_compared) == (0, 0, 0, 0)
    assert set(found.shifts.values()) == {0.0}


def test_two_branches_of_history_are_compared(config: Config) -> None:
    first, left = add(config, [1]), add(config, [2, 3])
    rollback(config, first)
    right = add(config, [3, 4])
    found = diff(config, left, right)
    assert (found.added, found.removed, found.changed) == (1, 1, 0)


def test_distributions_say_how_the_whole_has_shifted(config: Config) -> None:
    old = add(config, range(10))
    new = add(config, range(11, 31, 2))
    found = diff(config, old, new)
    before, after = found.as_json()["distributions"]["old"], found.as_json()["distributions"]["new"]
    assert before["intent"] == {"order_status": 5, "refund": 5}
    assert after["intent"] == {"order_status": 15, "refund": 5}
    assert found.shifts["intent"] == pytest.approx(0.25)
    assert before["channel"] == {"web": 10}
    assert after["turns"] == {"2": 20}
    assert found.shifts["turns"] == found.shifts["language"] == 0.0
    assert sum(after["message_chars"].values()) == 40


def test_missing_values_are_a_category_and_empty_conversations_do_not_stop_it(config: Config) -> None:
    old = add(config, [1])
    table = table_of(config)
    rows = [row(5) | {"channel": None, "messages": []}, row(6) | {"channel": "app", "messages": None}]
    staged = stage(table, pa.Table.from_pylist(rows, schema=SCHEMA), "odd")
    found = diff(config, old, TableVersion(old.table, tables.append(table, [staged], {})))
    assert found.as_json()["distributions"]["new"]["channel"] == {"web": 1, "(none)": 1, "app": 1}
    assert found.as_json()["distributions"]["new"]["turns"] == {"0": 2, "2": 1}


def test_the_report_is_one_page_with_the_figures(config: Config) -> None:
    old, new = add(config, range(10)), add(config, range(11, 31, 2))
    found = diff(config, old, new)
    uri = write_report(config, found)
    text = Path(uri).read_text()
    assert text.startswith("<!doctype html>")
    assert "<script" not in text
    assert text.count('<figure class="bars">') == 5
    for said in (str(old.snapshot_id), str(new.snapshot_id), "added", "order_status", "25.0% of it has moved"):
        assert said in text, said
    content = json.loads(Path(uri).with_name("report.json").read_text())
    assert content == json.loads(json.dumps(found.as_json()))
    assert content["added"] == 10


def test_markup_in_a_category_is_text_on_the_page(config: Config) -> None:
    old = add(config, [1])
    table = table_of(config)
    rows = pa.Table.from_pylist([row(2) | {"intent": "<img src=x onerror=alert(1)>"}], schema=SCHEMA)
    new = TableVersion(old.table, tables.append(table, [stage(table, rows, "markup")], {}))
    assert "<img" not in Path(write_report(config, diff(config, old, new))).read_text()


def test_versions_of_different_tables_are_not_compared(config: Config) -> None:
    with pytest.raises(TableError, match="are of different tables: compare two versions of one"):
        diff(config, add(config, [1]), add(config, [1], name="support.others"))


def test_a_table_of_something_else_is_refused(config: Config) -> None:
    schema = pa.schema([("reason", pa.string())])
    table = tables.open_table(config.storage, "support.quarantine", schema)
    file = stage(table, pa.table({"reason": ["x"]}), "one")
    version = TableVersion("support.quarantine", tables.append(table, [file], {}))
    with pytest.raises(TableError, match="has no columns conversation_id and content_hash"):
        diff(config, version, version)
