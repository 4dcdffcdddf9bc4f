"""Files as pieces of records, in bounded memory however large the file is: lines, rows and what is wrong with them."""

import csv
import io
import json
import re
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc

from app.settings.ingestion import ColumnsConfig

CHUNK_BYTES = 4 << 20
MAX_RECORD_BYTES = 16 << 20
TEXT_COLUMN = "text"
"""What the lines of a text file are called in a mapping."""
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Piece:
    """Some records of a file, one after another."""

    positions: Sequence[int] | np.ndarray
    """The place of each: see app/ingestion/sources.py."""
    raw: Sequence[bytes] | pa.BinaryArray
    """Each a JSON document, if it is whole."""
    problems: Sequence[str | None] | None
    """For each, why it is none; None: all are whole."""
    identified: bool
    """Whether records of this file carry their own id."""
    arrived_ms: Sequence[int | None] | None = None
    """When each was written, since 1970; None: not known, or when the file was."""


def pieces(records: Iterator[tuple[bytes, str | None]], batch_rows: int, identified: bool) -> Iterator[Piece]:
    """Records put together until they are `batch_rows`, or more than 4 MB; positions number them from 0."""
    start, raw, problems, size = 0, list[bytes](), list[str | None](), 0
    for record, problem in records:
        raw.append(record)
        problems.append(problem)
        size += len(record)
        if len(raw) >= batch_rows or size > CHUNK_BYTES:
            yield Piece(range(start, start + len(raw)), raw, problems, identified)
            start, raw, problems, size = start + len(raw), [], [], 0
    if raw:
        yield Piece(range(start, start + len(raw)), raw, problems, identified)


@dataclass(frozen=True)
class Span:
    """The part of a file of lines that one task reads: the lines that begin in it."""

    start: int = 0
    stop: int | None = None
    """None: to the end."""


WHOLE = Span()


def read_jsonl(
    stream: pa.NativeFile, columns: ColumnsConfig, batch_rows: int, span: Span = WHOLE
) -> Iterator[Piece]:  # fmt: skip
    """One record a line; positions are the bytes at which lines begin. Whether records have ids is seen from the
    file's first 4 MB."""
    first = stream.read(CHUNK_BYTES)
    identified = json.dumps(columns.conversation_id).encode() in first
    for offset, lines, problem in _stretches(stream, first, span):
        positions, raw = _split(offset, lines)
        problems = None if problem is None else [problem] * len(raw)
        for at in range(0, len(raw), batch_rows):
            yield Piece(positions[at : at + batch_rows], raw.slice(at, batch_rows), problems, identified)


def read_text(
    stream: pa.NativeFile, columns: ColumnsConfig, batch_rows: int, span: Span = WHOLE
) -> Iterator[Piece]:  # fmt: skip
    """One text a line, called `text` in the mapping; positions are the bytes at which lines begin.

    Raises:
        ValueError: The mapping names another column.
    """
    check_columns([TEXT_COLUMN], columns)
    for offset, lines, problem in _stretches(stream, stream.read(CHUNK_BYTES), span):
        positions, texts = _split(offset, lines)
        for at in range(0, len(texts), batch_rows):
            rows = [_text_row(text, problem) for text in texts.slice(at, batch_rows).to_pylist()]
            raw, problems = zip(*rows, strict=True)
            yield Piece(positions[at : at + batch_rows], raw, problems, identified=False)


def _text_row(line: bytes, problem: str | None) -> tuple[bytes, str | None]:
    try:
        return orjson.dumps({TEXT_COLUMN: line.decode()}), problem
    except UnicodeDecodeError:
        return line, problem or "invalid_encoding"


def _stretches(stream: pa.NativeFile, first: bytes, span: Span) -> Iterator[tuple[int, bytes, str | None]]:
    """Whole lines that begin in the span, some at a time: where the first begins, their bytes, what is wrong with
    them. Of a line that is too long only its beginning is kept."""
    offset, rest, too_long = span.start, b"", False
    if span.start:  # a line that begins before the span is another task's
        stream.seek(span.start - 1)
        chunk = stream.read(CHUNK_BYTES)
        offset, too_long = span.start - 1, True
    else:
        # White space of the same length, so that places stay what they are.
        chunk = first.replace(_BOM, b"   ", 1) if first.startswith(_BOM) else first
    while chunk:
        data = rest + chunk
        if too_long:
            gone = data.find(b"\n") + 1 or len(data)
            too_long = data[gone - 1 : gone] != b"\n"
            offset, data = offset + gone, data[gone:]
        if span.stop is not None and offset >= span.stop:
            return
        end = data.rfind(b"\n") + 1
        if span.stop is not None and offset + end > span.stop:
            end = data.find(b"\n", span.stop - offset - 1) + 1
        if end:
            yield offset, data[:end], None
        offset, rest = offset + end, data[end:]
        if span.stop is not None and offset >= span.stop:
            return
        if len(rest) > MAX_RECORD_BYTES:
            yield offset, rest[:CHUNK_BYTES].replace(b"\n", b" "), "too_long_record"
            offset, rest, too_long = offset + len(rest), b"", True
        chunk = stream.read(CHUNK_BYTES)
    if rest:
        yield offset, rest, None


