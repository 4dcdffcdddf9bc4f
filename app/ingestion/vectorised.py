"""The same as `quality`, for whole batches at once: the records that are plainly right, a column at a time.

A record is plainly right if no rule can have anything to say of it and nothing in it has to be normalised: most are.
Every other one is left to `quality`, record by record, which alone decides what is wrong with it; so this module
never refuses, and where it accepts, it accepts what `quality` would, with the same values.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pj

from app.conversation import MESSAGES, ROLES
from app.ingestion.quality import Rules
from app.settings.ingestion import ColumnsConfig

MOST_BAD_FRACTION = 0.2
"""Beyond this share of lines that do not parse, parsing them one by one is faster."""
UNEXPECTED = " unexpected"
"""Column of our own beside those of the source."""
_MESSAGE = pa.struct([*MESSAGES.value_type, ("timestamp", pa.string())])
_ROW = re.compile(r"in row (\d+)$")
_TIME = r"^(19[7-9]\d|20\d\d)-\d\d-\d\d[T ]\d\d:\d\d:\d\d(Z|\+00:00)$"


@dataclass(frozen=True)
class Plain:
    """The plainly right records of a batch."""

    places: np.ndarray
    """(rows,), which records of the batch they are, ascending"""
    rows: pa.Table
    """conversation_id (none: the source has no ids), channel, language, started_at, intent, messages, warnings"""


def plain(raw: pa.Array, columns: ColumnsConfig, rules: Rules, known: frozenset[str] | None) -> Plain:
    """The plainly right ones of raw records.

    Args:
        raw: Binary, JSON documents, none of them null.
        columns: Which of their members is what; a mapping of one-turn tables is not for whole batches.
        rules: What is accepted.
        known: From `quality.known_columns`.
    """
    stretches = list(_parsed(raw, columns, known)) if columns.user is None else []
    if not stretches:
        return Plain(np.empty(0, np.int64), ROWS.empty_table())
    places = np.concatenate([np.arange(start, start + table.num_rows) for start, table in stretches])
    chosen, rows = _right(pa.concat_tables([table for _, table in stretches]), columns, rules)
    return Plain(places[chosen], rows)


ROWS = pa.schema(
    [
        ("conversation_id", pa.string()),
        ("channel", pa.string()),
        ("language", pa.string()),
        ("started_at", pa.timestamp("us", tz="UTC")),
        ("intent", pa.string()),
        ("messages", MESSAGES),
        ("warnings", pa.list_(pa.string())),
    ]
)


def _parsed(
    raw: pa.Array, columns: ColumnsConfig, known: frozenset[str] | None
) -> Iterator[tuple[int, pa.Table]]:  # fmt: skip
    """Stretches of records that parse with the types that they should have, each with the place of its first."""
    # What the parser would take for more or fewer records than one is not for it.
    braced = pc.and_(pc.starts_with(raw, "{"), pc.ends_with(raw, "}"))
    odd = pc.or_(pc.match_substring(raw, "\n"), pc.invert(braced))
    lines = _Lines(raw, columns, known)
    bad = 0
    for start, stop in _stretches(np.flatnonzero(odd.to_numpy(zero_copy_only=False)).tolist(), len(raw)):
        while start < stop and bad <= 10 + MOST_BAD_FRACTION * len(raw):
            table, failed = lines.parse(start, stop)
            end = stop if failed is None else failed
            if failed is not None:
                bad += 1
                table = lines.parse(start, end)[0] if end > start else None
            if table is not None and table.num_rows == end - start:
                yield start, table
            start = end + 1


def _stretches(breaks: list[int], stop: int) -> Iterator[tuple[int, int]]:
    """What lies between some places, as (first, one after the last)."""
    start = 0
    for place in [*breaks, stop]:
        if place > start:
            yield start, place
        start = place + 1


class _Lines:
    """Records as lines of one buffer, any stretch of which can be parsed without copying it."""

    def __init__(self, raw: pa.Array, columns: ColumnsConfig, known: frozenset[str] | None) -> None:
        records = raw.to_pylist()
        self._buffer = memoryview(b"\n".join(records))
        self._starts = np.concatenate([[0], np.cumsum(pc.binary_length(raw).to_numpy(zero_copy_only=False) + 1)])
        texts = dict.fromkeys((columns.conversation_id, columns.channel, columns.language, columns.started_at))
        messages = (columns.messages, pa.list_(_MESSAGE))
        self._schema = pa.schema([*((name, pa.string()) for name in texts), messages])
        self._known, self._messages = known, columns.messages

    def parse(self, start: int, stop: int) -> tuple[pa.Table | None, int | None]:
        """The records from `start` up to `stop` as a table, or the place of the first that does not fit."""
        content = self._buffer[self._starts[start] : self._starts[stop] - 1]
        try:
            table = pj.read_json(
                pa.BufferReader(content),
                read_options=pj.ReadOptions(use_threads=False, block_size=len(content) + 1),
                parse_options=pj.ParseOptions(explicit_schema=self._schema),
            )
        except pa.ArrowInvalid as error:
            found = _ROW.search(str(error))
            return None, min(start + int(found[1]), stop - 1) if found else start
        named = {name: _column(table, name) for name in self._schema.names}
        named |= {self._messages: _projected(named[self._messages], _MESSAGE), UNEXPECTED: self._unexpected(table)}
        return pa.table(named), None

    def _unexpected(self, table: pa.Table) -> pa.Array:
        """Whether a record has a member that the mapping does not name."""
        found = np.zeros(table.num_rows, bool)
        for name in set(table.column_names) - (self._known or set(table.column_names)):
            found |= pc.is_valid(table[name]).to_numpy()
        return pa.array(found)


def _right(table: pa.Table, columns: ColumnsConfig, rules: Rules) -> tuple[np.ndarray, pa.Table]:
    """The plainly right rows of parsed records, and which they are."""
    table = table.combine_chunks()
    ids, channels, languages, times = (
        _column(table, name)
        for name in (columns.conversation_id, columns.channel, columns.language, columns.started_at)
    )
    messages = _column(table, columns.messages)
    channels = pc.ascii_lower(channels)
    parsed_times = _times(times, rules)
    right = _and(
        pc.fill_null(_is_plain(ids), True),
        pc.or_kleene(pc.is_null(channels), pc.is_in(channels, pa.array(sorted(rules.channels), pa.string()))),
        pc.or_kleene(pc.is_null(languages), _is_known(languages, rules.languages)),
        pc.or_kleene(pc.is_null(times), pc.is_valid(parsed_times)),
    )
    unexpected = table[UNEXPECTED].to_numpy()
    if "unexpected_column" not in rules.warnings:
        right = right & ~unexpected
    right = right & _messages_are_right(messages, rules)
    chosen = np.flatnonzero(right)
    taken = pa.array(chosen)
    kept = messages.take(taken)
    warnings = pa.array([["unexpected_column"] if flag else [] for flag in unexpected[chosen]], pa.list_(pa.string()))
    found = [
        ids.take(taken), pc.fill_null(channels.take(taken), "unknown"), languages.take(taken),
        parsed_times.take(taken), _first_intents(kept), _projected(kept, MESSAGES.value_type), warnings,
    ]  # fmt: skip
    return chosen, pa.table(found, schema=ROWS)


def _column(table: pa.Table, name: str) -> pa.Array:
    column = table[name]
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _and(*masks: pa.Array) -> np.ndarray:
    result = masks[0].to_numpy(zero_copy_only=False)
    for mask in masks[1:]:
        result = result & pc.fill_null(mask, False).to_numpy(zero_copy_only=False)
    return np.asarray(result, bool)


def _is_plain(texts: pa.Array) -> pa.Array:
    """Whether texts are printable ASCII, not empty, with single spaces and those only between words."""
    words = pc.and_(pc.ascii_is_printable(texts), pc.greater(pc.binary_length(texts), 0))
    edges = pc.or_(pc.starts_with(texts, " "), pc.ends_with(texts, " "))
    return pc.and_(words, pc.invert(pc.or_(edges, pc.match_substring(texts, "  "))))


def _is_known(texts: pa.Array, known: frozenset[str]) -> pa.Array:
    if known:
        return pc.is_in(texts, pa.array(sorted(known), pa.string()))
    return _is_plain(texts)


def _times(times: pa.Array, rules: Rules) -> pa.Array:
    """Times in the commonest spelling of ISO 8601; null where they are none, or in the future."""
    import polars as pl

    usual = pc.fill_null(pc.match_substring_regex(times, _TIME), False)
    texts = pc.if_else(usual, pc.utf8_slice_codeunits(times, 0, 19), None).cast(pa.string())
    series = pl.Series(pc.replace_substring(texts, " ", "T"), dtype=pl.String)
    found = series.str.to_datetime("%Y-%m-%dT%H:%M:%S", time_unit="us", strict=False).to_arrow()
    parsed = found.cast(pa.timestamp("us")).cast(pa.timestamp("us", tz="UTC"))
    return pc.if_else(pc.fill_null(pc.less_equal(parsed, pa.scalar(rules.now, parsed.type)), False), parsed, None)


def _messages_are_right(messages: pa.Array, rules: Rules) -> np.ndarray:
    """For each list of messages, whether all of it is."""
    lengths = pc.fill_null(pc.list_value_length(messages), 0).to_numpy(zero_copy_only=False)
    right = (lengths > 0) & (lengths <= rules.max_messages)
    flat = messages.flatten()
    roles, contents, intents = (flat.field(name) for name in ("role", "content", "intent"))
    codes = pc.index_in(roles, pa.array(ROLES, pa.string())).to_numpy(zero_copy_only=False)
    short = pc.less_equal(pc.utf8_length(contents), rules.max_message_chars)
    labels = pc.or_kleene(pc.is_null(intents), _is_known(intents, rules.intents))
    each = _and(_is_plain(contents), short, labels, pc.is_null(flat.field("timestamp")))
    each &= ~np.isnan(codes)
    rows = np.repeat(np.arange(len(lengths)), lengths)
    starts = np.cumsum(lengths) - lengths
    turn = np.arange(len(rows)) - starts[rows]
    begins_with_system = np.zeros(len(lengths), bool)
    begins_with_system[lengths > 0] = codes[starts[lengths > 0]] == 0
    spoken = turn - begins_with_system[rows]
    each &= (codes == 1 + spoken % 2) | (spoken < 0)
    right &= lengths > begins_with_system
    right[rows[~each]] = False
    return np.asarray(right)


def _first_intents(messages: pa.Array) -> pa.Array:
    """The intent of the first labelled user message of each list."""
    flat = messages.flatten()
    labelled = pc.and_(pc.equal(flat.field("role"), "user"), pc.is_valid(flat.field("intent")))
    rows = np.repeat(np.arange(len(messages)), pc.list_value_length(messages).to_numpy(zero_copy_only=False))
    places = np.flatnonzero(labelled.to_numpy(zero_copy_only=False))
    owners, first = np.unique(rows[places], return_index=True)
    chosen = np.full(len(messages), -1)
    chosen[owners] = places[first]
    return flat.field("intent").take(pa.array(chosen, mask=chosen < 0))


def _projected(messages: pa.ListArray, message: pa.StructType) -> pa.ListArray:
    """The lists with the fields of `message` alone."""
    flat = messages.flatten()
    struct = pa.StructArray.from_arrays([flat.field(field.name) for field in message], fields=list(message))
    # A message that is none has no role, so its list is not right.
    lengths = pc.fill_null(pc.list_value_length(messages), 0).to_numpy(zero_copy_only=False)
    ends = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    return pa.ListArray.from_arrays(ends, struct, mask=messages.is_null() if messages.null_count else None)
