"""Ingest: read, check, compare, stage, and commit once.

    read (a task a file) -> check (a task a batch) -> exchange by content hash, with the hashes that the tables
    already hold -> stage as data files -> one commit of what was refused, one of what was accepted

Nothing is seen by a reader before the last commit, so a run that ends earlier, however it ends, has added no
conversation; and since what a table holds is never added again, running it again gives the same rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from app import tables
from app.config import Config
from app.conversation import SCHEMA
from app.errors import RayloopError, StageFailed, StageRefused, TableError
from app.ingestion import records, report, sources
from app.ingestion.execution import counted, cpus, ray_data
from app.ingestion.quality import Rules
from app.ingestion.sink import Staged, StagingSink, Target
from app.ingestion.sources import SourceFile
from app.versions import APP, TableVersion, digest

if TYPE_CHECKING:
    from pyiceberg.table import Table
    from ray.data import Dataset

SHARE_BYTES = 128 << 20
"""Most source bytes whose rows one staging task holds in memory."""
LEAST_SHARE_BYTES = 8 << 20
"""Fewer are not worth a task of their own."""


@dataclass(frozen=True)
class Ingested:
    """The table version that holds the conversations, and what it took."""

    version: TableVersion
    figures: dict[str, Any]
    added: bool
    """False if everything had been there already."""


def ingest(config: Config) -> Ingested:
    """Bring the conversations of all sources into `ingestion.table`.

    Raises:
        SourceError: A source is missing or cannot be read to its end; nothing is added.
        StageRefused: Too many records were refused; they are in the quarantine table, nothing else is added.
        StageFailed: There is nothing to read, or another writer changed the table meanwhile.
    """
    key = ingest_key(config, sources.state(config))
    if done := _earlier(config, key):
        return done
    files = sources.files_of(config.ingestion)
    kept_table = tables.open_table(config.storage, config.ingestion.table, SCHEMA)
    refused_table = tables.open_table(config.storage, config.ingestion.quarantine_table, records.QUARANTINE)
    staged = stage(config, files, kept_table, refused_table)
    about = report.describe(config, key, files, staged)
    try:
        if staged.refused_files:
            tables.append(refused_table, staged.refused_files, about)
        check_share(config, staged)
        if staged.kept_files:
            tables.append(kept_table, staged.kept_files, about)
    except RayloopError:
        tables.discard(kept_table, staged.kept_files)
        raise
    return Ingested(tables.latest(config), report.figures(about), added=bool(staged.kept_files))


def ingest_key(config: Config, state: Sequence[dict[str, Any]]) -> str:
    """What makes an ingest the same as an earlier one: sources, settings and code."""
    return digest([state, config.digest("ingestion"), _code()])


def _code() -> str:
    """Digest of the code that decides what becomes of a record: other shared modules do not."""
    modules = [*sorted((APP / "ingestion").glob("*.py")), APP / "conversation.py"]
    return digest([module.read_text() for module in modules])


def _earlier(config: Config, key: str) -> Ingested | None:
    """The version that the same ingest made before, whatever became of its receipt."""
    try:
        table = tables.open_table(config.storage, config.ingestion.table)
    except TableError:
        return None
    for snapshot in table.snapshots():
        about = tables.summary_of(snapshot)
        if about.get("rayloop.ingest_key") == key:
            version = TableVersion(config.ingestion.table, snapshot.snapshot_id)
            return Ingested(version, report.figures(about), added=False)
    return None


def stage(config: Config, files: Sequence[SourceFile], kept_table: "Table", refused_table: "Table") -> Staged:
    """Read and check everything, and stage what is new under its table.

    Raises:
        SourceError: A file cannot be read to its end; nothing has been staged, since staging waits for all files.
    """
    from ray.exceptions import RayError

    run = tables.fresh_name()
    sink = StagingSink(Target.of(kept_table), Target.of(refused_table), run)
    try:
        with ray_data(), counted("ingest") as count:
            rows = _rows(config, files, count, [(kept_table, "content_hash"), (refused_table, "refusal_hash")])
            rows.write_datasink(sink)
    except RayError as error:
        raise _cause(error) from None
    return sink.staged


def _rows(config: Config, files: Sequence[SourceFile], count: Any, held: "Sequence[tuple[Table, str]]") -> "Dataset":
    """All records and all hashes that the tables hold, exchanged so that one task has all rows of a key."""
    ingestion = config.ingestion
    rules = Rules.of(ingestion, datetime.now(UTC))
    reading = records.Reading(files, ingestion.sources, rules, ingestion.validation_fraction)
    rows = sources.read(ingestion, files).map_batches(
        partial(_checked, reading=reading, count=count), batch_size=ingestion.batch_rows, batch_format="pyarrow"
    )
    histories = [_history(config, table, column) for table, column in held if table.current_snapshot() is not None]
    if histories:
        rows = rows.union(*histories)
    size = sum(file.size * (5 if file.compression else 1) for file in files)
    return rows.repartition(shares(size, int(cpus())), keys=["key"])


def _checked(batch: pa.Table, reading: records.Reading, count: Any) -> pa.Table:
    rows = records.rows(batch, reading)
    count.add.remote(rows.num_rows)
    return rows


def _history(config: Config, table: "Table", column: str) -> "Dataset":
    snapshot = table.current_snapshot()
    assert snapshot is not None
    version = TableVersion(".".join(table.name()), snapshot.snapshot_id)
    hashes = tables.stream(config, version).select_columns([column])
    return hashes.map_batches(records.history, batch_format="pyarrow")


def shares(size: int, cpus: int) -> int:
    """Into how many parts the rows of `size` source bytes are exchanged: enough for memory, then for the CPUs."""
    return max(1, -(-size // SHARE_BYTES), min(cpus, -(-size // LEAST_SHARE_BYTES)))


def check_share(config: Config, staged: Staged) -> None:
    """Stop if there was nothing, or if too much of it was refused.

    Raises:
        StageFailed: The sources hold no record.
        StageRefused: The refused share is above its limit, or all of it was refused.
    """
    ingestion = config.ingestion
    if staged.read == 0:
        raise StageFailed("the sources hold no record", "check ingestion.sources")
    share = staged.refused / staged.read
    if share > ingestion.max_refused_fraction or staged.refused == staged.read:
        often = ", ".join(f"{reason} {count}" for reason, count in staged.refused_by_reason.most_common(5))
        raise StageRefused(
            f"refused {share:.1%} of {staged.read} records ({often}), the limit is "
            f"{ingestion.max_refused_fraction:.1%}; nothing was added, the refused records are in table "
            f"{ingestion.quarantine_table}",
            "correct the sources, or raise ingestion.max_refused_fraction to accept this",
            report.counts(staged),
        )


def _cause(error: BaseException) -> BaseException:
    """Our own error that a task ended with, if it did."""
    inner: BaseException | None = error
    while inner is not None:
        for found in (getattr(inner, "cause", None), inner):
            if isinstance(found, RayloopError) and type(found).__module__ == RayloopError.__module__:
                return found
        inner = inner.__cause__
    return error