def _split(offset: int, lines: bytes) -> tuple[np.ndarray, pa.BinaryArray]:
    """The lines that are not blank, white space around them left out, and where each begins."""
    ends = np.flatnonzero(np.frombuffer(lines, np.uint8) == ord("\n")) + 1
    if not len(ends) or ends[-1] < len(lines):
        ends = np.append(ends, len(lines))
    offsets = np.concatenate([[0], ends])
    texts = pa.StringArray.from_buffers(len(ends), pa.py_buffer(offsets.astype(np.int32)), pa.py_buffer(lines))
    trimmed = pc.ascii_trim_whitespace(texts).view(pa.binary())
    kept = pc.greater(pc.binary_length(trimmed), 0)
    return offset + offsets[:-1][kept.to_numpy(zero_copy_only=False)], trimmed.filter(kept)


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
            if "unexpected end" in str(error):
                raise ValueError(f"a quote is opened at line {begins} and not closed") from None
            if "field larger" in str(error):
                raise ValueError(
                    f"a field that begins at line {begins} has more than {MAX_RECORD_BYTES >> 20} MiB, or its quote is "
                    "not closed"
                ) from None
            yield b"[]", "invalid_csv"
            continue
        if len(row) == len(header):
            yield json.dumps(dict(zip(header, row, strict=True))).encode(), None
        elif row:
            yield json.dumps(row).encode(), "wrong_column_count"


def read_parquet(file: pa.NativeFile, columns: ColumnsConfig, batch_rows: int) -> Iterator[Piece]:
    """One record a row, as JSON; times become ISO 8601.

    Raises:
        ValueError: A column is missing, or its values are objects of a program.
    """
    import pyarrow.parquet as pq

    parquet = pq.ParquetFile(file)
    return of_batches(parquet.schema_arrow, parquet.iter_batches(batch_rows), columns, batch_rows)


def read_arrow(file: pa.NativeFile, columns: ColumnsConfig, batch_rows: int) -> Iterator[Piece]:
    """One record a row of an Arrow IPC file (Feather 2) or stream; times become ISO 8601.

    Raises:
        ValueError: A column is missing, or its values are objects of a program.
    """
    if file.seekable():
        is_file = file.read(6) == b"ARROW1"
        file.seek(0)
        if is_file:
            opened = pa.ipc.open_file(file)
            batches = (opened.get_batch(index) for index in range(opened.num_record_batches))
            return of_batches(opened.schema, _sound(batches), columns, batch_rows)
    stream = pa.ipc.open_stream(file)
    return of_batches(stream.schema, _sound(stream), columns, batch_rows)


