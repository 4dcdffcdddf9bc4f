"""What jobs leave in the storage root beside the tables when its time is over.

leftovers(config, config.maintenance)     # removed once it is old enough to be nobody's

staged blocks of ingests that were killed, and tokens of packings that were; marks that no version names; reports and
packed tokens of versions that are gone.
"""

import json
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from pyarrow import fs

from app.config import Config
from app.errors import TableNotFound
from app.settings.tables import MaintenanceConfig
from app.snapshots import SUMMARY_PREFIX, summary_of
from app.storage import INGESTED, PACKED, PACKED_MANIFEST, STAGING, Storage
from app.table_maintenance import Done
from app.tables import open_table

REPORTS = ("reports", "ingest")


def leftovers(config: Config, settings: MaintenanceConfig, dry_run: bool = False) -> Done:
    """Remove what is older than `orphan_hours` and what no version needs.

    Raises:
        StorageError, TableError: The store or the catalog does not answer; nothing was removed.
    """
    storage = Storage(config.storage.uri)
    before_ns = int((time.time() - settings.orphan_hours * 3_600) * 1e9)
    named = set(_named(config))
    folders: list[tuple[str, ...]] = [(STAGING, name) for name in storage.list(STAGING)]
    folders += [(*REPORTS, name) for name in _reports_of_versions_gone(config)]
    made = packs(config)
    folders += [(PACKED, name) for name in (*made.gone, *made.unfinished)]
    found = {folder: storage.files(*folder) for folder in folders}
    old = {folder: files for folder, files in found.items() if all(_is_old(file, before_ns) for file in files)}
    marks = [file for file in storage.files(INGESTED) if file.base_name not in named and _is_old(file, before_ns)]
    gone = [file for files in old.values() for file in files] + marks
    done = Done("", "leftovers", removed=sorted(storage.uri(*_parts(storage, file)) for file in gone))
    done.bytes_freed = sum(file.size for file in gone)
    if not dry_run:
        for folder in old:
            storage.remove(*folder)
        for file in marks:
            storage.filesystem.delete_file(file.path)
    return done


@dataclass(frozen=True)
class Packs:
    """Names of packed tokens below `packed/`; those of versions that are there are not among them."""

    gone: list[str]
    """Of versions of the conversations that are not there any more."""
    pairs: list[str]
    """Of preference pairs, which were made of logs and files and not of a version."""
    unfinished: list[str]
    """Of a training that packs them now, or was killed at it."""


def packs(config: Config, going: Collection[int] = ()) -> Packs:
    """What is packed and no version needs.

    Args:
        config: Names the table.
        going: Ids of versions that count as gone.

    Raises:
        StorageError, TableError: The store or the catalog does not answer.
    """
    storage, name = Storage(config.storage.uri), config.ingestion.table
    there = _versions(config) - {str(snapshot_id) for snapshot_id in going}
    found = Packs([], [], [])
    for pack in storage.list(PACKED):
        version = _made_of(storage, pack)
        if version is None:
            found.unfinished.append(pack)
        elif not version:
            found.pairs.append(pack)
        elif version.get("table") == name and str(version["snapshot_id"]) not in there:
            found.gone.append(pack)
    return found


def _made_of(storage: Storage, pack: str) -> dict[str, object] | None:
    """The version that a pack was made of; empty if of none, None if it is not finished."""
    if not storage.exists(PACKED, pack, PACKED_MANIFEST):
        return None
    found: dict[str, object] = json.loads(storage.read(PACKED, pack, PACKED_MANIFEST)).get("table", {})
    return found


def _reports_of_versions_gone(config: Config) -> list[str]:
    """Names below `REPORTS`; the report of a batch that was refused is named otherwise, and stays."""
    there = _versions(config)
    return [name for name in Storage(config.storage.uri).list(*REPORTS) if name.isdigit() and name not in there]


def _versions(config: Config) -> set[str]:
    """The ids of all versions of the conversations."""
    try:
        table = open_table(config.storage, config.ingestion.table)
    except TableNotFound:
        return set()
    return {str(snapshot.snapshot_id) for snapshot in table.snapshots()}


def _named(config: Config) -> Iterator[str]:
    """The documents that versions name."""
    for name in (config.ingestion.table, config.ingestion.quarantine_table):
        try:
            table = open_table(config.storage, name)
        except TableNotFound:
            continue
        for snapshot in table.snapshots():
            yield summary_of(snapshot).get(f"{SUMMARY_PREFIX}marks", "")


def _is_old(file: fs.FileInfo, before_ns: int) -> bool:
    return file.mtime_ns is not None and file.mtime_ns < before_ns


def _parts(storage: Storage, file: fs.FileInfo) -> list[str]:
    return str(file.path).removeprefix(storage.root_path).strip("/").split("/")
