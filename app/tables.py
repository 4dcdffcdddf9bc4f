"""Iceberg tables: open, append, read, and the versions between which a reader may choose.

    version = latest(config)                                     # support.conversations@4711...
    read(config, version, columns=["messages"], split="train")   # ray.data.Dataset, streaming

A table version is a snapshot: what was read from it once can be read again, whatever has been added since. The
catalog is an SQLite file under a local root; `storage.catalog_uri` names a server where several machines write.
"""

import os
import uuid
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import pyarrow as pa

from app import catalog
from app.catalog import catalog_properties as catalog_properties
from app.config import Config, StorageConfig
from app.errors import ConfigError, TableError, TableNotFound
from app.snapshots import SUMMARY_PREFIX as SUMMARY_PREFIX
from app.snapshots import ancestors, successor
from app.snapshots import summary_of as summary_of
from app.storage import sync_folder
from app.table_commits import append as append
from app.table_commits import discard as discard
from app.table_schema import evolve, top_level
from app.versions import TableVersion

if TYPE_CHECKING:
    import ray.data
    from pyiceberg.catalog import Catalog
    from pyiceberg.expressions import BooleanExpression
    from pyiceberg.io.pyarrow import ArrowScan
    from pyiceberg.table import FileScanTask, Table
    from pyiceberg.table.snapshots import Snapshot

READ_ROWS = 4_096
"""Rows that are handed on together at least: what is packed or examined in small pieces is so at a loss."""
_PROPERTIES = {
    # An append is only right for the history it was de-duplicated against, so none is retried on another one.
    "commit.retry.num-retries": "0",
    "format-version": "2",
    # Every commit writes the table's metadata anew: without this a stream fills the disk with old ones.
    "write.metadata.delete-after-commit.enabled": "true",
}


def open_table(storage_config: StorageConfig, name: str, schema: pa.Schema | None = None) -> "Table":
    """The table called `name` (namespace.name); with a schema it is to be written, and made where it is missing.

    To be written, it gets the columns that came later than itself, see `app.table_schema`.

    Raises:
        TableNotFound: It does not exist and no schema is given.
        TableError: Its columns do not fit, it has lost its files, or the catalog does not answer. Nothing was written.
        ConfigError: The name has no namespace, or the catalog is not set.
    """
    from pyiceberg.exceptions import NoSuchNamespaceError, NoSuchTableError

    if name.count(".") != 1 or not all(name.split(".")):
        raise ConfigError(f"{name!r} is not a table name", "write it as namespace.name")
    found = catalog.open_catalog(storage_config, create=schema is not None)
    if found is None:
        raise TableNotFound(f"no table {name} under {storage_config.uri}", "run jobs.ingest first")
    try:
        table = found.load_table(name)
    except (NoSuchTableError, NoSuchNamespaceError):
        if schema is None:
            raise TableNotFound(f"no table {name} under {storage_config.uri}", "run jobs.ingest first") from None
        return catalog.patiently(partial(_made, found, name, schema))
    except catalog.failures() as error:
        raise catalog.no_catalog(error) from error
    except FileNotFoundError as error:
        raise TableError(f"table {name} has lost its files ({error})", "restore them, or drop the table") from error
    if schema is not None:
        evolve(table, schema)
    return table


def _made(found: "Catalog", name: str, schema: pa.Schema) -> "Table":
    from pyiceberg.exceptions import TableAlreadyExistsError

    found.create_namespace_if_not_exists(name.split(".")[0])
    try:
        return found.create_table(name, schema, properties=_PROPERTIES)
    except TableAlreadyExistsError:
        return found.load_table(name)


def latest(config: Config) -> TableVersion:
    """The current snapshot of `ingestion.table`.

    Raises:
        TableError: There is none.
    """
    return resolve(config, None)


def version(config: Config) -> TableVersion:
    """The version that `inputs.snapshot_id` names, else the latest.

    Raises:
        TableError: It does not exist.
    """
    return resolve(config, config.inputs.snapshot_id)


def resolve(config: Config, which: int | str | None, name: str | None = None) -> TableVersion:
    """The version of a table that a snapshot id or a tag names; with none, the latest.

    Args:
        config: Names the table where `name` does not.
        which: A snapshot id or a tag.
        name: Of the table; none: `ingestion.table`.

    Raises:
        TableError: It does not exist.
    """
    name = name or config.ingestion.table
    table = open_table(config.storage, name)
    if which is None:
        snapshot = table.current_snapshot()
        if snapshot is None:
            raise TableError(f"table {name} is empty", "run jobs.ingest first")
        return TableVersion(name, snapshot.snapshot_id)
    if isinstance(which, str) and not which.isdigit():
        reference = table.refs().get(which)
        if reference is None:
            known = ", ".join(sorted(set(table.refs()) - {"main"})) or "none"
            raise TableError(f"table {name} has no version tagged {which!r}", f"tags: {known}")
        return TableVersion(name, reference.snapshot_id)
    return TableVersion(name, _snapshot(config, TableVersion(name, int(which)))[1].snapshot_id)


def exists(config: Config, version: TableVersion) -> bool:
    """Whether the version can be read."""
    try:
        _snapshot(config, version)
    except TableError:
        return False
    return True