def _sound(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Batches whose offsets lie within their buffers; Arrow believes a file, and would read what lies beyond.

    Whether texts are texts is seen record by record, later.

    Raises:
        ArrowInvalid: One does not.
    """
    for batch in batches:
        for field, column in zip(batch.schema, batch.columns, strict=True):
            kind = _in_bytes(field.type)
            # Of an extension type a view loses the children.
            as_is = kind == field.type or _extension(field) is not None
            (column if as_is else column.view(kind)).validate(full=True)
        yield batch


def _in_bytes(kind: pa.DataType) -> pa.DataType:
    """The type with bytes for texts."""
    if pa.types.is_string(kind):
        return pa.binary()
    if pa.types.is_large_string(kind):
        return pa.large_binary()
    if pa.types.is_list(kind):
        return pa.list_(_field_in_bytes(kind.value_field))
    if pa.types.is_large_list(kind):
        return pa.large_list(_field_in_bytes(kind.value_field))
    if pa.types.is_struct(kind):
        return pa.struct([_field_in_bytes(field) for field in kind])
    return kind


def _field_in_bytes(field: pa.Field) -> pa.Field:
    return field.with_type(_in_bytes(field.type))


def of_batches(
    schema: pa.Schema, batches: Any, columns: ColumnsConfig, batch_rows: int
) -> Iterator[Piece]:  # fmt: skip
    """One record a row of typed batches, as JSON; positions number them from 0.

    Raises:
        ValueError: A column is missing, or its values are objects of a program.
    """
    check_types(schema)
    check_columns(schema.names, columns)
    slices = (batch.slice(at, batch_rows) for batch in batches for at in range(0, batch.num_rows, batch_rows))
    records = (record for rows in slices for record in _records(rows))
    return pieces(records, batch_rows, columns.conversation_id in schema.names)


def _records(batch: pa.RecordBatch) -> Iterator[tuple[bytes, str | None]]:
    """The rows of a batch as JSON; if something is wrong with one of them, one at a time."""
    if batch.num_rows > 1:
        if batch.nbytes <= MAX_RECORD_BYTES:
            try:
                yield from [(as_json(row), None) for row in batch.to_pylist()]
                return
            except (UnicodeDecodeError, TypeError):
                pass  # one of them is not text; which, is found below
        for row in range(batch.num_rows):
            yield from _records(batch.slice(row, 1))
        return
    if batch.nbytes > MAX_RECORD_BYTES:
        yield b"", "too_long_record"
        return
    try:
        yield as_record(batch.to_pylist()[0])
    except UnicodeDecodeError:
        yield b"", "invalid_encoding"


def read_avro(stream: pa.NativeFile, columns: ColumnsConfig, batch_rows: int) -> Iterator[Piece]:
    """One record a row of an Avro object container; times become ISO 8601.

    Raises:
        ValueError: It is none, it is damaged, or a column is missing.
    """
    import fastavro
    from fastavro.schema import SchemaParseException, UnknownType

    # fastavro says what is wrong with damaged bytes in whatever way they made it fail.
    failures: tuple[type[Exception], ...] = (
        ValueError, EOFError, LookupError, TypeError, ArithmeticError, MemoryError, AttributeError, struct.error,
        zlib.error, SchemaParseException, UnknownType,
    )  # fmt: skip
    try:
        rows: Any = fastavro.reader(stream)
        schema = rows.writer_schema
    except failures as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
    if not isinstance(schema, dict) or schema.get("type") != "record":
        raise ValueError("its values are not records")
    names = [field["name"] for field in schema["fields"]]
    check_columns(names, columns)

    def records() -> Iterator[tuple[bytes, str | None]]:
        number = 0
        try:
            for row in rows:
                yield as_record(row)
                number += 1
        except failures as error:
            raise ValueError(f"after row {number}: {type(error).__name__}: {error}") from None

    return pieces(records(), batch_rows, columns.conversation_id in names)


def as_record(row: dict[str, Any]) -> tuple[bytes, str | None]:
    """A row of a typed source as a JSON document, or what is wrong with it."""
    try:
        return as_json(row), None
    except (UnicodeDecodeError, TypeError):
        return b"", "invalid_encoding"


def as_json(row: dict[str, Any]) -> bytes:
    """A row of a typed source as a JSON document.

    Raises:
        TypeError: It holds bytes that are not text.
    """
    return orjson.dumps(row, default=_plain, option=orjson.OPT_NON_STR_KEYS)


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode()
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def check_types(schema: pa.Schema) -> None:
    """Refuse columns whose values would be made by running code.

    Raises:
        ValueError: Arrow calls a column an extension type, such as Ray's pickled objects, that is not one of its own.
    """
    for field in schema:
        name = _extension(field)
        if name is not None and not name.startswith("arrow."):
            raise ValueError(f"column {field.name!r} is of extension type {name}, whose values could be programs")


def _extension(field: pa.Field) -> str | None:
    """The name of an extension type in a column, whether it is registered in this process or not."""
    kind = field.type
    if isinstance(kind, pa.BaseExtensionType):
        return str(kind.extension_name)
    said = (field.metadata or {}).get(b"ARROW:extension:name")
    if said is not None:
        return bytes(said).decode(errors="replace")
    if pa.types.is_nested(kind):
        children = (kind.field(index) for index in range(kind.num_fields))
        return next((name for child in children if (name := _extension(child))), None)
    return None


def check_columns(present: Sequence[str], columns: ColumnsConfig) -> None:
    """Every column that the configuration names has to be there; one that it leaves at its default may be missing.

    Raises:
        ValueError: One is not; names it and those that are.
    """
    named = [
        (key, getattr(columns, key))
        for key, field in ColumnsConfig.model_fields.items()
        if key not in ("user", "messages", "assistant", "ignored") and getattr(columns, key) != field.default
    ]
    if columns.user is None:
        named.append(("messages", columns.messages))
    else:
        named.append(("user", columns.user))
        named += [("assistant", name) for name in reply_columns(columns)]
    missing = [f"columns.{key} {name!r}" for key, name in sorted(named) if name not in present]
    if missing:
        raise ValueError(f"it has no {', '.join(missing)}; {_shown(present)}")


def _shown(names: Sequence[str]) -> str:
    """The columns there are; of a file without a header its first record is none of anybody's business."""
    if all(re.fullmatch(r"[A-Za-z_][\w.-]{0,40}", name) for name in names):
        return f"its columns are {', '.join(names)}"
    return f"it has {len(names)} columns, whose names are not those of a header"


def reply_columns(columns: ColumnsConfig) -> list[str]:
    """The columns that the reply of a one-turn table is made from."""
    if columns.assistant is None:
        return []
    return re.findall(r"\{([^{}]+)\}", columns.assistant) or [columns.assistant]


Reader = Callable[[pa.NativeFile, ColumnsConfig, int], Iterator[Piece]]
READERS: dict[str, Reader] = {
    "jsonl": read_jsonl,
    "text": read_text,
    "csv": read_csv,
    "parquet": read_parquet,
    "arrow": read_arrow,
    "avro": read_avro,
}
LINES: dict[str, Callable[[pa.NativeFile, ColumnsConfig, int, Span], Iterator[Piece]]] = {
    "jsonl": read_jsonl,
    "text": read_text,
}
"""Formats of which several tasks can read one file."""
