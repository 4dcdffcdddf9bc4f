"""A block of raw records examined: parsed, checked, masked, filled in, hashed and signed; staged; and its keys.

This is all that can be said of a record without looking at any other. Records that are plainly right go through a
column at a time, the others one by one.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from app.conversation import SIGNATURE_BYTES, content_hashes, id_hash, split_of
from app.ingestion import checks
from app.ingestion.anomalies import features
from app.ingestion.columns import ACCEPTED, documents, filled, table_of
from app.ingestion.imputation import Imputer
from app.ingestion.quality import Conversation, Refusal, Rules, check, id_of, known_columns, parse
from app.ingestion.quarantine import EXCERPT_CHARS
from app.ingestion.signatures import signatures
from app.ingestion.staging import EXAMINED, KEYS, BlockName, Staging
from app.ingestion.vectorised import plain
from app.privacy import Detector, mask_column, mask_document, mask_messages
from app.settings.ingestion import CheckConfig, SourceConfig

MASKED_BYTES = 4_000
"""Of a refused record no more is looked at to make its excerpt."""
HALVED_CHARS = 200
"""No piece of personal data that is recognised only when it is whole is longer."""


@dataclass(frozen=True)
class Examiner:
    """All that the examination of a block depends on, besides the block."""

    parts: Sequence[tuple[str, int, datetime | None]]
    """URI and source of each part, and when it was written."""
    sources: Sequence[SourceConfig]
    rules: Rules
    checks: Sequence[CheckConfig]
    detector: Detector | None
    imputer: Imputer
    validation_fraction: float
    sign: bool
    score: bool
    staging: Staging


def examine(batch: pa.Table, examiner: Examiner) -> pa.Table:
    """Examine a block of `RAW` rows, stage it, and return its `KEYS`, in the same order."""
    keys = []
    for part in batch["part"].unique().to_pylist():
        raw = batch.filter(pc.equal(batch["part"], part)).combine_chunks()
        name = BlockName(part, raw["position"][0].as_py(), raw.num_rows)
        examiner.staging.begin(name)
        rows = examined(raw, part, examiner)
        examiner.staging.write(name, rows)
        keys.append(_keys(rows, name))
    return pa.concat_tables(keys) if keys else KEYS.empty_table()


def examined(raw: pa.Table, part: int, examiner: Examiner) -> pa.Table:
    """Raw records of one part as `EXAMINED` rows, in the same order."""
    uri, index, arrived_at = examiner.parts[part]
    source = examiner.sources[index]
    raw = raw.set_column(raw.schema.get_field_index("arrived"), "arrived", _arrived(raw["arrived"], arrived_at))
    places, whole = _plainly_right(raw, uri, source, examiner)
    rest = np.setdiff1d(np.arange(raw.num_rows), places)
    judged = _one_by_one(raw.take(pa.array(rest)), uri, source, examiner)
    kept = [index for index, entry in enumerate(judged) if isinstance(entry, Conversation)]
    accepted = pa.concat_tables([whole, table_of([entry for entry in judged if isinstance(entry, Conversation)])])
    accepted = accepted.combine_chunks()
    records = np.concatenate([places, rest[kept]]).astype(np.int64)
    refusals = {int(rest[index]): entry for index, entry in enumerate(judged) if isinstance(entry, Refusal)}
    if examiner.checks:
        accepted, failed = checks.applied(accepted, examiner.checks)
        for row, refusal in failed.items():
            refusal.conversation_id = accepted["conversation_id"][row].as_py()
            refusals[int(records[row])] = refusal
    return _in_order(_described(accepted, examiner), records, refusals, raw, uri, examiner)


def _arrived(each: pa.ChunkedArray, arrived_at: datetime | None) -> pa.ChunkedArray:
    """When each record was written; that of its part where it has no time of its own."""
    return each if arrived_at is None else pc.coalesce(each, pa.scalar(arrived_at, each.type))


def _plainly_right(raw: pa.Table, uri: str, source: SourceConfig, examiner: Examiner) -> tuple[np.ndarray, pa.Table]:
    """The records that need nobody's attention, as `ACCEPTED` rows, and which they are."""
    without_problem = np.flatnonzero(pc.is_null(raw["problem"]).to_numpy())
    records = raw["raw"].combine_chunks().take(pa.array(without_problem))
    found = plain(records, source.columns, examiner.rules, known_columns(source.columns))
    places = without_problem[found.places]
    rows, right = filled(found.rows, examiner.imputer, raw["arrived"].take(pa.array(places)))
    right &= _has_id(rows, raw, places)
    made = _made_ids(rows["conversation_id"], uri, raw["position"].take(pa.array(places)))
    rows = rows.set_column(0, "conversation_id", made).take(pa.array(np.flatnonzero(right)))
    messages, counts = rows["messages"].combine_chunks(), np.zeros(rows.num_rows, np.int32)
    if examiner.detector is not None:
        messages, counts = mask_column(messages, examiner.detector)
    columns = {"messages": messages, "masked": pa.array(counts)}
    whole = [columns[name] if name in columns else rows[name] for name in ACCEPTED.names]
    return places[right], pa.table(whole, schema=ACCEPTED)


