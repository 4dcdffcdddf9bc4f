"""Iceberg tables: open, append, read, and the versions between which a reader may choose.

    version = latest(config)                                     # support.conversations@4711...
    read(config, version, columns=["messages"], split="train")   # ray.data.Dataset, streaming

A table version is a snapshot: what was read from it once can be read again, whatever has been added since. The
catalog is an SQLite file under a local root; `storage.catalog_uri` names a server where several machines write.
"""

import os
import uuid
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import pyarrow as pa

from app.config import Config, StorageConfig
from app.errors import ConfigError, StageFailed, StorageError, TableError
from app.storage import resolve, sync_folder
from app.versions import TableVersion

if TYPE_CHECKING:
    import ray.data
    from pyiceberg.catalog import Catalog
    from pyiceberg.expressions import BooleanExpression
    from pyiceberg.table import Table
    from pyiceberg.table.snapshots import Snapshot

SUMMARY_PREFIX = "rayloop."
CATALOG = "rayloop"

_PROPERTIES = {
    # An append is only right for the history it was de-duplicated against, so none is retried on another one.
    "commit.retry.num-retries": "0",
    "format-version": "2",
}


def catalog_properties(storage_config: StorageConfig) -> dict[str, str]:
    """What `pyiceberg.load_catalog` and Ray's `read_iceberg(catalog_kwargs=...)` take.

    Raises:
        ConfigError: The storage is remote and no catalog is named.
    """
    root = resolve(storage_config.uri).rstrip("/").removeprefix("file://")
    remote = "://" in root
    if remote and storage_config.catalog_uri is None:
        raise ConfigError(
            f"storage.uri is {storage_config.uri} and no Iceberg catalog is named: SQLite serves one machine's disk",
            "set storage.catalog_uri, e.g. postgresql+psycopg2://user@host/iceberg",
        )
    return {
        "name": CATALOG,
        "type": "sql",
        "uri": storage_config.catalog_uri or f"sqlite:///{root}/catalog.db",
        "warehouse": f"{root}/tables" if remote else f"file://{root}/tables",
    }


def open_table(storage_config: StorageConfig, name: str, schema: pa.Schema | None = None) -> "Table":
    """The table called `name` (namespace.name); with a schema it is created where it is missing.

    Raises:
        TableError: It does not exist and no schema is given; nothing has been written.
        ConfigError: The name has no namespace, or the catalog is not set.
    """
    from pyiceberg.exceptions import NoSuchNamespaceError, NoSuchTableError, TableAlreadyExistsError
    from sqlalchemy.exc import SQLAlchemyError

    if name.count(".") != 1 or not all(name.split(".")):
        raise ConfigError(f"{name!r} is not a table name", "write it as namespace.name")
    catalog = _catalog(storage_config, create=schema is not None)
    if catalog is None:
        raise TableError(f"no table {name} under {storage_config.uri}", "run jobs.ingest first")
    try:
        return catalog.load_table(name)
    except (NoSuchTableError, NoSuchNamespaceError):
        if schema is None:
            raise TableError(f"no table {name} under {storage_config.uri}", "run jobs.ingest first") from None
    except SQLAlchemyError as error:
        raise _no_catalog(error) from error
    except FileNotFoundError as error:
        raise TableError(f"table {name} has lost its files ({error})", "restore them, or drop the table") from error
    catalog.create_namespace_if_not_exists(name.split(".")[0])
    try:
        return catalog.create_table(name, schema, properties=_PROPERTIES)
    except TableAlreadyExistsError:
        return catalog.load_table(name)


def latest(config: Config) -> TableVersion:
    """The current snapshot of `ingestion.table`.

    Raises:
        TableError: There is none.
    """
    snapshot = open_table(config.storage, config.ingestion.table).current_snapshot()
    if snapshot is None:
        raise TableError(f"table {config.ingestion.table} is empty", "run jobs.ingest first")
    return TableVersion(config.ingestion.table, snapshot.snapshot_id)


def version(config: Config) -> TableVersion:
    """The version that `inputs.snapshot_id` names, else the latest.

    Raises:
        TableError: It does not exist.
    """
    if config.inputs.snapshot_id is None:
        return latest(config)
    chosen = TableVersion(config.ingestion.table, config.inputs.snapshot_id)
    _snapshot(config, chosen)
    return chosen


def exists(config: Config, version: TableVersion) -> bool:
    """Whether the version can be read."""
    try:
        _snapshot(config, version)
    except TableError:
        return False
    return True


def summary(config: Config, version: TableVersion) -> dict[str, str]:
    """What was said about the version when it was made; keys begin with `rayloop.`."""
    return summary_of(_snapshot(config, version)[1])


def summary_of(snapshot: "Snapshot") -> dict[str, str]:
    """The part of a snapshot's summary that is ours."""
    properties = snapshot.summary.additional_properties if snapshot.summary else {}
    return {key: value for key, value in properties.items() if key.startswith(SUMMARY_PREFIX)}


def rows(config: Config, version: TableVersion) -> int:
    """How many rows the version holds."""
    found = _snapshot(config, version)[1].summary
    return int(found["total-records"] or 0) if found else 0


def read(
    config: Config, version: TableVersion, columns: Sequence[str] | None = None, split: str | None = None
) -> "ray.data.Dataset":
    """The version's rows as a streaming dataset, in no promised order."""
    from ray.data.expressions import col

    _snapshot(config, version)
    rows = stream(config, version)
    if split is not None:
        rows = rows.filter(expr=col("split") == split)
    return rows.select_columns(list(columns)) if columns else rows


