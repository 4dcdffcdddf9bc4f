from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from app import lineage, tables
from app.config import Config
from app.errors import ModelError, TableError
from app.lineage import Lineage
from app.table_maintenance import drop
from app.versions import TableVersion
from tests.table_rows import add, rows, stage, table_of

MADE = Lineage(
    model="support",
    version=None,
    run_id="r1",
    stage="train",
    table="support.conversations",
    snapshot_id=42,
    sources=[{"uri": "sample:shop", "records": 10, "first_position": 0, "last_position": 9}],
    config_digest="c",
    code_version="d",
    job_id="job-1",
    parent=None,
    created_at=lineage.now(),
)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    lineage.write(tmp_path, MADE)
    assert lineage.read(str(tmp_path)) == MADE
    lineage.write(tmp_path, replace(MADE, version="3"))
    assert lineage.read(str(tmp_path)).version == "3"


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"model": "support"}'])
def test_a_damaged_lineage_is_a_sentence(tmp_path: Path, content: str) -> None:
    (tmp_path / lineage.FILE).write_text(content)
    with pytest.raises(ModelError, match=r"lineage\.json cannot be read"):
        lineage.read(str(tmp_path))


def test_a_folder_without_lineage_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"must be one that jobs\.train or jobs\.compress made"):
        lineage.read(str(tmp_path))


def extents(config: Config, version: TableVersion) -> list[tuple[str, int, int, int]]:
    return [tuple(source.values()) for source in lineage.sources_of(config, version)]  # type: ignore[misc]


def add_from(config: Config, source: str, numbers: range) -> TableVersion:
    """Rows of another source."""
    content = rows(numbers)
    at = content.schema.get_field_index("source")
    content = content.set_column(at, "source", pa.array([source] * content.num_rows))
    file = stage(table_of(config), content, tables.fresh_name())
    return TableVersion(config.ingestion.table, tables.append(table_of(config), [file], {}))


def test_the_sources_of_a_version_are_those_of_all_the_ingests_before_it(store: str) -> None:
    config = Config().with_overrides({"storage.uri": store})
    first = add(config, range(3, 10))
    second = add_from(config, "chats/0", range(20, 25))
    third = add(config, [1, 30])
    assert extents(config, first) == [("file:///in.jsonl", 7, 3, 9)]
    assert extents(config, second) == [("chats/0", 5, 20, 24), ("file:///in.jsonl", 7, 3, 9)]
    assert extents(config, third) == [("chats/0", 5, 20, 24), ("file:///in.jsonl", 9, 1, 30)]


def test_the_sources_of_expired_versions_are_not_lost(store: str) -> None:
    config = Config().with_overrides({"storage.uri": store})
    add(config, [100])
    earlier = [add_from(config, f"chats/{part}", range(10 * part, 10 * part + 4)) for part in range(2)]
    last = add(config, [101])
    before = lineage.sources_of(config, last)
    drop(table_of(config), [version.snapshot_id for version in earlier])
    assert not tables.exists(config, earlier[0])
    assert lineage.sources_of(config, last) == before
    assert [source["uri"] for source in before] == ["chats/0", "chats/1", "file:///in.jsonl"]


def test_a_version_that_is_not_there_has_no_sources(store: str) -> None:
    config = Config().with_overrides({"storage.uri": store})
    add(config, [1])
    with pytest.raises(TableError, match=r"support\.conversations@4711 does not exist"):
        lineage.sources_of(config, TableVersion("support.conversations", 4711))
