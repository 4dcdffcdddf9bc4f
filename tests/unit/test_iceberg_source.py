"""Another Iceberg table as a source: real tables under a temporary folder."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from app import tables
from app.config import Config
from app.errors import SourceError
from app.ingestion.sources import mark_of, parts_of
from tests.table_rows import stage

NAME = "crm.tickets"
SCHEMA = pa.schema(
    [("id", pa.string()), ("question", pa.string()), ("at", pa.timestamp("us", "UTC")), ("raw", pa.binary())]
)


def config(store: str, **source: Any) -> Config:
    columns = {"conversation_id": "id", "user": "question", "ignored": ["*"]}
    given = {"uri": f"iceberg:{NAME}", "format": "iceberg", "columns": columns, **source}
    return Config().with_overrides({"storage.uri": store, "ingestion.sources": [given], "ingestion.batch_rows": 4})


def add(store: str, start: int, stop: int) -> int:
    """Append rows as one data file; returns the snapshot."""
    table = tables.open_table(config(store).storage, NAME, SCHEMA)
    rows = [{"id": f"t{n}", "question": f"Where is {n}?", "at": None, "raw": b"x"} for n in range(start, stop)]
    return tables.append(table, [stage(table, pa.Table.from_pylist(rows, SCHEMA), tables.fresh_name())], {})


def read(config: Config, marks: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
    parts = parts_of(config, marks)
    ids = [
        json.loads(raw)["id"]
        for part in parts
        for call, _ in part.reads(config.ingestion)
        for piece in call()
        for raw in piece.raw
    ]
    return sorted(ids, key=lambda name: int(name[1:])), marks | dict(
        mark for part in parts if (mark := mark_of(config, part))
    )


def names(start: int, stop: int) -> list[str]:
    return [f"t{n}" for n in range(start, stop)]


def test_a_table_is_read_a_part_for_each_data_file(store: str) -> None:
    add(store, 0, 10)
    add(store, 10, 15)
    parts = parts_of(config(store), {})
    assert len(parts) == 2
    pieces = [piece for part in parts for call, _ in part.reads(config(store).ingestion) for piece in call()]
    assert sorted(len(piece.raw) for piece in pieces) == [1, 2, 4, 4, 4]
    assert all(piece.identified for piece in pieces)
    assert read(config(store), {})[0] == names(0, 15)
    assert all(part.uri.startswith(f"iceberg:{NAME}@") for part in parts)


def test_a_later_ingest_reads_only_the_data_files_that_were_added(store: str) -> None:
    add(store, 0, 10)
    ids, marks = read(config(store), {})
    assert ids == names(0, 10)
    assert read(config(store), marks) == ([], marks)
    add(store, 10, 15)
    ids, marks = read(config(store), marks)
    assert ids == names(10, 15)
    json.dumps(marks)


def test_deleted_rows_are_not_read(store: str) -> None:
    add(store, 0, 10)
    table = tables.open_table(config(store).storage, NAME)
    table.delete("id == 't3'")
    assert read(config(store), {})[0] == [name for name in names(0, 10) if name != "t3"]


def test_rows_that_a_delete_file_takes_away_are_not_read(store: str) -> None:
    add(store, 0, 10)
    before = read(config(store), {})[1]
    delete_by_file(store, [2, 5])
    ids, marks = read(config(store), before)
    assert ids == [name for name in names(0, 10) if name not in ("t2", "t5")]
    assert marks != before


def test_an_older_snapshot_can_be_named(store: str) -> None:
    first = add(store, 0, 3)
    add(store, 3, 6)
    assert read(config(store, snapshot_id=first), {})[0] == names(0, 3)
    with pytest.raises(SourceError, match="has no snapshot 7"):
        read(config(store, snapshot_id=7), {})


def test_a_table_that_is_not_there_or_lacks_a_column_is_named(store: str) -> None:
    with pytest.raises(SourceError, match=f"no table {NAME}"):
        read(config(store), {})
    add(store, 0, 3)
    with pytest.raises(SourceError, match=r"has no columns\.user 'text'"):
        read(config(store, columns={"user": "text"}), {})


def test_a_data_file_that_is_gone_is_named(store: str) -> None:
    add(store, 0, 3)
    parts = parts_of(config(store), {})
    (file,) = Path(store).glob("tables/crm/tickets/data/*.parquet")
    file.unlink()
    with pytest.raises(SourceError, match=file.name):
        [list(call()) for part in parts for call, _ in part.reads(config(store).ingestion)]


def delete_by_file(store: str, positions: list[int]) -> None:
    """Delete rows of the only data file as other engines do: by a file of positions beside it."""
    import pyarrow.parquet as pq
    from pyiceberg.manifest import DataFile, DataFileContent, FileFormat
    from pyiceberg.typedef import Record

    table = tables.open_table(config(store).storage, NAME)
    (task,) = table.scan().plan_files()
    ids = {b"PARQUET:field_id": b"2147483546"}, {b"PARQUET:field_id": b"2147483545"}
    schema = pa.schema([pa.field("file_path", pa.string(), False, ids[0]), pa.field("pos", pa.int64(), False, ids[1])])
    path = f"{store}/tables/crm/tickets/data/deletes.parquet"
    content = pa.table({"file_path": [task.file.file_path] * len(positions), "pos": positions}, schema=schema)
    pq.write_table(content, path)
    file = DataFile.from_args(
        content=DataFileContent.POSITION_DELETES, file_path=f"file://{path}", file_format=FileFormat.PARQUET,
        partition=Record(), record_count=len(positions), file_size_in_bytes=Path(path).stat().st_size,
    )  # fmt: skip
    file.spec_id = table.metadata.default_spec_id
    commit(table, file)


def commit(table: Any, file: Any) -> None:
    from pyiceberg.manifest import ManifestContent, ManifestWriterV2
    from pyiceberg.table.update.snapshot import _FastAppendFiles

    class DeleteManifest(ManifestWriterV2):
        def content(self) -> ManifestContent:
            return ManifestContent.DELETES

    class AddDeletes(_FastAppendFiles):
        def new_manifest_writer(self, spec: Any) -> Any:
            return DeleteManifest(spec, table.schema(), self.new_manifest_output(), self.snapshot_id, "deflate")

    from pyiceberg.table.snapshots import Operation

    with table.transaction() as transaction, AddDeletes(Operation.APPEND, transaction, table.io) as producer:
        producer.append_data_file(file)
