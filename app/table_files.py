"""The files behind a table's versions: which of them a version needs, what lies beside them, reading and rewriting.

Tables with delete files (merge-on-read, which other engines may write) are refused: their data files do not say which
rows are there.
"""

import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from pyarrow import fs

from app.errors import StorageError, TableError
from app.storage import open_uri
from app.table_schema import name_of, top_level
from app.tables import file_schema, sync_file

if TYPE_CHECKING:
    from pyiceberg.manifest import DataFile, ManifestFile
    from pyiceberg.table import Table
    from pyiceberg.table.snapshots import Snapshot

BATCH_ROWS = 4_096
ROW_GROUP_BYTES = 32 << 20
"""Arrow bytes that are held before a row group is written."""


class Manifests:
    """The manifests of a table's snapshots, each read once however many snapshots share it.

    Raises:
        TableError: One is gone or damaged.
    """

    def __init__(self, table: "Table") -> None:
        self._table = table
        self._entries: dict[str, list[tuple[DataFile, bool]]] = {}

    def of(self, snapshot: "Snapshot") -> "list[ManifestFile]":
        """The manifests that a snapshot is made of."""
        with self._read(snapshot.manifest_list):
            return snapshot.manifests(self._table.io)

    def entries(self, manifest: "ManifestFile") -> "list[tuple[DataFile, bool]]":
        """The files that a manifest describes, each with whether it is there or was taken out."""
        from pyiceberg.manifest import ManifestEntryStatus

        if manifest.manifest_path not in self._entries:
            with self._read(manifest.manifest_path):
                found = manifest.fetch_manifest_entry(self._table.io, discard_deleted=False)
            self._entries[manifest.manifest_path] = [
                (entry.data_file, entry.status != ManifestEntryStatus.DELETED) for entry in found
            ]
        return self._entries[manifest.manifest_path]

    @contextmanager
    def _read(self, uri: str) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, EOFError) as error:
            raise TableError(
                f"{uri}, which says what is in a version of table {name_of(self._table)}, cannot be read ({error})",
                "if another job removed that version just now, run this one again; else restore the file from a backup",
            ) from error

    def data_files(self, snapshot: "Snapshot") -> "dict[str, DataFile]":
        """The data files that hold a snapshot's rows, by URI.

        Raises:
            TableError: The snapshot has delete files.
        """
        from pyiceberg.manifest import DataFileContent

        found = {}
        for manifest in self.of(snapshot):
            for file, there in self.entries(manifest):
                if there and file.content != DataFileContent.DATA:
                    raise TableError(
                        f"snapshot {snapshot.snapshot_id} of table {name_of(self._table)} has delete files, which "
                        "another engine wrote",
                        "let that engine rewrite the table's data files, then run this again",
                    )
                if there:
                    found[file.file_path] = file
        return found

    def needed(self, snapshots: "Iterable[Snapshot]") -> set[str]:
        """The URIs of all files without which some of the snapshots could not be read."""
        found: set[str] = set()
        for snapshot in snapshots:
            found.add(snapshot.manifest_list)
            for manifest in self.of(snapshot):
                found.add(manifest.manifest_path)
                found.update(file.file_path for file, there in self.entries(manifest) if there)
        return found

    def mentions(self, snapshot: "Snapshot", files: set[str]) -> bool:
        """Whether a snapshot's manifests describe any of the files, be it as taken out."""
        return any(file.file_path in files for manifest in self.of(snapshot) for file, _ in self.entries(manifest))


@dataclass(frozen=True)
class StoredFile:
    """One file under a table's location."""

    uri: str
    size_bytes: int
    modified_s: float
    """Since 1970."""


def stored(table: "Table") -> list[StoredFile]:
    """All files under the table's location, whoever put them there.

    Raises:
        StorageError: The location cannot be listed.
    """
    location = table.location().rstrip("/")
    try:
        # A local path may hold what a URI may not, a space for one; Iceberg does not mind.
        filesystem, root = open_uri(location.removeprefix("file://"))
        infos = filesystem.get_file_info(fs.FileSelector(root, recursive=True, allow_not_found=True))
    except OSError as error:
        raise StorageError(f"cannot list {location} ({error})") from error
    return [
        # Of a file whose age the store does not tell, it is safe to think that it is new.
        StoredFile(location + info.path[len(root.rstrip("/")) :], info.size, (info.mtime_ns or time.time_ns()) / 1e9)
        for info in infos
        if info.type == fs.FileType.File
    ]


def place(uri: str) -> str:
    """Where a file is, whatever the engine that noted it calls the scheme: file:/a is file:///a, s3a://b is s3://b."""
    return re.sub(r"^[a-z0-9+.-]+:/*", "", uri).lstrip("/")


def used(table: "Table", manifests: Manifests) -> set[str]:
    """The URIs of all files that the table, as it was opened, refers to."""
    metadata = table.metadata
    return (
        manifests.needed(table.snapshots())
        | {table.metadata_location}
        | {entry.metadata_file for entry in metadata.metadata_log}
        | {file.statistics_path for file in (*metadata.statistics, *metadata.partition_statistics)}
    )


