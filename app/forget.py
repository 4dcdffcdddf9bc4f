"""Conversations removed from every version of the tables, and their bytes from the disk.

    forgotten = forget(config, ids, settings)

    find       data files of any version with rows of these conversations, and the versions that show them
    rewrite    those files without the rows; a new current version, and new ones for versions that a tag or a model
               holds: tags move, and a version's old id leads to the new one (see `app.tables`)
    mark       model versions that were trained on such a version: tag `rayloop.forgotten` in the registry
    expire     all versions that show the rows
    delete     the files that only those needed, named in `forgetting/` before the versions go; their packed tokens

A run that is killed at any point is continued by running it again. The conversations table comes last: it alone knows
the texts that the quarantine table is searched for.
"""

import json
import time
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from app import catalog, export, leftovers, lineage, registry
from app.config import Config
from app.errors import TableChanged, TableNotFound
from app.forget_rewrite import Rewritten, drop_branches, held_among, rewrite
from app.forget_search import Sought, elsewhere, files_of, tells
from app.settings.tables import MaintenanceConfig
from app.storage import PACKED, STAGING, Storage
from app.table_files import Manifests, batches, delete, stored, used
from app.table_maintenance import ATTEMPTS, drop, unused
from app.table_schema import name_of, top_level
from app.table_versions import models_by_snapshot
from app.tables import fresh_name, open_table
from app.versions import ModelVersion

if TYPE_CHECKING:
    from pyiceberg.table import Table

JOURNAL = "forgetting"
FORGOTTEN_TAG = "rayloop.forgotten"


@dataclass
class Forgotten:
    """What was removed from one table, or would be."""

    table: str
    rows: int = 0
    """Of the current version."""
    files: int = 0
    """Data files of any version that held such rows."""
    places: list[tuple[str, int]] = field(default_factory=list)
    """(source, position) of the removed conversations: reading those sources anew would bring them back."""
    found: set[str] = field(default_factory=set, repr=False)
    """Ids that the table knew."""
    expired: list[int] = field(default_factory=list)
    rewritten: Rewritten = field(default_factory=Rewritten)
    """Versions that live on without the rows."""
    models: list[str] = field(default_factory=list)
    """Model versions that were trained on versions with the rows."""
    deleted: int = 0
    """Files."""
    staged: list[str] = field(default_factory=list)
    """Files with such rows that may belong to a running ingest, so that they are still there."""


@dataclass(frozen=True)
class Outcome:
    """What `forget` did, or would do."""

    tables: list[Forgotten]
    """The conversations first."""
    unknown: list[str]
    """Ids that no version of the conversations has."""
    packs: list[str]
    """Packed tokens below `packed/` that were removed."""
    out_of_reach: dict[str, Any]
    """What may still tell of the conversations, and what can be done about it."""


def forget(config: Config, ids: Collection[str], settings: MaintenanceConfig, dry_run: bool = False) -> Outcome:
    """Remove conversations, by id, from every version of the conversations and the quarantine table.

    Args:
        config: Names the tables.
        ids: Those of the conversations.
        settings: `orphan_hours`: from which age an uncommitted file is nobody's.
        dry_run: Only find what would be removed.

    Raises:
        TableError: There is no table of conversations, or a file of it cannot be read.
        TableChanged: Other writers changed a table again and again; running it again continues.
        RegistryError, ConfigError: The registry cannot be asked; nothing was removed.
    """
    sought = Sought.of(frozenset(ids), open_table(config.storage, config.ingestion.table))
    found = []
    for name in (config.ingestion.quarantine_table, config.ingestion.table):
        try:
            table = open_table(config.storage, name)
        except TableNotFound:
            if name == config.ingestion.table:
                raise
            continue  # nothing was ever refused
        found.append(_forget_in(config, table, sought, settings, dry_run))
    conversations = found[-1]
    unknown = sorted(sought.ids - conversations.found)
    # Also where nothing was found: an earlier run may have been killed after the versions had gone. Tokens of
    # preference pairs are made anew when they are needed.
    packs = leftovers.packs(config, conversations.expired)
    removed = sorted(packs.gone + packs.pairs)
    if not dry_run:
        for pack in removed:
            Storage(config.storage.uri).remove(PACKED, pack)
    away = _out_of_reach(config, sought, conversations, found, removed, packs.unfinished)
    return Outcome(found[::-1], unknown, removed, away)


