"""Snapshots of an Iceberg table: what their summaries say, and which came from which."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyiceberg.table import Table
    from pyiceberg.table.snapshots import Snapshot

SUMMARY_PREFIX = "rayloop."
MAINTENANCE = f"{SUMMARY_PREFIX}maintenance"
"""In a summary: compact or forget; no row was added by it."""
REPLACES = f"{SUMMARY_PREFIX}replaces"
"""In a summary: ids of the snapshots that this one stands for since rows were forgotten."""


def summary_of(snapshot: "Snapshot") -> dict[str, str]:
    """The part of a snapshot's summary that is ours."""
    properties = snapshot.summary.additional_properties if snapshot.summary else {}
    return {key: value for key, value in properties.items() if key.startswith(SUMMARY_PREFIX)}


def ancestors(table: "Table", snapshot_id: int | None = None) -> "Iterator[Snapshot]":
    """The snapshot with an id, or the current one, and those it was made from, newest first.

    After a rollback the snapshots that were left behind are not among them.
    """
    snapshot = table.current_snapshot() if snapshot_id is None else table.snapshot_by_id(snapshot_id)
    while snapshot is not None:
        yield snapshot
        parent = snapshot.parent_snapshot_id
        snapshot = table.snapshot_by_id(parent) if parent is not None else None


def stands_for(snapshot: "Snapshot") -> list[int]:
    """The ids of the snapshots whose place it has taken since rows of theirs were forgotten."""
    return [int(earlier) for earlier in summary_of(snapshot).get(REPLACES, "").split()]


def successor(table: "Table", snapshot_id: int) -> "Snapshot | None":
    """The snapshot that stands for one whose rows were partly forgotten."""
    for snapshot in sorted(table.snapshots(), key=lambda snapshot: -(snapshot.sequence_number or 0)):
        if snapshot_id in stands_for(snapshot):
            return snapshot
    return None
