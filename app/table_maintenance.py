"""Keeping a table's files in order: small ones put together, old versions expired, files that nobody needs removed.

    compact(config, table)     # the same rows in fewer files: a new version
    expire(config, table)      # versions that nothing holds, and the files that only they need
    orphans(config, table)     # what writers left behind that were killed before their commit

Each takes settings from `maintenance`, and with `dry_run` only says what it would do.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from app import catalog
from app.config import Config
from app.errors import StageFailed, TableChanged, TableNotFound
from app.settings.tables import MaintenanceConfig
from app.snapshots import MAINTENANCE, summary_of
from app.table_commits import replace
from app.table_files import Manifests, NewFile, StoredFile, batches, delete, place, stored, used
from app.table_schema import name_of
from app.table_versions import by_age, changing, held
from app.tables import discard, fresh_name, open_table

if TYPE_CHECKING:
    from pyiceberg.manifest import DataFile
    from pyiceberg.table import Table
    from pyiceberg.table.snapshots import Snapshot

logger = logging.getLogger(__name__)

SMALL_FRACTION = 0.75
"""A file of less than this share of the target size is small."""
ATTEMPTS = 5
"""How often a plan is made anew since another writer has changed the table."""


@dataclass
class Done:
    """What one step did to one table, or would do."""

    table: str
    step: str
    files_before: int = 0
    files_after: int = 0
    bytes_freed: int = 0
    removed: list[str] = field(default_factory=list)
    """URIs of files."""
    snapshot_id: int | None = None
    """The version that was made."""
    expired: list[int] = field(default_factory=list)
    held: dict[int, list[str]] = field(default_factory=dict)
    """Versions that are old enough to go, and why they stay."""

    def as_json(self) -> dict[str, Any]:
        """For a job's last line: files as numbers, the first few of them by name."""
        plain = asdict(self) | {"removed": len(self.removed), "first_removed": self.removed[:20]}
        return {name: value for name, value in plain.items() if value not in (None, [], {})}


def compact(config: Config, table: "Table", settings: MaintenanceConfig, dry_run: bool = False) -> Done:
    """Put small data files together to files of about the target size: the same rows, in one commit.

    Raises:
        TableChanged: Another writer added rows meanwhile; nothing was changed.
        StageFailed: A file has not the rows that the table says; nothing was changed.
    """
    done = Done(name_of(table), "compact")
    current = table.current_snapshot()
    if current is None:
        return done
    files = Manifests(table).data_files(current)
    groups = list(_groups(list(files.values()), settings))
    small = [file for group in groups for file in group]
    done.files_before, done.files_after = len(files), len(files) - len(small) + len(groups)
    if dry_run or not groups:
        return done
    staged: list[str] = []
    try:
        for group in groups:
            staged += _merged(table, group)
        about = summary_of(current) | {MAINTENANCE: "compact"}
        done.snapshot_id = replace(table, small, staged, about)
    except BaseException:
        discard(table, staged)
        raise
    return done


def _groups(files: "Sequence[DataFile]", settings: MaintenanceConfig) -> "Iterator[list[DataFile]]":
    """Small files that become one each, in an order that is the same on every call."""
    small = [file for file in files if file.file_size_in_bytes < SMALL_FRACTION * settings.target_file_bytes]
    if len(small) < settings.min_small_files:
        return
    group: list[DataFile] = []
    size_bytes = 0
    for file in sorted(small, key=lambda file: file.file_path):
        if group and size_bytes + file.file_size_in_bytes > settings.target_file_bytes:
            if len(group) > 1:
                yield group
            group, size_bytes = [], 0
        group.append(file)
        size_bytes += file.file_size_in_bytes
    if len(group) > 1:
        yield group


def _merged(table: "Table", group: "Sequence[DataFile]") -> list[str]:
    expected = sum(file.record_count for file in group)
    with NewFile(table, f"{fresh_name()}-compacted") as merged:
        for file in group:
            for batch in batches(table, file.file_path):
                merged.write(batch)
        if merged.rows != expected:
            raise StageFailed(
                f"{len(group)} data files of table {name_of(table)} hold {merged.rows} rows, the table says {expected}",
                "nothing was changed; restore the damaged file, or go back to a version without it",
            )
    return [merged.uri] if expected else []


