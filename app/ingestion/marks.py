"""How far every source has been read: committed with the rows, in the snapshot, so that both hold or neither.

A mark is (part, value): a file's size and time, the next offset of a Kafka partition, the last value of a query's
cursor column, the snapshot of an Iceberg table. The snapshot's summary carries the offsets and cursors themselves and
the name of a document, `ingested/<digest>.json` under the storage root, with all marks: those of files may be many.
The newest snapshot that has marks speaks for all before it, so expired snapshots are not missed, and after a rollback
the sources are read again from where they were.
"""

import json
from typing import TYPE_CHECKING, Any

from app.config import Config
from app.errors import StorageError, TableError
from app.ingestion.parts import STREAMS, Marks
from app.storage import INGESTED, Storage
from app.tables import SUMMARY_PREFIX, summary_of
from app.versions import digest

if TYPE_CHECKING:
    from pyiceberg.table import Table
    from pyiceberg.table.snapshots import Snapshot

FOLDER = INGESTED
DOCUMENT, OFFSETS, SETTINGS = (f"{SUMMARY_PREFIX}{name}" for name in ("marks", "offsets", "settings"))


def record(config: Config, reached: Marks, settings: str = "") -> dict[str, str]:
    """What a snapshot's summary says of the marks; the document is written first."""
    name = f"{digest(reached)}.json"
    Storage(config.storage.uri).write(json.dumps(reached, sort_keys=True).encode(), FOLDER, name)
    offsets = {key: value for key, value in reached.items() if key.startswith(STREAMS)}
    return {DOCUMENT: name, OFFSETS: json.dumps(offsets, sort_keys=True), SETTINGS: settings}


def committed(config: Config, table: "Table", settings: str) -> dict[str, Any]:
    """How far everything has been read, by the table's current snapshot and those before it.

    Files that were read under other settings or by other code count as new: what they hold is compared anyway.

    Raises:
        TableError: The document that a snapshot names is gone.
    """
    found = newest(table)
    if found is None:
        return {}
    about = summary_of(found)
    try:
        marks: dict[str, Any] = json.loads(Storage(config.storage.uri).read(FOLDER, about[DOCUMENT]))
    except (StorageError, ValueError) as error:
        raise TableError(
            f"{FOLDER}/{about[DOCUMENT]}, which says how far the sources of snapshot {found.snapshot_id} were read, "
            f"cannot be read ({error})",
            "restore it from a backup of storage.uri, or go back to a snapshot whose document is there",
        ) from error
    if about.get(SETTINGS) == settings:
        return marks
    return {key: value for key, value in marks.items() if key.startswith(STREAMS)}


def newest(table: "Table") -> "Snapshot | None":
    """The current snapshot, or the nearest before it, that says how far sources were read."""
    snapshot = table.current_snapshot()
    while snapshot is not None and DOCUMENT not in summary_of(snapshot):
        parent = snapshot.parent_snapshot_id
        snapshot = table.snapshot_by_id(parent) if parent is not None else None
    return snapshot
