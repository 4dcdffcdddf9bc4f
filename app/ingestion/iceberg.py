"""Another Iceberg table of the same catalog as a source: a part for each of its data files, so that a later ingest
reads only the files that were added."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from app import tables
from app.errors import SourceError, TableError
from app.ingestion.formats import Piece, of_batches
from app.ingestion.parts import Read
from app.ingestion.streams import first_line
from app.settings.ingestion import IngestionConfig, SourceConfig
from app.versions import digest

if TYPE_CHECKING:
    from pyiceberg.table import FileScanTask, Table

    from app.config import StorageConfig


@dataclass(frozen=True)
class IcebergPart:
    """One data file of one snapshot."""

    uri: str
    source: int
    size_bytes: int
    storage: "StorageConfig"
    snapshot_id: int
    file: str
    deletes: tuple[str, ...]
    """Files that say which of its rows are gone."""

    @property
    def arrived_at(self) -> None:
        """Not known."""

    @property
    def mark(self) -> tuple[str, Any]:
        """A data file never changes, but more of its rows may be deleted."""
        return f"iceberg:{self.file}", digest(self.deletes)

    def reads(self, ingestion: IngestionConfig) -> Iterator[tuple[Read, int]]:
        """One task a data file."""
        yield partial(read, self, ingestion.sources[self.source], ingestion.batch_rows), self.size_bytes


def parts(source: SourceConfig, index: int, storage: "StorageConfig") -> list[IcebergPart]:
    """The data files of the table's newest snapshot, or of the one that the source names.

    Raises:
        SourceError: There is no such table or snapshot.
    """
    table, snapshot_id = _table(source, storage)
    name = source.name or f"{source.uri}@{snapshot_id}"
    return [
        IcebergPart(
            f"{name}/{task.file.file_path.rsplit('/', 1)[-1]}", index, task.file.file_size_in_bytes, storage,
            snapshot_id, task.file.file_path, tuple(sorted(file.file_path for file in task.delete_files)),
        )
        for task in sorted(_files(table, snapshot_id), key=lambda task: task.file.file_path)
    ]  # fmt: skip


def _table(source: SourceConfig, storage: "StorageConfig") -> "tuple[Table, int]":
    name = source.uri.removeprefix("iceberg:")
    try:
        table = tables.open_table(storage, name)
    except TableError as error:
        raise SourceError(error.what, "check ingestion.sources and storage.catalog_uri") from None
    snapshot = table.current_snapshot() if source.snapshot_id is None else table.snapshot_by_id(source.snapshot_id)
    if snapshot is None:
        raise SourceError(
            f"table {name} has no snapshot {source.snapshot_id or ''}".rstrip(), "check ingestion.sources"
        )
    return table, snapshot.snapshot_id


def _files(table: "Table", snapshot_id: int) -> "list[FileScanTask]":
    return list(table.scan(snapshot_id=snapshot_id).plan_files())


def read(part: IcebergPart, source: SourceConfig, batch_rows: int) -> Iterator[Piece]:
    """The rows of one data file that are not deleted; positions count them from 0.

    Raises:
        SourceError: The file is gone, or the table lacks a column that the source's mapping names.
    """
    from pyiceberg.expressions import AlwaysTrue
    from pyiceberg.io.pyarrow import ArrowScan, schema_to_pyarrow

    table, snapshot_id = _table(source.model_copy(update={"snapshot_id": part.snapshot_id}), part.storage)
    tasks = [task for task in _files(table, snapshot_id) if task.file.file_path == part.file]
    if not tasks:
        raise SourceError(f"{part.uri} is no longer part of its table", "run the job again")
    schema = schema_to_pyarrow(table.schema(), include_field_ids=False)
    try:
        scan = ArrowScan(table.metadata, table.io, table.schema(), AlwaysTrue(), case_sensitive=True)
        yield from of_batches(schema, scan.to_record_batches(tasks), source.columns, batch_rows)
    except (OSError, pa.ArrowException, ValueError) as error:
        raise SourceError(
            f"cannot read {part.uri} ({first_line(error)})", "check the table and ingestion.sources"
        ) from None
