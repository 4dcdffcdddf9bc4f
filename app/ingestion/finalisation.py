"""Staged blocks made into data files: verdicts applied, anomalies scored, refusals set aside, everything counted.

A task gets some blocks and all that was decided about their records, so it needs nobody else. Files are named by
run and task: one that is tried again replaces its own files.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc

from app.conversation import id_hash
from app.drift import Sketch
from app.errors import StorageError
from app.ingestion.anomalies import Baseline
from app.ingestion.checks import rule_of
from app.ingestion.quarantine import EXCERPT_CHARS, QUARANTINE
from app.ingestion.rates import counted
from app.ingestion.staging import BlockName, Staging
from app.settings.ingestion import IngestionConfig
from app.tables import file_schema, sync_file

if TYPE_CHECKING:
    from pyiceberg.table import Table

SKETCHED_COLUMNS = ["intent", "language", "channel", "messages"]
EXAMPLES = 3
"""Refused records that a report shows of each reason."""


@dataclass(frozen=True)
class Target:
    """Where and how a table's data files are written; plain, so that it can be sent to a task."""

    location: str
    properties: dict[str, str]
    schema: pa.Schema

    @classmethod
    def of(cls, table: "Table") -> "Target":
        """The target that a table is."""
        return cls(table.location(), dict(table.io.properties), file_schema(table))


@dataclass
class Extent:
    """What was read of one part."""

    records: int = 0
    first_position: int = 2**63 - 1
    last_position: int = -1

    def widen(self, other: "Extent") -> None:
        """Add another stretch of the same part."""
        self.records += other.records
        self.first_position = min(self.first_position, other.first_position)
        self.last_position = max(self.last_position, other.last_position)


@dataclass
class Outcome:
    """What became of records: files, counts, and what a report shows."""

    kept_files: list[str] = field(default_factory=list)
    refused_files: list[str] = field(default_factory=list)
    kept: int = 0
    duplicates: int = 0
    near_duplicates: int = 0
    """Dropped ones: where the rule says otherwise they are refused, or only warned of."""
    dropped: Counter[str] = field(default_factory=Counter)
    """By rule: gone."""
    quarantined: Counter[str] = field(default_factory=Counter)
    """By rule: set aside."""
    warned: Counter[str] = field(default_factory=Counter)
    """By rule: accepted all the same."""
    imputed: Counter[str] = field(default_factory=Counter)
    """By column."""
    masked: int = 0
    """Conversations with personal data in them."""
    extents: dict[int, Extent] = field(default_factory=dict)
    """By index in the list of parts."""
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """By rule: some of the refused records."""
    scores: list[float] = field(default_factory=list)
    """Anomaly scores of some of the kept conversations."""
    days: Counter[int] = field(default_factory=Counter)
    """Kept conversations by the day they began, numbered from 1970."""
    sketch: Sketch = field(default_factory=Sketch)
    """Of the kept conversations, or a fair sample of them."""

    @property
    def refused(self) -> int:
        """Records that broke a rule which does more than warn."""
        return self.dropped.total() + self.quarantined.total()

    @property
    def read(self) -> int:
        """Records in all."""
        return self.kept + self.duplicates + self.near_duplicates + self.refused

    @classmethod
    def sum(cls, outcomes: Iterable["Outcome"]) -> "Outcome":
        """All outcomes as one."""
        whole = cls()
        for part in outcomes:
            whole.kept_files += part.kept_files
            whole.refused_files += part.refused_files
            whole.kept += part.kept
            whole.duplicates += part.duplicates
            whole.near_duplicates += part.near_duplicates
            whole.masked += part.masked
            whole.scores += part.scores
            for name in ("dropped", "quarantined", "warned", "imputed", "days"):
                getattr(whole, name).update(getattr(part, name))
            for index, extent in part.extents.items():
                whole.extents.setdefault(index, Extent()).widen(extent)
            for reason, shown in part.examples.items():
                whole.examples[reason] = [*whole.examples.get(reason, []), *shown][:EXAMPLES]
            whole.sketch = whole.sketch.merged(part.sketch)
        return whole


@dataclass(frozen=True)
class Finaliser:
    """All that data files depend on, besides blocks and verdicts."""

    staging: Staging
    kept: Target
    refused: Target
    ingestion: IngestionConfig
    baseline: Baseline | None
    held_refusals: np.ndarray
    """Of the refusals that the quarantine table holds, the first 64 bits of their hashes, sorted."""
    sketch_below: str
    """Conversations whose hash begins with no more than these 8 digits are sketched: a fair sample."""