def _has_id(rows: pa.Table, raw: pa.Table, places: np.ndarray) -> np.ndarray:
    """Whether records have an id, or need none since their source has none."""
    identified = raw["identified"].to_numpy()[places].astype(bool)
    return np.asarray(pc.is_valid(rows["conversation_id"]).to_numpy() | ~identified)


def _made_ids(ids: pa.ChunkedArray, uri: str, positions: pa.ChunkedArray) -> pa.ChunkedArray:
    """The ids, and for records without one what their place is called."""
    made = pc.binary_join_element_wise(uri, positions.cast(pa.string()), "#")
    return pc.coalesce(ids, made)


def _one_by_one(raw: pa.Table, uri: str, source: SourceConfig, examiner: Examiner) -> list[Conversation | Refusal]:
    known = known_columns(source.columns)
    found: list[Conversation | Refusal] = []
    for position, record, problem, identified, arrived_at in zip(
        *(raw[name].to_pylist() for name in ("position", "raw", "problem", "identified", "arrived")), strict=True
    ):
        row: dict[str, Any] = {}
        try:
            if problem is not None:
                raise Refusal(problem)
            row = parse(record)
            made_id = None if identified else f"{uri}#{position}"
            conversation = check(row, source.columns, examiner.rules, made_id, known)
            found.append(_completed(conversation, arrived_at, examiner))
        except Refusal as refusal:
            refusal.conversation_id = id_of(row, source.columns)
            found.append(refusal)
    return found


def _completed(conversation: Conversation, arrived_at: datetime | None, examiner: Examiner) -> Conversation:
    """The conversation with what it lacks filled in, and without personal data."""
    conversation = examiner.imputer.fill(conversation, arrived_at)
    if examiner.detector is not None:
        conversation.messages, counts = mask_messages(conversation.messages, examiner.detector)
        conversation.masked = counts.total()
    return conversation


def _described(accepted: pa.Table, examiner: Examiner) -> pa.Table:
    """`ACCEPTED` rows with all that follows from their text."""
    messages = accepted["messages"].combine_chunks()
    hashes = content_hashes(messages)
    splits = [split_of(key, examiner.validation_fraction) for key in hashes]
    signed = _signed(messages) if examiner.sign else pa.nulls(len(messages), pa.binary(SIGNATURE_BYTES))
    scored = _features(messages) if examiner.score else pa.nulls(len(messages), pa.list_(pa.float32()))
    columns = {
        "content_hash": pa.array(hashes, pa.string()),
        "split": pa.array(splits, pa.string()),
        "anomaly_score": pa.nulls(len(messages), pa.float32()),
        "minhash": signed,
        "features": scored,
    }
    for name, column in columns.items():
        accepted = accepted.append_column(name, column)
    return accepted


