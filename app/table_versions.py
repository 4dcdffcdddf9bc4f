"""Versions of a table: what there is, names for it, going back, and what must not be removed.

    tag(config, resolve(config, None), "train-2026-11")
    rollback(config, resolve(config, "clean"))

A tag is Iceberg's own, so every engine sees it. A version stays while a tag names it, and while a model version of
the registry was trained on it; see `held`.
"""

import datetime
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from app import catalog, lineage, registry
from app.config import Config
from app.errors import ConfigError, ModelError, TableChanged, TableError
from app.snapshots import ancestors, stands_for, summary_of
from app.table_schema import name_of
from app.tables import open_table, resolve
from app.versions import ModelVersion, TableVersion

if TYPE_CHECKING:
    from pyiceberg.table import Table
    from pyiceberg.table.snapshots import Snapshot

MAIN = "main"


@dataclass(frozen=True)
class Described:
    """One version of a table, as a list shows it."""

    snapshot_id: int
    parent_id: int | None
    made_at: str
    """ISO 8601, UTC"""
    rows: int
    current: bool
    tags: list[str]
    models: list[str]
    """Model versions that were trained on it."""
    summary: dict[str, str]
    """What was said about it when it was made."""


def versions(config: Config, name: str | None = None) -> list[Described]:
    """All versions of a table, oldest first; those that a rollback left behind are among them.

    Raises:
        TableError: There is no such table.
    """
    table = open_table(config.storage, name or config.ingestion.table)
    models = models_by_snapshot(config, table)
    current = table.metadata.current_snapshot_id
    return [
        Described(
            snapshot_id=snapshot.snapshot_id,
            parent_id=snapshot.parent_snapshot_id,
            made_at=made_at(snapshot).isoformat(timespec="milliseconds"),
            rows=int((snapshot.summary and snapshot.summary["total-records"]) or 0),
            current=snapshot.snapshot_id == current,
            tags=tags_of(table, snapshot.snapshot_id),
            models=[str(version) for version in models.get(snapshot.snapshot_id, [])],
            summary=summary_of(snapshot),
        )
        for snapshot in by_age(table)
    ]


def by_age(table: "Table") -> "list[Snapshot]":
    """A table's snapshots in the order in which they were made."""
    return sorted(table.snapshots(), key=lambda snapshot: snapshot.sequence_number or 0)


def made_at(snapshot: "Snapshot") -> datetime.datetime:
    """When a snapshot was made, UTC."""
    return datetime.datetime.fromtimestamp(snapshot.timestamp_ms / 1000, datetime.UTC)


def tags_of(table: "Table", snapshot_id: int) -> list[str]:
    """The tags, and branches of other engines, that name a snapshot."""
    named = {name for name, reference in table.refs().items() if reference.snapshot_id == snapshot_id}
    return sorted(named - {MAIN})


def tag(config: Config, version: TableVersion, name: str, move: bool = False) -> bool:
    """Let a tag name a version from now on; returns whether it did not before.

    Raises:
        ConfigError: It is not a tag's name.
        TableError: It names another version, and it is not to be moved; or the version does not exist.
        TableChanged: Someone else has set it at this moment.
    """
    check_tag(name)
    table = open_table(config.storage, version.table)
    version = resolve(config, version.snapshot_id, version.table)
    there = table.refs().get(name)
    if there is not None and there.snapshot_ref_type != "tag":
        raise ConfigError(f"{name!r} is a branch of table {version.table}", "choose another name")
    if there is not None and there.snapshot_id == version.snapshot_id:
        return False
    if there is not None and not move:
        raise TableError(
            f"tag {name!r} of table {version.table} names {there.snapshot_id}", "set versions.move=true to move it"
        )
    with changing(table):
        table.manage_snapshots().create_tag(version.snapshot_id, name).commit()
    return True


def delete_tag(config: Config, name: str, table_name: str | None = None) -> TableVersion:
    """Delete a tag; returns the version that it named, which stays.

    Raises:
        TableError: There is no such tag.
        TableChanged: Someone else has moved it at this moment.
    """
    check_tag(name)
    named = resolve(config, name, table_name)
    table = open_table(config.storage, named.table)
    with changing(table):
        table.manage_snapshots().remove_tag(name).commit()
    return named


def check_tag(name: str) -> None:
    """Refuse what is not a tag's name.

    Raises:
        ConfigError: It holds other characters than a-z, 0-9, dot, underscore and hyphen, or would be a snapshot id.
    """
    allowed = set("abcdefghijklmnopqrstuvwxyz0123456789._-")
    if not 0 < len(name) <= 64 or not set(name) <= allowed or name.isdigit() or name == MAIN:
        raise ConfigError(
            f"{name!r} is not a tag's name",
            "use up to 64 of a-z, 0-9, dot, underscore and hyphen, not digits alone, and not `main`",
        )