def is_of_current(config: Config, version: TableVersion) -> bool:
    """Whether the version can be read, and is the current one or was gone on from; not where a rollback left it."""
    try:
        table, snapshot = _snapshot(config, version)
    except TableError:
        return False
    return any(snapshot.snapshot_id == earlier.snapshot_id for earlier in ancestors(table))


def summary(config: Config, version: TableVersion) -> dict[str, str]:
    """What was said about the version when it was made; keys begin with `rayloop.`."""
    return summary_of(_snapshot(config, version)[1])


def rows(config: Config, version: TableVersion) -> int:
    """How many rows the version holds."""
    found = _snapshot(config, version)[1].summary
    return int(found["total-records"] or 0) if found else 0


def read(
    config: Config, version: TableVersion, columns: Sequence[str] | None = None, split: str | None = None
) -> "ray.data.Dataset":
    """The version's rows as a streaming dataset, a task a data file; columns that came later are null.

    Not Ray's own `read_iceberg`: of 2.60, it reads every column and cuts what it has read into more blocks, which
    then pass between tasks; that took a third of the time of packing conversations for training.
    """
    import ray.data

    from app.datasource import Planned

    table, snapshot = _snapshot(config, version)
    chosen = _is_split(split)
    names = list(columns or top_level(table.schema()))
    tasks = sorted(
        table.scan(chosen, snapshot_id=snapshot.snapshot_id).plan_files(), key=lambda task: task.file.file_path
    )
    reads = [
        (partial(_batches, _scan(table, names, chosen), task, file_schema(table), names), task.file.file_size_in_bytes)
        for task in tasks
    ]
    rows: ray.data.Dataset = ray.data.read_datasource(
        Planned("ReadTable", reads or [(partial(_none, file_schema(table), names), 0)]),
        override_num_blocks=max(1, len(reads)),
    )
    return rows


def _scan(table: "Table", columns: Sequence[str], chosen: "BooleanExpression") -> "ArrowScan":
    # A scan of a snapshot knows its own columns alone; the table's present ones make the others null.
    from pyiceberg.io.pyarrow import ArrowScan

    return ArrowScan(table.metadata, table.io, table.schema().select(*columns), chosen)


def _batches(scan: "ArrowScan", task: "FileScanTask", schema: pa.Schema, names: list[str]) -> Iterator[pa.Table]:
    wanted = pa.schema([schema.field(name) for name in names])
    held: list[pa.RecordBatch] = []
    for batch in scan.to_record_batches([task]):
        held.append(batch)
        if sum(len(part) for part in held) >= READ_ROWS:
            yield pa.Table.from_batches(held).select(names).cast(wanted).combine_chunks()
            held = []
    if held:
        yield pa.Table.from_batches(held).select(names).cast(wanted).combine_chunks()


def _none(schema: pa.Schema, names: list[str]) -> Iterator[pa.Table]:
    yield pa.schema([schema.field(name) for name in names]).empty_table()


def read_local(
    config: Config,
    version: TableVersion,
    columns: Sequence[str] | None = None,
    split: str | None = None,
    limit: int | None = None,
) -> pa.Table:
    """The version's first `limit` rows by content hash, in that order: the same on every call and machine.

    Hashes are spread evenly, so the first ones are a fair sample. Memory: the hashes, and what is returned. Columns
    that came later than the version are null.
    """
    from pyiceberg.expressions import And
    from pyiceberg.expressions.parser import parse

    table, snapshot = _snapshot(config, version)
    chosen = _is_split(split)
    if limit:
        hashes = _scanned(table, snapshot, chosen, ["content_hash"])["content_hash"]
        if limit < len(hashes):
            chosen = And(chosen, parse(f"content_hash <= '{hashes.sort()[limit - 1].as_py()}'"))
    wanted = list(dict.fromkeys([*(columns or top_level(table.schema())), "content_hash"]))
    found = _scanned(table, snapshot, chosen, wanted).sort_by("content_hash")
    return found.slice(0, limit).select(list(columns or wanted))


def _scanned(table: "Table", snapshot: "Snapshot", chosen: "BooleanExpression", columns: Sequence[str]) -> pa.Table:
    tasks = table.scan(chosen, snapshot_id=snapshot.snapshot_id).plan_files()
    return _scan(table, columns, chosen).to_table(tasks)


def file_schema(table: "Table") -> pa.Schema:
    """The table's schema with Iceberg's field ids, as data files carry it."""
    from pyiceberg.io.pyarrow import schema_to_pyarrow

    return schema_to_pyarrow(table.schema())


def fresh_name() -> str:
    """A prefix for staged files that no other run has."""
    return uuid.uuid4().hex[:16]


def _snapshot(config: Config, version: TableVersion) -> "tuple[Table, Snapshot]":
    table = open_table(config.storage, version.table)
    snapshot = table.snapshot_by_id(version.snapshot_id) or successor(table, version.snapshot_id)
    if snapshot is None:
        known = ", ".join(str(entry.snapshot_id) for entry in table.history()[-5:]) or "none"
        raise TableError(f"{version} does not exist", f"newest snapshots: {known}")
    return table, snapshot


def _is_split(split: str | None) -> "BooleanExpression":
    from pyiceberg.expressions import AlwaysTrue
    from pyiceberg.expressions.parser import parse

    assert split in (None, "train", "validation"), split
    return AlwaysTrue() if split is None else parse(f"split == '{split}'")


def sync_file(path: str) -> None:
    """Make a local file and its name survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    sync_folder(os.path.dirname(path))