def stream(config: Config, version: TableVersion) -> "ray.data.Dataset":
    """The version as Ray Data reads it: columns and filters asked of the dataset reach the files."""
    import ray.data

    rows: ray.data.Dataset = ray.data.read_iceberg(
        table_identifier=version.table,
        snapshot_id=version.snapshot_id,
        catalog_kwargs=dict(catalog_properties(config.storage)),
    )
    return rows


def read_local(
    config: Config,
    version: TableVersion,
    columns: Sequence[str] | None = None,
    split: str | None = None,
    limit: int | None = None,
) -> pa.Table:
    """The version's first `limit` rows by content hash, in that order: the same on every call and machine.

    Hashes are spread evenly, so the first ones are a fair sample. Memory: the hashes, and what is returned.
    """
    from pyiceberg.expressions import And
    from pyiceberg.expressions.parser import parse

    table, _ = _snapshot(config, version)
    chosen = _is_split(split)
    if limit:
        hashes = table.scan(chosen, ("content_hash",), snapshot_id=version.snapshot_id).to_arrow()["content_hash"]
        if limit < len(hashes):
            chosen = And(chosen, parse(f"content_hash <= '{hashes.sort()[limit - 1].as_py()}'"))
    wanted = tuple(dict.fromkeys([*(columns or (column.name for column in table.schema().fields)), "content_hash"]))
    found = table.scan(chosen, wanted, snapshot_id=version.snapshot_id).to_arrow().sort_by("content_hash")
    return found.slice(0, limit).select(list(columns or wanted))


def stage(table: "Table", content: pa.Table, name: str) -> str:
    """Write rows as a data file under the table, seen by nobody until it is appended; returns its URI.

    Writing the same name again replaces the file, so a task that is tried twice leaves one.
    """
    return stage_at(table.location(), dict(table.io.properties), file_schema(table), content, name)


def file_schema(table: "Table") -> pa.Schema:
    """The table's schema with Iceberg's field ids, as data files carry it."""
    from pyiceberg.io.pyarrow import schema_to_pyarrow

    return schema_to_pyarrow(table.schema())


def stage_at(location: str, properties: dict[str, str], schema: pa.Schema, content: pa.Table, name: str) -> str:
    """As `stage`, for a task that has no catalog: what it needs is plain and picklable.

    Raises:
        StorageError: The file cannot be written.
    """
    import pyarrow.parquet as pq
    from pyiceberg.io import load_file_io

    uri = f"{location}/data/{name}.parquet"
    try:
        with load_file_io(properties, location).new_output(uri).create(overwrite=True) as stream:
            pq.write_table(content.select(schema.names).cast(schema), stream, compression="zstd")
        if uri.startswith("file://"):
            _sync(uri.removeprefix("file://"))
    except OSError as error:
        raise StorageError(f"cannot write {uri} ({error})", "free some space or check the permissions") from error
    return uri


def discard(table: "Table", files: Sequence[str]) -> None:
    """Delete staged files that will not be appended."""
    for file in files:
        table.io.delete(file)


def append(table: "Table", files: Sequence[str], properties: Mapping[str, str]) -> int:
    """Make staged files part of the table in one atomic commit; returns the new snapshot's id.

    Raises:
        StageFailed: Another writer has changed the table since it was opened.
    """
    from pyiceberg.exceptions import CommitFailedException

    try:
        with table.transaction() as transaction:
            # Names carry a fresh id, so looking for them in the whole table would be wasted.
            transaction.add_files(list(files), snapshot_properties=dict(properties), check_duplicate_files=False)
    except CommitFailedException as error:
        raise StageFailed(
            f"table {'.'.join(table.name())} was changed by another writer meanwhile, so nothing was added",
            "run the job again: it will see the other writer's rows",
        ) from error
    snapshot = table.current_snapshot()
    assert snapshot is not None
    return snapshot.snapshot_id


def fresh_name() -> str:
    """A prefix for staged files that no other run has."""
    return uuid.uuid4().hex[:16]


def _catalog(storage_config: StorageConfig, create: bool) -> "Catalog | None":
    """The catalog, None if it is an SQLite file that is not there and must not be made."""
    properties = catalog_properties(storage_config)
    if properties["uri"].startswith("sqlite:///"):
        file = properties["uri"].removeprefix("sqlite:///")
        if not create and not os.path.exists(file):
            return None
        os.makedirs(os.path.dirname(file), exist_ok=True)
    from pyiceberg.catalog import load_catalog
    from sqlalchemy.exc import SQLAlchemyError

    try:
        # Looking must not write: the catalog's own tables are made with the first table.
        return load_catalog(**properties, init_catalog_tables=str(create).lower())
    except SQLAlchemyError as error:
        raise _no_catalog(error) from error


def _no_catalog(error: Exception) -> TableError:
    return TableError(
        f"the Iceberg catalog does not answer ({type(error).__name__})",
        "check storage.catalog_uri, or that catalog.db under storage.uri is an intact SQLite file",
    )


def _snapshot(config: Config, version: TableVersion) -> "tuple[Table, Snapshot]":
    table = open_table(config.storage, version.table)
    snapshot = table.snapshot_by_id(version.snapshot_id)
    if snapshot is None:
        known = ", ".join(str(entry.snapshot_id) for entry in table.history()[-5:]) or "none"
        raise TableError(f"{version} does not exist", f"newest snapshots: {known}")
    return table, snapshot


def _is_split(split: str | None) -> "BooleanExpression":
    from pyiceberg.expressions import AlwaysTrue
    from pyiceberg.expressions.parser import parse

    assert split in (None, "train", "validation"), split
    return AlwaysTrue() if split is None else parse(f"split == '{split}'")


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    sync_folder(os.path.dirname(path))
