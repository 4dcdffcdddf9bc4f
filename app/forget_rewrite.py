"""Versions made anew without some rows: a new current one, and one for each that a tag or a model holds."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pyarrow.compute as pc

from app import catalog
from app.forget_search import Sought
from app.snapshots import MAINTENANCE, REPLACES, summary_of
from app.table_commits import replace
from app.table_files import Manifests, NewFile, batches, delete
from app.table_versions import MAIN, changing
from app.tables import fresh_name

if TYPE_CHECKING:
    from pyiceberg.table import Table
    from pyiceberg.table.snapshots import Snapshot

BRANCH = "rayloop-forgetting-"
"""Branches that exist while a version is rewritten."""


@dataclass
class Rewritten:
    """Which versions stand for others now, or are to be."""

    held: dict[int, list[str]] = field(default_factory=dict)
    """Versions that are to live on without the rows, and their tags; none where only a model holds them."""
    replaced: dict[int, int] = field(default_factory=dict)
    """Versions that live on without the rows, and as what."""
    tags: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Tags that name another version now: from, to."""


def rewrite(
    table: "Table", showing: "Sequence[Snapshot]", trained_on: Collection[int], sought: Sought, hits: Collection[str],
    rewritten: Rewritten,
) -> None:  # fmt: skip
    """Make new versions without some rows, of those versions that something holds; each data file is written once.

    Args:
        table: As it was opened.
        showing: Versions that have the rows, or whose manifests describe files with them.
        trained_on: Versions that models learned from, by snapshot id.
        sought: Whose rows.
        hits: The data files with such rows.
        rewritten: What is done is noted there, step by step.

    Raises:
        TableChanged: Another writer was faster; what is noted is done.
    """
    manifests = Manifests(table)
    shown = {snapshot.snapshot_id: snapshot for snapshot in showing}
    names = held_among(table, shown, trained_on)
    rewritten.held |= names
    clean: dict[str, str | None] = {}
    try:
        # The current one first: what is built on it from now on is clean.
        for snapshot_id in sorted(names, key=lambda snapshot_id: MAIN not in names[snapshot_id]):
            held = manifests.data_files(shown[snapshot_id])
            removed = [file for uri, file in held.items() if uri in hits]
            for file in removed:
                if file.file_path not in clean:
                    clean[file.file_path] = _without(table, file.file_path, sought)
            added = [uri for file in removed if (uri := clean[file.file_path]) is not None]
            branch = MAIN if MAIN in names[snapshot_id] else _branch(table, snapshot_id)
            made = replace(table, removed, added, _about(shown[snapshot_id]), branch, traceless=True)
            rewritten.replaced[snapshot_id] = made
            _move(table, names[snapshot_id], snapshot_id, made, rewritten)
    finally:
        catalog.patiently(table.refresh)
        needed = Manifests(table).needed(table.snapshots())
        delete(table, [uri for uri in clean.values() if uri is not None and uri not in needed])


def held_among(table: "Table", shown: Collection[int], trained_on: Collection[int]) -> dict[int, list[str]]:
    """Those of the versions that a model learned from or something names, and the names."""
    names: dict[int, list[str]] = {snapshot_id: [] for snapshot_id in shown if snapshot_id in trained_on}
    for name, reference in table.refs().items():
        if reference.snapshot_id in shown:
            names.setdefault(reference.snapshot_id, []).append(name)
    return names


def _without(table: "Table", uri: str, sought: Sought) -> str | None:
    """A copy of a data file without the rows; none if nothing is left of it."""
    mask = sought.mask(table)[1]
    with NewFile(table, f"{fresh_name()}-without") as clean:
        for batch in batches(table, uri):
            clean.write(batch.filter(pc.invert(mask(batch))))
    return clean.uri if clean.rows else None


def _about(snapshot: "Snapshot") -> dict[str, str]:
    """What is said of a version that stands for another one: the same, and that it does."""
    said = summary_of(snapshot)
    return said | {MAINTENANCE: "forget", REPLACES: f"{said.get(REPLACES, '')} {snapshot.snapshot_id}".strip()}


def _branch(table: "Table", snapshot_id: int) -> str:
    name = f"{BRANCH}{snapshot_id}"
    with changing(table):
        table.manage_snapshots().create_branch(snapshot_id, name).commit()
    return name


def drop_branches(table: "Table") -> None:
    """Remove the branches of a run that was killed."""
    for name in [name for name in table.refs() if name.startswith(BRANCH)]:
        with changing(table):
            table.manage_snapshots().remove_branch(name).commit()


def _move(table: "Table", names: Sequence[str], old: int, new: int, rewritten: Rewritten) -> None:
    """Let tags, and other engines' branches, name the version that stands for the old one."""
    for name in names:
        reference = table.refs()[name]
        # One commit each: pyiceberg 0.12 checks only the first of several references in one.
        with changing(table):
            if reference.snapshot_ref_type == "tag":
                table.manage_snapshots().create_tag(new, name, reference.max_ref_age_ms).commit()
                rewritten.tags[name] = (old, new)
            elif name != MAIN:
                table.manage_snapshots().create_branch(new, name, reference.max_ref_age_ms).commit()
    drop_branches(table)
