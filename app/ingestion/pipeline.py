"""Ingest: one batch, from what is new in the sources to one commit.

    read       a task a part: raw records with their places
    examine    a task a block: parse, check, mask, fill in, hash, sign; blocks staged, keys kept
    decide     copies, contradictions and near-duplicates, among the new keys and those that the table holds
    finalise   a task a share of the blocks: verdicts applied, anomalies scored, data files written
    commit     what was refused, then what was accepted together with how far every source has been read

Nothing is seen by a reader before the last commit, so a run that ends earlier, however it ends, has added no
conversation; and since that commit also says how far the sources have been read, running it again gives the same
rows, each once. A stream is this, again and again: see `follow`.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from app import tables, telemetry
from app.config import Config
from app.conversation import SCHEMA
from app.drift import Drift, compare
from app.errors import RayloopError, StageFailed, StageRefused, TableError
from app.ingestion import marks, page, report, sources
from app.ingestion.batch import process
from app.ingestion.checks import rule_of
from app.ingestion.finalisation import Outcome
from app.ingestion.history import History
from app.ingestion.parts import Marks, Part, is_stream
from app.ingestion.quarantine import QUARANTINE
from app.snapshots import ancestors
from app.versions import APP, TableVersion, digest

if TYPE_CHECKING:
    from pyiceberg.table import Table
JUDGED_RECORDS = 1_000
"""From how many records of streams on a share of them says something."""


@dataclass(frozen=True)
class Ingested:
    """The table version that holds the conversations, and what it took."""

    version: TableVersion
    figures: dict[str, Any]
    added: bool
    """False if everything had been there already."""
    outcome: Outcome = field(default_factory=Outcome, compare=False)
    drift: Sequence[Drift] = field(default=(), compare=False)


def ingest(config: Config) -> Ingested:
    """Bring what is new in the sources into `ingestion.table`: one snapshot, or none if nothing is new.

    Raises:
        SourceError: A source is missing, cannot be read to its end, or has lost what comes next; nothing is added.
        StageRefused: Too many records broke a rule; they are in the quarantine table, nothing else is added.
        StageFailed: There is nothing to read, or another writer changed the table meanwhile.
    """
    key = ingest_key(config, sources.state(config))
    if done := _earlier(config, key):
        return done
    both = open_tables(config)
    known = marks.committed(config, both[0], settings_digest(config))
    parts = sources.parts_of(config, known)
    if not parts:
        if both[0].current_snapshot() is None:
            raise StageFailed("there is nothing to read yet in any source", "check ingestion.sources, or use --follow")
        return Ingested(tables.latest(config), report.nothing(), added=False)
    history = History(config)
    return ingest_parts(config, parts, known, key, both, partial(_judge, config, known), history)


def ingest_parts(
    config: Config, parts: Sequence[Part], known: Marks, key: str, both: "tuple[Table, Table]",
    judge: Callable[[Outcome], None], history: History,
) -> Ingested:  # fmt: skip
    """As `ingest`, of these parts; `judge` raises where the outcome is not to be committed."""
    kept_table, refused_table = both
    outcome = process(config, parts, kept_table, refused_table, history)
    drift = drifted(config, kept_table, outcome, history)
    shown = partial(page.write, config, parts, outcome, drift, history.sketch(kept_table))
    reached = dict(known) | dict(mark for part in parts if (mark := sources.mark_of(config, part)) is not None)
    appended: int | None = None
    about = report.describe(config, key, parts, outcome) | marks.record(config, reached, settings_digest(config))
    try:
        if outcome.refused_files:
            tables.append(refused_table, outcome.refused_files, about)
        judge(outcome)
        _check_drift(config, drift, outcome)
        # A stream goes on even where nothing was kept; otherwise what is not new makes no new version.
        follows = config.ingestion.follow.enabled and any(part.mark is not None for part in parts)
        if outcome.kept_files or follows or any(is_stream(part) for part in parts):
            appended = tables.append(kept_table, outcome.kept_files, about)
    except RayloopError as error:
        tables.discard(kept_table, outcome.kept_files)
        shown(f"refused-{key[:12]}", error)
        raise
    if appended is None and kept_table.current_snapshot() is None:
        raise StageFailed("nothing of what was read is to be kept, and the table is empty", "look at the sources")
    _count(outcome)
    version = tables.latest(config) if appended is None else TableVersion(config.ingestion.table, appended)
    shown(f"nothing-new-{key[:12]}" if appended is None else str(version.snapshot_id), None)
    return Ingested(version, report.figures(about), bool(outcome.kept_files), outcome, drift)


def _count(outcome: Outcome) -> None:
    """Say what became of records, as a metric."""
    records = telemetry.counter(telemetry.INGEST_RECORDS)
    counts = {
        "kept": outcome.kept, "duplicate": outcome.duplicates + outcome.near_duplicates,
        "quarantined": outcome.quarantined.total(), "dropped": outcome.dropped.total(),
    }  # fmt: skip
    for name, count in counts.items():
        if count:
            records.inc(count, tags={"outcome": name})


def ingest_key(config: Config, state: Sequence[dict[str, Any]]) -> str:
    """What makes an ingest the same as an earlier one: sources, settings and code."""
    return digest([state, settings_digest(config)])


def settings_digest(config: Config) -> str:
    """Of all that decides what becomes of a record, the sources left out: they have marks of their own."""
    settings = config.ingestion.model_dump(mode="json", exclude={"sources", "sample", "follow"})
    shared = (APP / f"{name}.py" for name in ("conversation", "privacy", "personal_data", "presidio"))
    modules = [*sorted((APP / "ingestion").rglob("*.py")), *shared]
    return digest([settings, [module.read_text() for module in modules]])


def open_tables(config: Config) -> "tuple[Table, Table]":
    """The tables of what is accepted and of what is refused; made where they are missing."""
    ingestion = config.ingestion
    return (
        tables.open_table(config.storage, ingestion.table, SCHEMA),
        tables.open_table(config.storage, ingestion.quarantine_table, QUARANTINE),
    )


def _earlier(config: Config, key: str) -> Ingested | None:
    """The version that the same ingest made before, whatever became of its receipt; not one left by a rollback."""
    try:
        table = tables.open_table(config.storage, config.ingestion.table)
    except TableError:
        return None
    for snapshot in ancestors(table):
        about = tables.summary_of(snapshot)
        if about.get("rayloop.ingest_key") == key:
            version = TableVersion(config.ingestion.table, snapshot.snapshot_id)
            return Ingested(version, report.figures(about), added=False)
    return None


def drifted(config: Config, table: "Table", outcome: Outcome, history: History) -> list[Drift]:
    """How what was kept differs from what the table holds; empty where either is too small to say."""
    settings = config.ingestion.drift
    old, new = history.sketch(table), outcome.sketch
    if not settings.detect or min(old.size, new.size) < settings.min_conversations:
        return []
    return compare(old, new, settings.false_alarm_rate)


def _check_drift(config: Config, drift: Sequence[Drift], outcome: Outcome) -> None:
    moved = [entry for entry in drift if entry.drifted]
    if moved and config.ingestion.drift.stop:
        effects = ", ".join(f"{entry.name} by {entry.effect:.2f}" for entry in moved)
        raise StageRefused(
            f"the new conversations are unlike those in the table ({effects}); nothing was added",
            "look at the report; to accept them set ingestion.drift.stop=false",
            report.counts(outcome),
        )


def _judge(config: Config, known: Marks, outcome: Outcome) -> None:
    """Stop if there was nothing, or if too much of it broke a rule.

    Raises:
        StageFailed: The sources hold no record.
        StageRefused: A rule's share or the refused share is above its limit, or all of it was refused.
    """
    formats = {source.format for source in config.ingestion.sources}
    if outcome.read == 0 and not formats & {"kafka", "sql", "traffic"}:
        raise StageFailed("the sources hold no record", "check ingestion.sources")
    # A few bad messages may be all that is new of a quiet stream that was read before: refusing them would only meet
    # them again the next time.
    few = bool(known) and formats <= {"kafka"} and outcome.read < JUDGED_RECORDS
    check_rules(config, outcome, stop_only=few)
    if not few:
        check_refused(config, outcome)


def check_refused(config: Config, outcome: Outcome) -> None:
    """Stop if too much was refused.

    Raises:
        StageRefused: The refused share is above its limit, or all of it was refused.
    """
    ingestion = config.ingestion
    share = outcome.refused / max(1, outcome.read)
    if share > ingestion.max_refused_fraction or (outcome.read and outcome.refused == outcome.read):
        often = (outcome.quarantined + outcome.dropped).most_common(5)
        raise StageRefused(
            f"refused {share:.1%} of {outcome.read} records ({', '.join(f'{name} {count}' for name, count in often)}), "
            f"the limit is {ingestion.max_refused_fraction:.1%}; nothing was added, the refused records are in table "
            f"{ingestion.quarantine_table}",
            "correct the sources, or raise ingestion.max_refused_fraction to accept this",
            report.counts(outcome),
        )


def check_rules(config: Config, outcome: Outcome, stop_only: bool = False) -> None:
    """Stop if a rule was broken more often than it may be; `stop_only`: only rules of severity stop are looked at.

    Raises:
        StageRefused: It was; nothing is to be added.
    """
    ingestion = config.ingestion
    dropped = outcome.dropped + Counter(near_duplicate=outcome.near_duplicates)
    for name, count in (outcome.quarantined + dropped + outcome.warned).items():
        rule = rule_of(ingestion, name)
        if stop_only and rule.severity != "stop":
            continue
        if count > rule.limit * outcome.read:
            raise StageRefused(
                f"{count} of {outcome.read} records break rule {name} ({rule.severity}), the limit is "
                f"{rule.limit:.2%}; nothing was added, refused records are in table {ingestion.quarantine_table}",
                f"correct the sources, or raise ingestion.rules.{name}.max_fraction",
                report.counts(outcome),
            )