def finalise(blocks: Sequence[BlockName], verdicts: pa.Table, task: int, finaliser: Finaliser) -> Outcome:
    """Write the data files of some blocks.

    Args:
        blocks: The blocks, in order.
        verdicts: `VERDICTS` on their records.
        task: Names the files.
        finaliser: Where to, and by which rules.

    Raises:
        StorageError: A file cannot be read or written.
    """
    outcome = Outcome()
    sketched: list[pa.Table] = []
    name = f"{finaliser.staging.run}-{task:05d}"
    with DataFile(finaliser.kept, name) as kept, DataFile(finaliser.refused, name) as refused:
        for block in blocks:
            rows = finaliser.staging.read(block)
            of_block = verdicts.filter(
                pc.and_(pc.equal(verdicts["part"], block.part), pc.equal(verdicts["start"], block.start))
            )
            chosen = _sort_out(rows, of_block, block.part, finaliser, outcome, kept, refused)
            hashes = pc.utf8_slice_codeunits(chosen["content_hash"], 0, 8)
            sketched.append(chosen.filter(pc.less_equal(hashes, finaliser.sketch_below)).select(SKETCHED_COLUMNS))
    outcome.sketch = Sketch.of(pa.concat_tables(sketched))
    outcome.kept_files, outcome.refused_files = kept.written, refused.written
    return outcome


def _sort_out(
    rows: pa.Table, verdicts: pa.Table, part: int, finaliser: Finaliser, outcome: Outcome, kept: "DataFile",
    refused: "DataFile",
) -> pa.Table:  # fmt: skip
    """Write what stays and set aside what does not; returns what stays."""
    reasons = np.array(rows["reason"].to_pylist(), dtype=object)
    details = np.array(rows["detail"].to_pylist(), dtype=object)
    stays = reasons == None  # noqa: E711
    scores = _scores(rows, stays, finaliser)
    _widen(outcome, part, rows)
    for row, verdict in zip(verdicts["row"].to_pylist(), verdicts["verdict"].to_pylist(), strict=True):
        if verdict == "duplicate":
            outcome.duplicates += 1
            stays[row] = False
            reasons[row] = "duplicate"
        elif stays[row]:
            stays[row] = _judged(verdict, row, reasons, finaliser, outcome)
    if finaliser.baseline is not None:
        limit, found = finaliser.ingestion.anomalies.threshold, _features(rows)
        for row in np.flatnonzero(stays & (scores > limit)).tolist():
            stays[row] = _judged("anomaly", row, reasons, finaliser, outcome)
            details[row] = finaliser.baseline.reason(found[row])
    chosen = rows.filter(pa.array(stays))
    chosen = chosen.set_column(
        chosen.schema.get_field_index("anomaly_score"),
        "anomaly_score",
        pa.array(scores[stays], pa.float32(), from_pandas=True),
    )
    _count_kept(outcome, chosen)
    kept.write(chosen)
    _set_aside(rows, reasons, details, finaliser, outcome, refused)
    return chosen


def _judged(name: Any, row: int, reasons: np.ndarray, finaliser: Finaliser, outcome: Outcome) -> bool:
    """Whether a record that breaks a rule stays all the same."""
    if rule_of(finaliser.ingestion, name).severity == "warn":
        outcome.warned[name] += 1
        # The text is there already: that its label contradicts is told, yet a copy it is.
        if name == "contradictory_label":
            outcome.duplicates += 1
            reasons[row] = "duplicate"
            return False
        return True
    reasons[row] = name
    return False


def _scores(rows: pa.Table, stays: np.ndarray, finaliser: Finaliser) -> np.ndarray:
    scores = np.full(rows.num_rows, np.nan, np.float32)
    if finaliser.baseline is not None and stays.any():
        scores[stays] = finaliser.baseline.scores(_features(rows)[stays])
    return scores


def _features(rows: pa.Table) -> np.ndarray:
    """The features of each row, NaN for one that has none."""
    column = rows["features"].combine_chunks()
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
    width = int(lengths.max()) if len(lengths) else 0
    found = np.full((len(lengths), width), np.nan, np.float32)
    found[lengths > 0] = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, width) if width else 0
    return found


def _widen(outcome: Outcome, part: int, rows: pa.Table) -> None:
    ends = pc.min_max(rows["position"]).as_py()
    outcome.extents.setdefault(part, Extent()).widen(Extent(rows.num_rows, ends["min"], ends["max"]))