def delete(table: "Table", uris: Iterable[str]) -> None:
    """Delete files; those that are gone already do not matter.

    Raises:
        StorageError: One cannot be deleted.
    """
    for uri in uris:
        try:
            table.io.delete(uri)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise StorageError(
                f"cannot delete {uri} ({error})", "check the permissions, and run the job again"
            ) from error


def batches(table: "Table", uri: str, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
    """The rows of a data file in order, with the table's present columns; memory: about a row group.

    Args:
        table: Whose file it is.
        uri: Of the file.
        columns: Only these; none: all.

    Raises:
        TableError: The file is gone or damaged.
    """
    import pyarrow.parquet as pq

    schema = file_schema(table)
    wanted = pa.schema([schema.field(name) for name in columns or top_level(table.schema())])
    try:
        with table.io.new_input(uri).open() as stream:
            file = pq.ParquetFile(stream)
            names = _names_in(file.schema_arrow, wanted)
            there = [name for name in names if name is not None]
            for batch in file.iter_batches(BATCH_ROWS, columns=there, use_threads=False):
                yield _fitted(batch, names, wanted)
    except (OSError, pa.ArrowException) as error:
        raise TableError(
            f"{uri}, a data file of table {name_of(table)}, cannot be read ({error})",
            "restore it from a backup, or go back to a version without it",
        ) from error


def _names_in(found: pa.Schema, wanted: pa.Schema) -> list[str | None]:
    """What a data file calls each column, none where it has none: by Iceberg's field id, else by name."""
    ids = {(field.metadata or {}).get(b"PARQUET:field_id"): field.name for field in found}
    plain = ids.keys() == {None}
    return [
        (field.name if field.name in found.names else None)
        if plain
        else ids.get((field.metadata or {}).get(b"PARQUET:field_id"))
        for field in wanted
    ]


def _fitted(batch: pa.RecordBatch, names: Sequence[str | None], wanted: pa.Schema) -> pa.RecordBatch:
    columns = [
        pa.nulls(batch.num_rows, field.type) if name is None else batch.column(name).cast(field.type)
        for name, field in zip(names, wanted, strict=True)
    ]
    return pa.RecordBatch.from_arrays(columns, schema=wanted)


@dataclass
class RowGroups:
    """A Parquet file that is written as row groups of a good size, whatever comes in."""

    sink: Any
    schema: pa.Schema
    rows: int = 0
    group_bytes: int = ROW_GROUP_BYTES
    _held: list[pa.RecordBatch] = field(default_factory=list)
    _writer: Any = None

    def write(self, batch: pa.RecordBatch) -> None:
        """Add rows."""
        self._held.append(batch)
        self.rows += batch.num_rows
        if sum(held.nbytes for held in self._held) >= self.group_bytes:
            self.flush()

    def flush(self) -> None:
        """Write what is held as a row group."""
        import pyarrow.parquet as pq

        if self._writer is None:
            self._writer = pq.ParquetWriter(self.sink, self.schema, compression="zstd")
        if self._held:
            # As one chunk: each would otherwise become a row group of its own.
            table = pa.Table.from_batches(self._held, self.schema).combine_chunks()
            self._writer.write_table(table, row_group_size=max(1, table.num_rows))
            self._held = []

    def close(self) -> None:
        """Write the rest and the file's footer."""
        self.flush()
        self._writer.close()


class NewFile:
    """A staged data file of a table, written batch by batch, seen by nobody until it is committed.

    There is none if no row is written to it, and what there is goes if an error ends it.

    Raises:
        StorageError: It cannot be written.
    """

    def __init__(self, table: "Table", name: str) -> None:
        self._table = table
        self.uri = f"{table.location()}/data/{name}.parquet"
        self._stream: Any = None
        self._groups: RowGroups | None = None

    @property
    def rows(self) -> int:
        """Rows written so far."""
        return self._groups.rows if self._groups else 0

    def write(self, batch: pa.RecordBatch) -> None:
        """Add rows that have the table's columns."""
        if batch.num_rows == 0:
            return
        if self._groups is None:
            self._stream = self._guarded(lambda: self._table.io.new_output(self.uri).create(overwrite=True))
            self._groups = RowGroups(self._stream, file_schema(self._table))
        groups = self._groups
        self._guarded(lambda: groups.write(batch))

    def __enter__(self) -> "NewFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._groups is None:
            return
        if kind is not None:
            self._stream.close()
            delete(self._table, [self.uri])
            return
        self._guarded(self._groups.close)
        self._guarded(self._stream.close)
        if self.uri.startswith("file://"):
            self._guarded(lambda: sync_file(self.uri.removeprefix("file://")))

    def _guarded(self, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except OSError as error:
            raise StorageError(
                f"cannot write {self.uri} ({error})", "free some space or check the permissions"
            ) from error
