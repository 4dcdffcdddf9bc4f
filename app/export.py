"""A table version as plain files, Parquet or JSONL, in any folder that `app.storage` opens.

    <uri>/part-00000.parquet ...    rows, each file ended at about `shard_bytes`
    <uri>/_SUCCESS                  JSON, written last: the version, rows in all, and of each file rows, bytes, SHA-256

A folder without `_SUCCESS` holds an export that did not end; running it again replaces it. Every export is noted
under `exported/` in the storage root before it begins, so that `app.forget` can name it.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import orjson
import pyarrow as pa

from app import lineage
from app.config import Config
from app.errors import ConfigError, StorageError
from app.settings.tables import ExportConfig
from app.storage import Storage
from app.table_files import ROW_GROUP_BYTES, Manifests, RowGroups, batches
from app.table_schema import top_level
from app.tables import open_table, resolve, sync_file
from app.versions import TableVersion, digest

if TYPE_CHECKING:
    from pyiceberg.table import Table

DONE = "_SUCCESS"
NOTES = "exported"
RECORD = ("conversation_id", "channel", "language", "started_at", "messages")
"""What ingestion reads, under the names that it expects."""
_PART = re.compile(r"^part-\d{5}\.(parquet|jsonl)$")


@dataclass(frozen=True)
class Part:
    """One file of an export."""

    name: str
    rows: int
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Export:
    """What `_SUCCESS` says."""

    table: str
    snapshot_id: int
    format: str
    columns: list[str]
    rows: int
    files: list[Part]
    made_at: str

    def is_of(self, version: TableVersion, format: str, columns: Sequence[str]) -> bool:
        """Whether it is an export of just this."""
        ours = (self.table, self.snapshot_id, self.format, self.columns)
        return ours == (version.table, version.snapshot_id, format, list(columns))


def export(config: Config, settings: ExportConfig) -> tuple[str, Export, bool]:
    """Write a version as files.

    Memory: about one row group of the table and one of the file that is written.

    Returns:
        The folder's URI, what is in it, and whether it was written now: False if it was all there.

    Raises:
        TableError: The version does not exist or cannot be read.
        ConfigError: The table has no such column.
        StorageError: The folder holds something else or a damaged export, or cannot be written.
    """
    version, columns, target = planned(config, settings)
    there = read(target)
    if there is not None and there.is_of(version, settings.format, columns):
        if wrong := check(target):
            raise StorageError(
                f"{target.root_uri} holds this export, but {', '.join(wrong)} is missing or not as {DONE} says",
                f"delete {DONE} there, and export again",
            )
        return target.root_uri, there, False
    _clear(target, there)
    table = open_table(config.storage, version.table)
    snapshot = table.snapshot_by_id(version.snapshot_id)
    assert snapshot is not None
    note = {"uri": target.root_uri, "table": version.table, "snapshot_id": version.snapshot_id, "at": lineage.now()}
    Storage(config.storage.uri).write(json.dumps(note).encode(), NOTES, f"{digest(note | {'at': None})}.json")
    write = _write_parquet if settings.format == "parquet" else _write_jsonl
    files = list(write(table, sorted(Manifests(table).data_files(snapshot)), columns, target, settings.shard_bytes))
    rows = sum(part.rows for part in files)
    done = Export(version.table, version.snapshot_id, settings.format, list(columns), rows, files, lineage.now())
    target.write(json.dumps(asdict(done), indent=2).encode(), DONE)
    return target.root_uri, done, True


def planned(config: Config, settings: ExportConfig) -> tuple[TableVersion, tuple[str, ...], Storage]:
    """The version, the columns and the folder that the settings come to.

    Raises:
        TableError: The version does not exist.
        ConfigError: The table has no such column.
    """
    version = resolve(config, settings.version, settings.table)
    there = top_level(open_table(config.storage, version.table).schema())
    record = settings.format == "jsonl" and set(RECORD) <= set(there)
    columns = settings.columns or (RECORD if record else tuple(there))
    if unknown := sorted(set(columns) - set(there)):
        raise ConfigError(f"table {version.table} has no column {', '.join(unknown)}", f"columns: {', '.join(there)}")
    own = f"exports/{version.table}/{version.snapshot_id}-{digest([settings.format, columns])[:8]}"
    return version, columns, Storage(settings.uri or Storage(config.storage.uri).uri(own))


def read(target: Storage) -> Export | None:
    """What a folder's `_SUCCESS` says, none where there is none.

    Raises:
        StorageError: It is damaged.
    """
    if not target.exists(DONE):
        return None
    try:
        content = json.loads(target.read(DONE))
        return Export(**content | {"files": [Part(**part) for part in content["files"]]})
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{target.uri(DONE)} is not of an export ({error})", "choose another folder") from error


def check(target: Storage) -> list[str]:
    """The files of an export that are missing or not as `_SUCCESS` says; empty if all is well.

    Raises:
        StorageError: There is no finished export.
    """
    done = read(target)
    if done is None:
        raise StorageError(f"{target.root_uri} holds no finished export", "run jobs.export")
    return [part.name for part in done.files if not target.exists(part.name) or _sum(target, part.name) != part.sha256]


def notes(config: Config) -> list[dict[str, Any]]:
    """Every export that was begun, each {uri, table, snapshot_id, at}."""
    storage = Storage(config.storage.uri)
    return [json.loads(storage.read(NOTES, name)) for name in storage.list(NOTES)]


def _clear(target: Storage, there: Export | None) -> None:
    """Remove what an export that did not end has left.

    Raises:
        StorageError: The folder holds anything else.
    """
    names = target.list()
    others = [name for name in names if not _PART.match(name)]
    if there is not None or others:
        what = f"an export of {there.table}@{there.snapshot_id}" if there is not None else others[0]
        raise StorageError(f"{target.root_uri} is not empty: it holds {what}", "choose another folder, or empty it")
    for name in names:
        target.filesystem.delete_file(target.path(name))


@dataclass
class _Shard:
    """A file that is being written; what goes in is counted and hashed."""

    target: Storage
    name: str
    rows: int = 0
    size_bytes: int = 0
    closed: bool = False
    _hash: Any = field(default_factory=hashlib.sha256)
    _stream: Any = None

    def write(self, content: bytes) -> int:
        """Add bytes."""
        if self._stream is None:
            self.target.filesystem.create_dir(self.target.root_path, recursive=True)
            self._stream = self.target.filesystem.open_output_stream(self.target.path(self.name), compression=None)
        self._stream.write(content)
        self._hash.update(content)
        self.size_bytes += len(content)
        return len(content)

    def tell(self) -> int:
        """Bytes written so far."""
        return self.size_bytes

    def flush(self) -> None:
        """Nothing: it is all in the stream."""

    def close(self) -> None:
        """Leave the file open for `ended`: Parquet's writer closes what it is given."""

    def ended(self) -> Part:
        """The file, whole and on disk."""
        self._stream.close()
        if self.target.is_local:
            sync_file(self.target.path(self.name))
        return Part(self.name, self.rows, self.size_bytes, self._hash.hexdigest())


