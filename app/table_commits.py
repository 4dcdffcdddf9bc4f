"""Commits to an Iceberg table: each is made whole or not at all, and never over what another writer did meanwhile."""

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from app import catalog
from app.errors import StorageError, TableChanged, TableError
from app.snapshots import MAINTENANCE, ancestors, stands_for, summary_of
from app.table_schema import name_of

if TYPE_CHECKING:
    from pyiceberg.manifest import DataFile
    from pyiceberg.table import Table
    from pyiceberg.table.snapshots import Snapshot

logger = logging.getLogger(__name__)

REBASES = 5
"""How often an append is tried on top of maintenance that was faster."""


def discard(table: "Table", files: Sequence[str]) -> None:
    """Delete staged files that will not be appended; any that were appended all the same stay."""
    try:
        table.refresh()
    except catalog.failures() as error:
        logger.warning("%d staged files of %s are left to jobs.maintain (%s)", len(files), name_of(table), error)
        return
    snapshot = table.current_snapshot()
    used = set() if snapshot is None else {task.file.file_path for task in table.scan().plan_files()}
    for file in files:
        if file not in used:
            table.io.delete(file)


def append(table: "Table", files: Sequence[str], properties: Mapping[str, str]) -> int:
    """Make staged files part of the table in one atomic commit; returns the new snapshot's id.

    Compaction and forgetting by others meanwhile add no row, so what was compared with the table still holds.

    Raises:
        TableChanged: Another writer has added rows since the table was opened; nothing was added.
        StorageError: The commit's files cannot be written.
    """
    opened = table.current_snapshot()
    for _ in range(REBASES):
        try:
            return replace(table, [], files, properties)
        except TableChanged:
            if not _only_maintained_since(table, opened):
                raise
    raise TableChanged(
        f"table {name_of(table)} is being changed all the time, so nothing was added", "run the job again"
    )


def replace(
    table: "Table", removed: "Sequence[DataFile]", added: Sequence[str], properties: Mapping[str, str],
    branch: str = "main", traceless: bool = False,
) -> int:  # fmt: skip
    """Take data files out of the table and put staged ones in, in one atomic commit.

    Args:
        table: As it was opened: if anyone has changed the branch since, nothing is done.
        removed: Data files of the branch's snapshot.
        added: URIs of staged files.
        properties: What the new snapshot's summary says.
        branch: Whose snapshot is replaced.
        traceless: Two snapshots are made: the first one's manifests describe what was removed, the second's do not.

    Returns:
        The id of the branch's new snapshot.

    Raises:
        TableChanged: Another writer has changed the table; nothing was done.
        StorageError: The commit's files cannot be written.
        TableError: The table has lost files.
    """
    from pyiceberg.exceptions import CommitFailedException, ValidationException
    from pyiceberg.io.pyarrow import parquet_files_to_data_files

    made, opened = 0, table.metadata.current_snapshot_id
    try:
        with table.transaction() as transaction:
            new = parquet_files_to_data_files(table.io, transaction.table_metadata, iter(added))
            update = transaction.update_snapshot(snapshot_properties=dict(properties), branch=branch)
            with update.overwrite() if removed else update.fast_append() as producer:
                made = producer.snapshot_id
                for file in removed:
                    producer.delete_data_file(file)
                for file in new:
                    producer.append_data_file(file)
            if traceless:
                update = transaction.update_snapshot(snapshot_properties=dict(properties), branch=branch)
                with update.fast_append() as second:
                    made = second.snapshot_id
    except (CommitFailedException, ValidationException) as error:
        catalog.patiently(table.refresh)
        raise _changed(table) from error
    except catalog.failures() as error:
        if not _landed(table, made):
            raise _changed(table) from error
    except FileNotFoundError as error:
        catalog.patiently(table.refresh)
        if table.metadata.current_snapshot_id != opened:  # that one has been replaced and removed meanwhile
            raise _changed(table) from error
        raise TableError(
            f"table {name_of(table)} has lost files ({error})", "restore them, or go back to a version that has its own"
        ) from error
    except OSError as error:
        raise StorageError(
            f"cannot write to {table.location()} ({error})", "free some space or check permissions"
        ) from error
    return made


def _landed(table: "Table", snapshot_id: int) -> bool:
    """Whether a commit was made whose answer was lost."""
    catalog.patiently(table.refresh)
    return table.snapshot_by_id(snapshot_id) is not None


def _changed(table: "Table") -> TableChanged:
    return TableChanged(
        f"table {name_of(table)} was changed by another writer meanwhile, so nothing was added",
        "run the job again: it will see the other writer's rows",
    )


def _only_maintained_since(table: "Table", opened: "Snapshot | None") -> bool:
    """Whether all that has happened to the table since it was opened was compaction and forgetting."""
    for snapshot in ancestors(table):
        if opened is not None and opened.snapshot_id in (snapshot.snapshot_id, *stands_for(snapshot)):
            return True
        if MAINTENANCE not in summary_of(snapshot):
            return False
    return opened is None and table.current_snapshot() is None