def _count_kept(outcome: Outcome, rows: pa.Table) -> None:
    outcome.kept += rows.num_rows
    outcome.masked += int(pc.sum(pc.greater(rows["masked"], 0)).as_py() or 0)
    outcome.warned += _counts(pc.list_flatten(rows["warnings"]))
    outcome.imputed += _counts(pc.list_flatten(rows["imputed"]))
    outcome.days += counted(rows["started_at"].drop_null().to_numpy())
    outcome.scores += [score for score in rows["anomaly_score"][:200].to_pylist() if score is not None]


def _counts(names: pa.ChunkedArray) -> Counter[str]:
    return Counter({entry["values"]: entry["counts"] for entry in pc.value_counts(names).to_pylist()})


def _set_aside(
    rows: pa.Table, reasons: np.ndarray, details: np.ndarray, finaliser: Finaliser, outcome: Outcome,
    refused: "DataFile",
) -> None:  # fmt: skip
    kept_aside = []
    for row in np.flatnonzero((reasons != None) & (reasons != "duplicate")):  # noqa: E711
        reason = reasons[row]
        if rule_of(finaliser.ingestion, reason).severity == "drop":
            if reason == "near_duplicate":
                outcome.near_duplicates += 1
            else:
                outcome.dropped[reason] += 1
            continue
        outcome.quarantined[reason] += 1
        kept_aside.append(_refusal({name: rows[name][row].as_py() for name in REFUSED}, reason, details[row]))
    for entry in kept_aside:
        shown = outcome.examples.setdefault(entry["reason"], [])
        if len(shown) < EXAMPLES:
            shown.append({name: entry[name] for name in ("source", "position", "detail", "raw")})
    table = pa.Table.from_pylist(kept_aside, schema=QUARANTINE)
    hashes = np.array([int(value[:16], 16) for value in table["refusal_hash"].to_pylist()], np.uint64)
    refused.write(table.filter(pa.array(~np.isin(hashes, finaliser.held_refusals))))


REFUSED = (
    "source", "position", "conversation_id", "messages", "content_hash", "raw", "raw_bytes", "refusal_hash", "id_hash",
)  # fmt: skip


def _refusal(row: dict[str, Any], reason: str, detail: str | None) -> dict[str, Any]:
    """The row of the quarantine table; of a conversation that only the whole set refuses, its masked messages."""
    if row["raw"] is None:
        text = orjson.dumps(row["messages"]).decode()
        identity = "\0".join([row["source"], str(row["position"]), reason, row["content_hash"]])
        row |= {
            "raw": text[:EXCERPT_CHARS],
            "raw_bytes": len(text.encode()),
            "refusal_hash": hashlib.sha256(identity.encode()).hexdigest(),
            "id_hash": id_hash(row["conversation_id"]),
        }
    return {name: row[name] for name in QUARANTINE.names if name in row} | {"reason": reason, "detail": detail or ""}


class DataFile:
    """A Parquet file under a table, written block by block; there is none if nothing is written to it.

    Raises:
        StorageError: It cannot be written.
    """

    def __init__(self, target: Target, name: str) -> None:
        self._target = target
        self.uri = f"{target.location}/data/{name}.parquet"
        self._stream: Any = None
        self._writer: Any = None

    @property
    def written(self) -> list[str]:
        """The file's URI, if there is one."""
        return [self.uri] if self._writer is not None else []

    def write(self, rows: pa.Table) -> None:
        """Add rows; columns that the table does not have are left out."""
        if rows.num_rows == 0:
            return
        import pyarrow.parquet as pq
        from pyiceberg.io import load_file_io

        schema = self._target.schema
        try:
            if self._writer is None:
                file_io = load_file_io(self._target.properties, self._target.location)
                self._stream = file_io.new_output(self.uri).create(overwrite=True)
                self._writer = pq.ParquetWriter(self._stream, schema, compression="zstd")
            self._writer.write_table(rows.select(schema.names).cast(schema))
        except OSError as error:
            raise self._failed(error) from error

    def __enter__(self) -> "DataFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is None:
            return
        try:
            self._writer.close()
            self._stream.close()
            if kind is None and self.uri.startswith("file://"):
                sync_file(self.uri.removeprefix("file://"))
        except OSError as failure:
            if kind is None:
                raise self._failed(failure) from failure

    def _failed(self, error: OSError) -> StorageError:
        return StorageError(f"cannot write {self.uri} ({error})", "free some space or check the permissions")