def rollback(config: Config, version: TableVersion) -> bool:
    """Make an earlier version the current one; returns whether it was not before.

    What came after it stays in the table's history, can be read, and can be gone back to, until it expires. Sources
    are read again from where they were.

    Raises:
        TableError: The version does not exist.
        TableChanged: Another writer has changed the table at this moment.
    """
    table = open_table(config.storage, version.table)
    version = resolve(config, version.snapshot_id, version.table)
    if table.metadata.current_snapshot_id == version.snapshot_id:
        return False
    with changing(table):
        table.manage_snapshots().set_current_snapshot(version.snapshot_id).commit()
    return True


@contextmanager
def changing(table: "Table") -> Iterator[None]:
    """Say what happened where a change of names or of the current version is not taken.

    Raises:
        TableChanged: Another writer was faster.
        TableError: The catalog does not answer.
    """
    from pyiceberg.exceptions import CommitFailedException

    try:
        yield
    except (CommitFailedException, ValueError) as error:  # a ValueError: the snapshot has just been removed
        raise TableChanged(
            f"table {name_of(table)} was changed by another writer meanwhile, so nothing was changed", "try again"
        ) from error
    except catalog.failures() as error:
        raise catalog.no_catalog(error) from error


def held(config: Config, table: "Table") -> dict[int, list[str]]:
    """The snapshots that must stay, each with the reasons.

    Those are the current one and those before it up to the newest that says how far sources were read; what a tag or
    a branch names; and what a model version was trained on.

    Raises:
        RegistryError, ConfigError: The registry cannot be asked.
    """
    reasons: dict[int, list[str]] = {}
    for snapshot in ancestors(table):
        reasons.setdefault(snapshot.snapshot_id, []).append("says how far the sources were read")
        if "rayloop.marks" in summary_of(snapshot):
            break
    else:
        reasons.clear()
    for name, reference in table.refs().items():
        kind = "current" if name == MAIN else f"{reference.snapshot_ref_type.value} {name}"
        reasons.setdefault(reference.snapshot_id, []).append(kind)
    for snapshot_id, models in models_by_snapshot(config, table).items():
        reasons.setdefault(snapshot_id, []).extend(f"model {version}" for version in models)
    return reasons


def models_by_snapshot(config: Config, table: "Table") -> dict[int, list[ModelVersion]]:
    """The model versions that were trained on each of a table's snapshots, or on what one stands for."""
    known = {earlier: snapshot.snapshot_id for snapshot in by_age(table) for earlier in stands_for(snapshot)}
    known |= {snapshot.snapshot_id: snapshot.snapshot_id for snapshot in table.snapshots()}
    found: dict[int, list[ModelVersion]] = {}
    for model, trained_on in trained(config):
        if trained_on.table == name_of(table) and trained_on.snapshot_id in known:
            found.setdefault(known[trained_on.snapshot_id], []).append(model)
    return found


def trained(config: Config) -> list[tuple[ModelVersion, TableVersion]]:
    """Every model version of the registry, of whatever model, with each table version that it learned from.

    That is the one it was trained on, and those of the version that its training began with. Where the registry does
    not say, the model folder's lineage does.

    Raises:
        RegistryError, ConfigError: The registry cannot be asked.
    """
    known = {
        f"{model.model}/{model.version}": (model, tags) for model, tags in registry.Registry(config).all_versions()
    }
    found = []
    for model, tags in known.values():
        learned: dict[TableVersion, None] = {}
        generation: tuple[ModelVersion, dict[str, str]] | None = (model, tags)
        while generation is not None:
            if own := _own_table(*generation):
                learned[own] = None
            one, said = generation
            generation = known.get(said.get("rayloop.base_model", f"{one.model}/{said.get('rayloop.parent')}"))
        found += [(model, table) for table in learned]
    return found


def _own_table(model: ModelVersion, tags: dict[str, str]) -> TableVersion | None:
    """What a model version was itself trained on; none where nobody can tell any more."""
    if "rayloop.table" in tags and "rayloop.snapshot_id" in tags:
        return TableVersion(tags["rayloop.table"], int(tags["rayloop.snapshot_id"]))
    try:
        made = lineage.read(model.uri)
    except ModelError:
        return None
    return TableVersion(made.table, made.snapshot_id)
