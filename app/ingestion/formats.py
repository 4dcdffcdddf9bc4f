"""JSONL, CSV and Parquet as pieces of records, in bounded memory however large the file is."""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from app.config import ColumnsConfig

CHUNK_BYTES = 1 << 20
PIECE_BYTES = 4 << 20
MAX_RECORD_BYTES = 16 << 20


@dataclass(frozen=True)
class Piece:
    """Some records of a file, one after another."""

    start: int
    """Position of the first one."""
    raw: Sequence[bytes]
    """Each a JSON document, if it is whole."""
    problems: Sequence[str | None]
    """For each, why it is none."""
    identified: bool
    """Whether records of this file carry their own id."""


def pieces(records: Iterator[tuple[bytes, str | None]], batch_rows: int, identified: bool) -> Iterator[Piece]:
    """Records put together until they are `batch_rows`, or more than 4 MB."""
    start, raw, problems, size = 0, list[bytes](), list[str | None](), 0
    for record, problem in records:
        raw.append(record)
        problems.append(problem)
        size += len(record)
        if len(raw) >= batch_rows or size > PIECE_BYTES:
            yield Piece(start, raw, problems, identified)
            start, raw, problems, size = start + len(raw), [], [], 0
    if raw:
        yield Piece(start, raw, problems, identified)


def read_jsonl(stream: pa.NativeFile, columns: ColumnsConfig, batch_rows: int) -> Iterator[Piece]:
    """One record a line. Whether records have ids is seen from the first megabyte."""
    first = stream.read(CHUNK_BYTES)
    identified = json.dumps(columns.conversation_id).encode() in first
    return pieces(_lines(first.removeprefix(b"\xef\xbb\xbf"), stream), batch_rows, identified)


def _lines(first: bytes, stream: pa.NativeFile) -> Iterator[tuple[bytes, str | None]]:
    """Lines that are not blank; of one that is too long only its beginning is kept."""
    rest, skipping = b"", False
    chunk = first
    while chunk:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if skipping:
                skipping = False
            elif line.strip():
                yield line.strip(), None
        if len(rest) > MAX_RECORD_BYTES:
            if not skipping:
                yield rest[:CHUNK_BYTES], "too_long_record"
            rest, skipping = b"", True
        chunk = stream.read(CHUNK_BYTES)
    if rest.strip() and not skipping:
        yield rest.strip(), None


def read_csv(stream: pa.NativeFile, columns: ColumnsConfig, batch_rows: int) -> Iterator[Piece]:
    """One record a row below the header; fields may be quoted and hold line breaks.

    Raises:
        ValueError: There is no header, a column is missing, or a quote is never closed.
    """
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    csv.field_size_limit(MAX_RECORD_BYTES)
    rows = csv.reader(text, strict=True)
    try:
        header = next(rows)
    except (StopIteration, csv.Error):
        raise ValueError("it has no header line") from None
    check_columns(header, columns)
    return pieces(_rows(rows, header), batch_rows, columns.conversation_id in header)


def _rows(rows: Any, header: list[str]) -> Iterator[tuple[bytes, str | None]]:
    while True:
        begins = rows.line_num + 1
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            # What follows a quote that is not closed belongs to nobody knows which record.
            if "unexpected end" in str(error) or "field larger" in str(error):
                raise ValueError(f"a quote is opened at line {begins} and not closed") from None
            yield b"[]", "invalid_csv"
            continue
        if len(row) == len(header):
            yield json.dumps(dict(zip(header, row, strict=True))).encode(), None
        elif row:
            yield json.dumps(row).encode(), "wrong_column_count"


def read_parquet(file: pa.NativeFile, columns: ColumnsConfig, batch_rows: int) -> Iterator[Piece]:
    """One record a row, as JSON; times become ISO 8601.

    Raises:
        ValueError: A column is missing.
    """
    import pyarrow.parquet as pq

    parquet = pq.ParquetFile(file)
    names = parquet.schema_arrow.names
    check_columns(names, columns)
    rows = (row for batch in parquet.iter_batches(batch_rows) for row in batch.to_pylist())
    records = ((json.dumps(row, default=_plain).encode(), None) for row in rows)
    return pieces(records, batch_rows, columns.conversation_id in names)


def _plain(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def check_columns(present: Sequence[str], columns: ColumnsConfig) -> None:
    """Every column that the configuration names has to be there; one that it leaves at its default may be missing.

    Raises:
        ValueError: One is not; names it and those that are.
    """
    named = [
        (key, getattr(columns, key))
        for key, field in ColumnsConfig.model_fields.items()
        if key not in ("user", "messages", "assistant") and getattr(columns, key) != field.default
    ]
    if columns.user is None:
        named.append(("messages", columns.messages))
    else:
        named.append(("user", columns.user))
        named += [("assistant", name) for name in reply_columns(columns)]
    missing = [f"columns.{key} {name!r}" for key, name in sorted(named) if name not in present]
    if missing:
        raise ValueError(f"it has no {', '.join(missing)}; its columns are {', '.join(present)}")


def reply_columns(columns: ColumnsConfig) -> list[str]:
    """The columns that the reply of a one-turn table is made from."""
    if columns.assistant is None:
        return []
    return re.findall(r"\{([^{}]+)\}", columns.assistant) or [columns.assistant]


READERS: dict[str, Callable[[pa.NativeFile, ColumnsConfig, int], Iterator[Piece]]] = {
    "jsonl": read_jsonl,
    "csv": read_csv,
    "parquet": read_parquet,
}
