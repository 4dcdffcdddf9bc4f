"""Where a model version comes from, written into its folder as `lineage.json`.

Serving answers `why` from this file and the traffic log alone: no server has to be up.
"""

import datetime
import json
from collections import defaultdict
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa

from app import tables
from app.config import Config
from app.errors import ModelError, StorageError, TableError
from app.snapshots import successor
from app.storage import Storage
from app.versions import TableVersion

FILE = "lineage.json"


@dataclass(frozen=True)
class Lineage:
    """The chain from a model version back to the files and positions it learned from."""

    model: str
    """Name in the registry."""
    version: str | None
    """Version in the registry; none: the folder was made and not registered."""
    run_id: str
    """MLflow run that made it."""
    stage: str
    """train | compress"""
    table: str
    """Table it was trained on."""
    snapshot_id: int
    """Version of that table."""
    sources: list[dict[str, Any]]
    """What the table version holds of each source, as `sources_of` tells it."""
    config_digest: str
    """Of the whole configuration."""
    code_version: str
    """Of the code that ran."""
    job_id: str
    """Ray job that made it."""
    parent: str | None
    """Version it was compressed from, or model/version that its training began with."""
    created_at: str
    """ISO 8601, UTC."""


def now() -> str:
    """The time, as `created_at` says it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def write(folder: Path, lineage: Lineage) -> None:
    """Put the lineage into a model folder."""
    (folder / FILE).write_text(json.dumps(asdict(lineage), indent=2) + "\n", encoding="utf-8")


def read(uri: str) -> Lineage:
    """The lineage in the model folder at `uri`.

    Raises:
        ModelError: There is none, or it is damaged.
    """
    try:
        content = json.loads(Storage(uri).read(FILE))
        return Lineage(**{field.name: content[field.name] for field in fields(Lineage)})
    except (StorageError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{uri}/{FILE} cannot be read ({error})",
            "the model folder must be one that jobs.train or jobs.compress made",
        ) from error


def sources_of(config: Config, version: TableVersion) -> list[dict[str, Any]]:
    """What a table version holds of each source, each {uri, records, first_position, last_position}, by URI.

    By its rows, so it is true whichever ingests they came with, and whatever has been forgotten or has expired since.
    Memory: one batch of rows; time: a scan of two columns.

    Raises:
        TableError: The version does not exist.
    """
    table = tables.open_table(config.storage, version.table)
    snapshot = table.snapshot_by_id(version.snapshot_id) or successor(table, version.snapshot_id)
    if snapshot is None:
        raise TableError(f"{version} does not exist", "see jobs.versions for those that do")
    held: dict[str, list[tuple[int, int, int]]] = defaultdict(list)
    scan = table.scan(snapshot_id=snapshot.snapshot_id, selected_fields=("source", "position"))
    for batch in scan.to_arrow_batch_reader():
        found = pa.table(batch).group_by("source").aggregate([("position", kind) for kind in ("count", "min", "max")])
        for row in found.to_pylist():
            held[row["source"]].append((row["position_count"], row["position_min"], row["position_max"]))
    return [
        {
            "uri": uri,
            "records": sum(count for count, _, _ in parts),
            "first_position": min(first for _, first, _ in parts),
            "last_position": max(last for _, _, last in parts),
        }
        for uri, parts in sorted(held.items())
    ]
