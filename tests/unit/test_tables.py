from pathlib import Path

import pyarrow as pa
import pytest

from app import tables
from app.config import Config
from app.conversation import SCHEMA, content_hash, split_of
from app.errors import ConfigError, StageFailed, TableError
from app.table_versions import tag
from app.versions import TableVersion
from tests.table_rows import stage


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config().with_overrides({"storage.uri": str(tmp_path / "store")})


def rows(*numbers: int) -> pa.Table:
    made = []
    for number in numbers:
        messages = [{"role": "user", "content": f"order {number}?", "intent": "order_status"}]
        key = content_hash(messages)  # type: ignore[arg-type]
        made.append(
            {
                "conversation_id": f"c{number}",
                "messages": messages,
                "content_hash": key,
                "split": split_of(key, 0.5),
                "source": "test",
                "position": number,
            }
        )
    return pa.Table.from_pylist(made, schema=SCHEMA)


def add(config: Config, *numbers: int, name: str = "part") -> TableVersion:
    table = tables.open_table(config.storage, config.ingestion.table, SCHEMA)
    file = stage(table, rows(*numbers), f"{name}-{numbers[0]}")
    return TableVersion(config.ingestion.table, tables.append(table, [file], {"rayloop.n": str(len(numbers))}))


def test_a_table_that_is_not_there_is_named_and_nothing_is_made(config: Config) -> None:
    with pytest.raises(TableError, match=r"no table support\.conversations under .* run jobs\.ingest first"):
        tables.latest(config)
    assert not tables.exists(config, TableVersion("support.conversations", 1))
    assert not Path(config.storage.uri).exists()


def test_each_append_is_a_version_and_earlier_ones_stay(config: Config) -> None:
    first, second = add(config, 1, 2), add(config, 3)
    assert tables.latest(config) == tables.version(config) == second
    assert tables.read_local(config, first).num_rows == 2
    assert tables.read_local(config, second).num_rows == tables.rows(config, second) == 3
    assert tables.summary(config, first) == {"rayloop.n": "2"}
    tag(config, first, "train-2026-11")
    assert tables.version(config.with_overrides({"inputs.snapshot_id": "train-2026-11"})) == first
    chosen = config.with_overrides({"inputs.snapshot_id": first.snapshot_id})
    assert tables.version(chosen) == first
    assert tables.exists(config, first)


def test_a_version_that_does_not_exist_is_refused_with_those_that_do(config: Config) -> None:
    only = add(config, 1)
    with pytest.raises(TableError, match=rf"support\.conversations@42 does not exist: .*{only.snapshot_id}"):
        tables.version(config.with_overrides({"inputs.snapshot_id": 42}))


def test_rows_come_back_as_they_were_written(config: Config) -> None:
    found = tables.read_local(config, add(config, 5, 6, 7))
    assert found.schema.names == SCHEMA.names
    assert found.cast(SCHEMA).sort_by("position") == rows(5, 6, 7)
    assert str(found.schema.field("started_at").type) == "timestamp[us, tz=UTC]"


def test_a_limited_read_is_the_first_by_hash_of_any_order_of_writing(config: Config, tmp_path: Path) -> None:
    other = Config().with_overrides({"storage.uri": str(tmp_path / "other")})
    version = add(config, *range(60))
    add(other, *range(59, 29, -1))
    other_version = add(other, *range(29, -1, -1))
    for split in (None, "train", "validation"):
        whole = tables.read_local(config, version, ["content_hash", "messages"], split)
        assert whole["content_hash"].to_pylist() == sorted(whole["content_hash"].to_pylist())
        for limit in (0, 1, 10, 1_000):
            found = tables.read_local(config, version, ["content_hash", "messages"], split, limit)
            assert found == whole.slice(0, limit)
            assert found == tables.read_local(other, other_version, ["content_hash", "messages"], split, limit)
    assert tables.read_local(config, version, ["position"], limit=3).schema.names == ["position"]


def test_staging_again_replaces_the_file_and_is_seen_by_nobody(config: Config) -> None:
    version = add(config, 1)
    table = tables.open_table(config.storage, config.ingestion.table)
    files = {stage(table, rows(*numbers), "task-0") for numbers in ((2, 3), (2, 3), (2,))}
    assert len(files) == 1
    assert tables.latest(config) == version
    assert tables.read_local(config, version).num_rows == 1
    tables.append(table, sorted(files), {})
    assert tables.read_local(config, tables.latest(config))["position"].to_pylist() in ([1, 2], [2, 1])


def test_of_two_writers_with_the_same_history_the_second_is_refused(config: Config) -> None:
    add(config, 1)
    mine, theirs = (tables.open_table(config.storage, config.ingestion.table) for _ in range(2))
    their_file, my_file = stage(theirs, rows(2), "theirs"), stage(mine, rows(2), "mine")
    tables.append(theirs, [their_file], {})
    with pytest.raises(StageFailed, match=r"changed by another writer .* run the job again"):
        tables.append(mine, [my_file], {})
    assert tables.read_local(config, tables.latest(config)).num_rows == 2


def test_discarded_files_are_gone(config: Config) -> None:
    table = tables.open_table(config.storage, config.ingestion.table, SCHEMA)
    file = stage(table, rows(1), "x")
    tables.discard(table, [file])
    assert not Path(file.removeprefix("file://")).exists()


@pytest.mark.parametrize("name", ["conversations", "a.b.c", ".x", "x."])
def test_a_table_name_has_a_namespace(config: Config, name: str) -> None:
    with pytest.raises(ConfigError, match=r"write it as namespace\.name"):
        tables.open_table(config.storage, name, SCHEMA)


def test_remote_storage_needs_a_catalog() -> None:
    remote = Config().with_overrides({"storage.uri": "s3://bucket/root"})
    with pytest.raises(ConfigError, match=r"set storage\.catalog_uri"):
        tables.latest(remote)
    named = remote.with_overrides({"storage.catalog_uri": "postgresql://host/iceberg"})
    assert tables.catalog_properties(named.storage)["warehouse"] == "s3://bucket/root/tables"


@pytest.mark.parametrize("folder", ["a#b", "a?b", "a%20b"])
def test_a_folder_in_which_iceberg_would_lose_its_files_is_refused(tmp_path: Path, folder: str) -> None:
    config = Config().with_overrides({"storage.uri": str(tmp_path / folder)})
    with pytest.raises(ConfigError, match=r"Iceberg cannot name files below a folder with [#?%]: choose"):
        tables.open_table(config.storage, config.ingestion.table, SCHEMA)
    assert not list(tmp_path.iterdir())


def test_a_damaged_catalog_is_an_error_that_says_so(config: Config) -> None:
    add(config, 1)
    (Path(config.storage.uri) / "catalog.db").write_bytes(b"this is not a database" * 100)
    with pytest.raises(TableError, match="catalog"):
        tables.latest(config)