def _write_parquet(
    table: "Table", files: Sequence[str], columns: Sequence[str], target: Storage, shard_bytes: int
) -> Iterator[Part]:
    group_bytes = min(ROW_GROUP_BYTES, shard_bytes)
    shard: _Shard | None = None
    groups: RowGroups | None = None
    number = 0
    for batch in _rows(table, files, columns):
        if shard is None or groups is None:
            shard = _Shard(target, f"part-{number:05d}.parquet")
            groups = RowGroups(shard, _without_ids(batch.schema), group_bytes=group_bytes)
        _guarded(target, groups.write, batch.cast(groups.schema))
        if shard.size_bytes >= shard_bytes:
            yield _guarded(target, _end, shard, groups)
            number, shard, groups = number + 1, None, None
    if shard is not None and groups is not None:
        yield _guarded(target, _end, shard, groups)


def _end(shard: _Shard, groups: RowGroups) -> Part:
    groups.close()
    shard.rows = groups.rows
    return shard.ended()


def _write_jsonl(
    table: "Table", files: Sequence[str], columns: Sequence[str], target: Storage, shard_bytes: int
) -> Iterator[Part]:
    shard = _Shard(target, "part-00000.jsonl")
    number = 0
    for batch in _rows(table, files, columns):
        for row in batch.to_pylist():
            line = orjson.dumps(_plain(row), default=_hex, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_UTC_Z)
            _guarded(target, shard.write, line)
            shard.rows += 1
            if shard.size_bytes >= shard_bytes:
                yield _guarded(target, shard.ended)
                number += 1
                shard = _Shard(target, f"part-{number:05d}.jsonl")
    if shard.rows:
        yield _guarded(target, shard.ended)


def _rows(table: "Table", files: Sequence[str], columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    for uri in files:
        yield from batches(table, uri, columns)


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """A row as ingestion reads it: messages without the labels that they do not have."""
    if row.get("messages") is not None:
        row["messages"] = [
            {name: value for name, value in message.items() if value is not None} for message in row["messages"]
        ]
    return row


def _hex(value: Any) -> str:
    if isinstance(value, bytes):
        return value.hex()
    raise TypeError(f"{type(value).__name__} has no form in JSON")


def _without_ids(schema: pa.Schema) -> pa.Schema:
    """The schema without Iceberg's field ids, which mean nothing outside the table."""
    return pa.schema([pa.field(field.name, _bare(field.type)) for field in schema])


def _bare(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return pa.list_(_bare(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, _bare(field.type)) for field in kind])
    return kind


def _sum(target: Storage, name: str) -> str:
    with target.filesystem.open_input_stream(target.path(name), compression=None) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _guarded(target: Storage, work: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return work(*arguments)
    except OSError as error:
        raise StorageError(
            f"cannot write to {target.root_uri} ({error})", "free some space or check permissions"
        ) from error