def expire(config: Config, table: "Table", settings: MaintenanceConfig, dry_run: bool = False) -> Done:
    """Remove versions that are old enough and that nothing holds, and the files that only they need.

    Raises:
        TableChanged: Other writers changed the table again and again; nothing was removed.
        RegistryError, ConfigError: Which versions models were trained on cannot be asked; nothing was removed.
    """
    for _ in range(ATTEMPTS):
        done, going = _expirable(config, table, settings)
        manifests = Manifests(table)
        names = set(done.expired)
        staying = [snapshot for snapshot in table.snapshots() if snapshot.snapshot_id not in names]
        lost = manifests.needed(going) - manifests.needed(staying)
        sizes = {file.uri: file.size_bytes for file in stored(table)} if lost else {}
        done.removed = sorted(lost & sizes.keys())
        done.bytes_freed = sum(sizes[uri] for uri in done.removed)
        if dry_run or not going:
            return done
        try:
            drop(table, done.expired)
        except TableChanged:
            catalog.patiently(table.refresh)
            continue
        delete(table, done.removed)
        return done
    raise TableChanged(f"table {name_of(table)} is being changed all the time, so no version was removed", "try later")


def _expirable(config: Config, table: "Table", settings: MaintenanceConfig) -> "tuple[Done, list[Snapshot]]":
    snapshots = by_age(table)
    before_ms = (time.time() - settings.expire_days * 86_400) * 1_000
    kept = {snapshot.snapshot_id for snapshot in snapshots[len(snapshots) - settings.keep_versions :]}
    old = [snapshot for snapshot in snapshots if snapshot.timestamp_ms < before_ms]
    reasons = held(config, table)
    going = [snapshot for snapshot in old if snapshot.snapshot_id not in kept | reasons.keys()]
    done = Done(name_of(table), "expire", expired=[snapshot.snapshot_id for snapshot in going])
    done.held = {entry.snapshot_id: reasons[entry.snapshot_id] for entry in old if entry.snapshot_id in reasons}
    return done, going


def drop(table: "Table", snapshot_ids: Sequence[int]) -> None:
    """Take versions out of a table's history, in one commit; their files stay where they are.

    Raises:
        TableChanged: The current version is another one than it was when the table was opened, or one of those that
            are to go has got a name meanwhile.
    """
    from pyiceberg.exceptions import CommitFailedException
    from pyiceberg.table.metadata import TableMetadata
    from pyiceberg.table.update import AssertRefSnapshotId, RemoveSnapshotsUpdate, TableRequirement, TableUpdate

    class AssertNameless(AssertRefSnapshotId):
        """Names go with what they name, so this is looked at within the commit. A REST server looks at `main` alone."""

        def validate(self, base_metadata: TableMetadata | None) -> None:  # type: ignore[override]  # so is theirs
            super().validate(base_metadata)
            if base_metadata and any(there.snapshot_id in snapshot_ids for there in base_metadata.refs.values()):
                raise CommitFailedException("Requirement failed: a snapshot that is to go has got a name")

    assert table.metadata.current_snapshot_id not in snapshot_ids
    updates: tuple[TableUpdate, ...] = (RemoveSnapshotsUpdate.model_validate({"snapshot-ids": list(snapshot_ids)}),)
    current = table.metadata.current_snapshot_id
    # A rollback to one of them, just before, would be lost with it.
    requirements: tuple[TableRequirement, ...] = (
        AssertNameless.model_validate({"ref": "main", "snapshot-id": current}),
    )
    with changing(table):
        table.catalog.commit_table(table, requirements, updates)
    catalog.patiently(table.refresh)


def orphans(config: Config, table: "Table", settings: MaintenanceConfig, dry_run: bool = False) -> Done:
    """Remove files under the table's location that no version needs and that are too old to be committed yet.

    Raises:
        StorageError: They cannot be listed or deleted.
    """
    found = unused(table)
    before_s = time.time() - settings.orphan_hours * 3_600
    old = [file for file in found if file.modified_s < before_s]
    done = Done(name_of(table), "orphans", removed=[file.uri for file in old])
    done.bytes_freed = sum(file.size_bytes for file in old)
    if not dry_run:
        delete(table, done.removed)
    return done


def unused(table: "Table") -> list[StoredFile]:
    """Files under the table's location that it does not refer to: left behind, or not committed yet.

    Raises:
        StorageError: The location cannot be listed.
        TableError: The catalog does not answer.
    """
    # Listed first: what is committed meanwhile is then either listed and used, or not listed.
    files = stored(table)
    catalog.patiently(table.refresh)
    needed = {place(uri) for uri in used(table, Manifests(table))}
    return [file for file in files if place(file.uri) not in needed]


def maintained(config: Config, settings: MaintenanceConfig) -> tuple[str, ...]:
    """The names of the tables that are to be maintained; the quarantine is one if there is any.

    Raises:
        TableError: The catalog does not answer.
    """
    if settings.tables:
        return settings.tables
    try:
        open_table(config.storage, config.ingestion.quarantine_table)
    except TableNotFound:  # nothing was ever refused
        return (config.ingestion.table,)
    return (config.ingestion.table, config.ingestion.quarantine_table)


STEPS = {"compact": compact, "expire": expire, "orphans": orphans}