def _out_of_reach(
    config: Config, sought: Sought, conversations: Forgotten, found: Sequence[Forgotten], packs: Sequence[str],
    unfinished: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    exports = sorted({uri for entry in found for uri in _exports(config, entry)})
    location = open_table(config.storage, conversations.table).location()
    places: Counter[str] = Counter(source for source, _ in conversations.places)
    remedies = {
        "models": (conversations.models, "they have learned from the conversations: train again and retire them"),
        "nodes": (
            packs,
            "nodes that trained on these keep copies in their temporary folders for a week: delete blocks-* under "
            "rayloop-cache-* there, and end runs that still train on them",
        ),
        "exports": (exports, "files of versions that are gone: delete them or export again"),
        "files": (
            elsewhere(config, sought),
            "lines with an id or a text, in logs, reports and what serving keeps: edit or delete them",
        ),
        "staged_runs": (
            Storage(config.storage.uri).list(STAGING),
            "blocks of ingests that run or were killed: jobs.maintain removes them once they are old enough",
        ),
        "packings": (
            unfinished,
            "tokens of a training that packs them now or was killed at it: jobs.maintain removes them once they are "
            "old enough",
        ),
        "sources": (dict(places), "records to delete, or reading these sources anew brings them back"),
        "staged": (
            [uri for entry in found for uri in entry.staged],
            "files that a running ingest may commit: run this again when it has ended",
        ),
        "earlier_object_versions": (
            [] if location.startswith("file://") else [location],
            "where the bucket keeps versions or has backups, delete them there",
        ),
    }
    return {name: {"what": what, "remedy": remedy} for name, (what, remedy) in remedies.items() if what}


def _exports(config: Config, entry: Forgotten) -> set[str]:
    """What was exported of a table's versions that are gone."""
    table = open_table(config.storage, entry.table)
    there = {snapshot.snapshot_id for snapshot in table.snapshots()} - set(entry.expired)
    notes = [note for note in export.notes(config) if note["table"] == entry.table]
    return {note["uri"] for note in notes if note["snapshot_id"] not in there}


def _forget_in(
    config: Config, table: "Table", sought: Sought, settings: MaintenanceConfig, dry_run: bool
) -> Forgotten:  # fmt: skip
    done = Forgotten(name_of(table))
    for _ in range(ATTEMPTS):
        try:
            if not dry_run:
                done.deleted += _finish(config, table)
                drop_branches(table)
            _once(config, table, sought, dry_run, done)
            break
        except TableChanged:
            catalog.patiently(table.refresh)
    else:
        raise TableChanged(f"table {done.table} is being changed all the time", "run the job again: it goes on")
    _leftovers(table, sought, settings, dry_run, done)
    return done


def _once(config: Config, table: "Table", sought: Sought, dry_run: bool, done: Forgotten) -> None:
    manifests = Manifests(table)
    hits = _hits(table, sought, manifests, done)
    if not hits:
        return
    files = set(hits)
    showing = [snapshot for snapshot in table.snapshots() if manifests.mentions(snapshot, files)]
    models = models_by_snapshot(config, table)
    done.files = max(done.files, len(files))
    current = table.current_snapshot()
    there = manifests.data_files(current) if current is not None else {}
    done.rows = max(done.rows, sum(count for uri, count in hits.items() if uri in there))
    trained_on = [model for snapshot in showing for model in models.get(snapshot.snapshot_id, [])]
    done.models = sorted({*done.models, *map(str, trained_on)})
    if dry_run:
        done.expired = [snapshot.snapshot_id for snapshot in showing]
        done.rewritten.held = held_among(table, done.expired, models.keys())
        return
    _mark(config, trained_on, len(sought.ids))
    rewrite(table, showing, models.keys(), sought, hits.keys(), done.rewritten)
    _expire(config, table, files, done)


def _hits(table: "Table", sought: Sought, manifests: Manifests, done: Forgotten) -> dict[str, int]:
    """The data files of any version with rows to forget, and how many; places and ids are noted."""
    columns, mask = sought.mask(table)
    places = [name for name in ("source", "position") if name in top_level(table.schema())]
    found: Counter[str] = Counter()
    for uri in files_of(table, table.snapshots(), manifests):
        for batch in batches(table, uri, [*columns, *places]):
            chosen = batch.filter(mask(batch))
            if not chosen.num_rows:
                continue
            found[uri] += chosen.num_rows
            if "conversation_id" in columns:
                done.found.update(sought.ids.intersection(chosen.column("conversation_id").to_pylist()))
            if len(places) == 2 and "conversation_id" in columns:
                pairs = zip(chosen.column("source").to_pylist(), chosen.column("position").to_pylist(), strict=True)
                done.places = sorted({*done.places, *pairs}, key=str)
    return dict(found)


def _mark(config: Config, models: Sequence[ModelVersion], count: int) -> None:
    """Say in the registry that a model version learned from conversations that were to be forgotten."""
    for model in dict.fromkeys(models):
        said = f"{lineage.now()}: up to {count} conversations it was trained on"
        registry.Registry(config).tag_version(model, FORGOTTEN_TAG, said)


def _expire(config: Config, table: "Table", files: set[str], done: Forgotten) -> None:
    """Remove every version that shows the rows, and the files that only those need."""
    manifests = Manifests(table)
    going = [snapshot for snapshot in table.snapshots() if manifests.mentions(snapshot, files)]
    names = {snapshot.snapshot_id for snapshot in going}
    if any(reference.snapshot_id in names for reference in table.refs().values()):
        raise TableChanged(f"a version of table {done.table} that is to go has got a name meanwhile", "try again")
    staying = [snapshot for snapshot in table.snapshots() if snapshot.snapshot_id not in names]
    lost = sorted(manifests.needed(going) - manifests.needed(staying))
    content = json.dumps({"table": done.table, "files": lost}).encode()
    Storage(config.storage.uri).write(content, JOURNAL, f"{fresh_name()}.json")
    drop(table, sorted(names))
    done.expired = sorted({*done.expired, *names})
    done.deleted += _finish(config, table)


def _finish(config: Config, table: "Table") -> int:
    """Delete what is named in the journals of this table, if no version needs it; returns how many files."""
    storage = Storage(config.storage.uri)
    count = 0
    for name in storage.list(JOURNAL):
        journal = json.loads(storage.read(JOURNAL, name))
        if journal["table"] != name_of(table):
            continue
        free = set(journal["files"]) - used(table, Manifests(table))
        delete(table, sorted(free))
        count += len(free)
        storage.filesystem.delete_file(storage.path(JOURNAL, name))
    return count


def _leftovers(table: "Table", sought: Sought, settings: MaintenanceConfig, dry_run: bool, done: Forgotten) -> None:
    """Remove uncommitted files that tell of the conversations, unless an ingest could still commit them."""
    before_s = time.time() - settings.orphan_hours * 3_600
    there = {file.uri for file in stored(table)}
    telling = [file for file in unused(table) if tells(table, file.uri, sought, there)]
    old = [file.uri for file in telling if file.modified_s < before_s or file.uri.endswith(".avro")]
    done.staged = sorted(file.uri for file in telling if file.uri not in old)
    done.deleted += len(old)
    if not dry_run:
        delete(table, old)
