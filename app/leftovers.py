"""What killed ingests leave in the storage root beside the tables: staged blocks, and marks that no version names.

leftovers(config, config.maintenance)     # removed once they are old enough to be nobody's
"""

import time
from typing import TYPE_CHECKING

from pyarrow import fs

from app.config import Config
from app.errors import TableNotFound
from app.settings.tables import MaintenanceConfig
from app.snapshots import SUMMARY_PREFIX, summary_of
from app.storage import INGESTED, STAGING, Storage
from app.table_maintenance import Done
from app.tables import open_table

if TYPE_CHECKING:
    from collections.abc import Iterator


def leftovers(config: Config, settings: MaintenanceConfig, dry_run: bool = False) -> Done:
    """Remove staged runs, and documents of marks, that are older than `orphan_hours` and that no version needs.

    Raises:
        StorageError, TableError: The store or the catalog does not answer; nothing was removed.
    """
    storage = Storage(config.storage.uri)
    before_ns = int((time.time() - settings.orphan_hours * 3_600) * 1e9)
    named = set(_named(config))
    runs = {name: _files(storage, STAGING, name) for name in storage.list(STAGING)}
    old = {name: files for name, files in runs.items() if all(_is_old(file, before_ns) for file in files)}
    marks = [file for file in _files(storage, INGESTED) if file.base_name not in named and _is_old(file, before_ns)]
    gone = [file for files in old.values() for file in files] + marks
    done = Done("", "leftovers", removed=sorted(storage.uri(*_parts(storage, file)) for file in gone))
    done.bytes_freed = sum(file.size for file in gone)
    if not dry_run:
        for name in old:
            storage.filesystem.delete_dir(storage.path(STAGING, name))
        for file in marks:
            storage.filesystem.delete_file(file.path)
    return done


def _named(config: Config) -> "Iterator[str]":
    """The documents that versions name."""
    for name in (config.ingestion.table, config.ingestion.quarantine_table):
        try:
            table = open_table(config.storage, name)
        except TableNotFound:
            continue
        for snapshot in table.snapshots():
            yield summary_of(snapshot).get(f"{SUMMARY_PREFIX}marks", "")


def _files(storage: Storage, *folder: str) -> list[fs.FileInfo]:
    selector = fs.FileSelector(storage.path(*folder), recursive=True, allow_not_found=True)
    return [file for file in storage.filesystem.get_file_info(selector) if file.type == fs.FileType.File]


def _is_old(file: fs.FileInfo, before_ns: int) -> bool:
    return file.mtime_ns is not None and file.mtime_ns < before_ns


def _parts(storage: Storage, file: fs.FileInfo) -> list[str]:
    return str(file.path).removeprefix(storage.root_path).strip("/").split("/")