def _in_order(
    accepted: pa.Table, records: np.ndarray, refusals: Mapping[int, Refusal], raw: pa.Table, uri: str,
    examiner: Examiner,
) -> pa.Table:  # fmt: skip
    """`EXAMINED` rows in the order of the raw records: what is accepted, and what is refused."""
    place = np.full(raw.num_rows, -1)
    place[records] = np.arange(len(records))
    place[list(refusals)] = -1
    taken = accepted.take(pa.array(place, mask=place < 0))
    columns = dict(zip(taken.column_names, taken.columns, strict=True)) | _refused(refusals, raw, uri, examiner)
    columns |= {"source": pa.array([uri] * raw.num_rows, pa.string()), "position": raw["position"]}
    return pa.table([columns[field.name] for field in EXAMINED], schema=EXAMINED)


def _signed(messages: pa.ListArray) -> pa.Array:
    made = np.ascontiguousarray(signatures(documents(messages)))
    kind = pa.binary(SIGNATURE_BYTES)
    return pa.FixedSizeBinaryArray.from_buffers(kind, len(made), [None, pa.py_buffer(made)])


def _features(messages: pa.ListArray) -> pa.Array:
    found = features(messages)
    ends = np.arange(len(found) + 1, dtype=np.int32) * found.shape[1]
    return pa.ListArray.from_arrays(pa.array(ends), pa.array(found.ravel(), pa.float32()))


def _refused(refusals: Mapping[int, Refusal], raw: pa.Table, uri: str, examiner: Examiner) -> dict[str, pa.Array]:
    """The columns of what is refused; none in the rows of what is not."""
    made: list[tuple[Any, ...]] = [(None,) * 6] * raw.num_rows
    for place, refusal in refusals.items():
        record, position = raw["raw"][place].as_py(), raw["position"][place].as_py()
        made[place] = (
            refusal.reason, refusal.detail, excerpt(record, examiner.detector), len(record),
            refusal_hash(uri, position, refusal.reason, record),
            None if refusal.conversation_id is None else id_hash(refusal.conversation_id),
        )  # fmt: skip
    names = ("reason", "detail", "raw", "raw_bytes", "refusal_hash", "id_hash")
    values = zip(*made, strict=True) if made else iter([()] * len(names))
    return {name: pa.array(list(column), EXAMINED.field(name).type) for name, column in zip(names, values, strict=True)}


def excerpt(record: bytes, detector: Detector | None) -> str:
    """The beginning of a refused record, to be looked at: personal data masked before it is cut."""
    text = record[:MASKED_BYTES].decode(errors="replace")
    masked = mask_document(text, detector) if detector else text
    # What a cut has halved is not recognised.
    whole = masked[:-HALVED_CHARS] if len(record) > MASKED_BYTES else masked
    return whole[:EXCERPT_CHARS]


def refusal_hash(uri: str, position: int, reason: str, record: bytes) -> str:
    """What makes a refusal the same when the same input is read again."""
    return hashlib.sha256(b"\0".join([uri.encode(), str(position).encode(), reason.encode(), record])).hexdigest()


def _keys(rows: pa.Table, name: BlockName) -> pa.Table:
    halves = [bytes.fromhex(key[:32]) if key else None for key in rows["content_hash"].to_pylist()]
    messages = rows["messages"].combine_chunks()
    turns = pc.fill_null(pc.list_value_length(messages), 0)
    lengths = pc.utf8_length(messages.flatten().field("content")).to_numpy(zero_copy_only=False)
    totals = np.concatenate([[0], np.cumsum(lengths)])
    ends = np.concatenate([[0], np.cumsum(turns.to_numpy(zero_copy_only=False))])
    columns = [
        pa.array(np.full(rows.num_rows, name.part, np.int32)),
        rows["position"],
        pa.array(np.full(rows.num_rows, name.start)),
        pa.array(np.full(rows.num_rows, name.rows)),
        pa.array(np.arange(rows.num_rows, dtype=np.int32)),
        pa.array(halves, pa.binary(16)),
        rows["conversation_id"],
        rows["intent"],
        turns.cast(pa.int32()),
        pa.array((totals[ends[1:]] - totals[ends[:-1]]).astype(np.int32)),
    ]
    return pa.table(columns, schema=KEYS)
