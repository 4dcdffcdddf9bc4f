"""A batch of raw records as rows that are ready to be compared: accepted with a content hash, or with a reason."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from app.config import SourceConfig
from app.conversation import SCHEMA, content_hash, split_of
from app.ingestion.quality import Refusal, Rules, check, parse
from app.ingestion.sources import SourceFile

EXCERPT_BYTES = 1_000

QUARANTINE = pa.schema(
    [
        ("source", pa.string()),  # URI
        ("position", pa.int64()),  # record number in the source, from 0
        ("reason", pa.string()),
        ("detail", pa.string()),  # where in the record; never its text
        ("raw", pa.string()),  # its beginning; may hold personal data
        ("raw_bytes", pa.int64()),  # its whole length
        ("refusal_hash", pa.string()),  # of source, position, reason and content, 64 hex digits
    ]
)
HISTORY = -1
"""In column `file`: the row only stands for a hash that a table already holds."""

ROWS = pa.schema(
    [
        *SCHEMA,
        *(field for field in QUARANTINE if field.name not in SCHEMA.names),
        ("key", pa.string()),  # content_hash of what is accepted, refusal_hash of what is refused
        ("file", pa.int32()),  # index in the list of files, or HISTORY
    ]
)


@dataclass(frozen=True)
class Reading:
    """All that the rows of a batch depend on, besides the batch."""

    files: Sequence[SourceFile]
    sources: Sequence[SourceConfig]
    rules: Rules
    validation_fraction: float


def rows(batch: pa.Table, reading: Reading) -> pa.Table:
    """A batch of `RAW` rows as `ROWS`, in the same order; a record that breaks a rule carries the reason."""
    made = [_row(reading, *values) for values in zip(*(column.to_pylist() for column in batch.columns), strict=True)]
    return pa.Table.from_pylist(made, schema=ROWS)


def history(batch: pa.Table) -> pa.Table:
    """A batch of hashes that a table already holds as `ROWS`."""
    hashes = batch.column(0)
    columns = {"key": hashes.cast(pa.string()), "file": pa.array([HISTORY] * len(hashes), pa.int32())}
    return pa.table([columns.get(field.name, pa.nulls(len(hashes), field.type)) for field in ROWS], schema=ROWS)


def _row(reading: Reading, file: int, position: int, raw: bytes, problem: Any, identified: bool) -> dict[str, Any]:
    uri = reading.files[file].uri
    source = reading.sources[reading.files[file].source]
    row: dict[str, Any] = {"source": uri, "position": position, "file": file}
    try:
        if problem is not None:
            raise Refusal(problem)
        made_id = None if identified else f"{uri}#{position}"
        conversation = check(parse(raw), source.columns, reading.rules, made_id)
    except Refusal as refusal:
        key = refusal_hash(uri, position, refusal.reason, raw)
        excerpt = raw[:EXCERPT_BYTES].decode(errors="replace")
        return row | {
            "reason": refusal.reason, "detail": refusal.detail, "raw": excerpt, "raw_bytes": len(raw),
            "refusal_hash": key, "key": key,
        }  # fmt: skip
    key = content_hash(conversation.messages)
    split = split_of(key, reading.validation_fraction)
    return row | vars(conversation) | {"content_hash": key, "split": split, "key": key}


def refusal_hash(uri: str, position: int, reason: str, raw: bytes) -> str:
    """What makes a refusal the same when the same input is read again."""
    return hashlib.sha256(b"\0".join([uri.encode(), str(position).encode(), reason.encode(), raw])).hexdigest()
