"""What becomes of records once all of them are known: copies, contradictions, repeated ids, near-duplicates.

Works on the keys of the new records and on those that the table holds; no text is looked at.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from app.ingestion.staging import KEYS

if TYPE_CHECKING:
    import polars as pl

REPEATED_ID = "duplicate_conversation_id"
HELD = pa.schema([("content_hash", pa.binary(16)), ("conversation_id", pa.string()), ("intent", pa.string())])
VERDICTS = pa.schema(
    [
        *(KEYS.field(name) for name in ("part", "start", "rows", "row")),
        ("verdict", pa.string()),  # duplicate | contradictory_label | duplicate_conversation_id | near_duplicate
    ]
)
"""One row for each record of which there is something to say; the others are kept."""


def held_keys(rows: pa.Table) -> pa.Table:
    """The keys of rows that the table holds, as `HELD`."""
    import polars as pl

    table = pl.from_arrow(rows)
    assert isinstance(table, pl.DataFrame)
    half = pl.col("content_hash").str.slice(0, 32).str.decode("hex").alias("content_hash")
    return table.select(half, "conversation_id", "intent").to_arrow().cast(HELD)


def decided(new: Sequence[pa.Table], held: Sequence[pa.Table], refuse_repeated_ids: bool = False) -> pa.Table:
    """The verdicts on new records.

    Of several records with one text the first counts, by part and position; one that the table holds counts
    before all. A later one is a duplicate; it contradicts the first if both are labelled and the labels differ.
    A record that stays and whose id another conversation has is a `duplicate_conversation_id`. Where such records are
    refused, they count no more than others that are: a later copy with an id of its own stays in their place.

    Args:
        new: Tables of `KEYS`, in any order.
        held: Tables of `HELD`.
        refuse_repeated_ids: Whether the rule `duplicate_conversation_id` does more than warn.

    Returns:
        `VERDICTS`, by part and position.
    """
    import polars as pl

    new, held = _shared(new, held)
    keys = pl.concat([_frame(table, KEYS) for table in (*new, KEYS.empty_table())]).lazy()
    keys = keys.sort("part", "position")
    known = pl.concat([_frame(table, HELD) for table in (*held, HELD.empty_table())]).lazy()
    place, repeated_id = ["part", "position"], pl.lit(REPEATED_ID).alias("verdict")
    passed = keys.select(place).head(0)
    if refuse_repeated_ids:
        passed = _passed_over(keys.collect(), known.collect()).lazy()
    replaced = keys.join(passed, on=place, how="semi").with_columns(repeated_id)
    keys = keys.join(passed, on=place, how="anti", maintain_order="left")
    first = pl.col("row").cum_count().over("content_hash") == 1
    originals = known.unique("content_hash", keep="any").select("content_hash", pl.col("intent").alias("held_intent"))
    ranked = keys.with_columns(
        first.alias("first"), pl.col("intent").first().over("content_hash").alias("first_intent")
    )
    joined = ranked.join(
        originals.with_columns(pl.lit(True).alias("held")), on="content_hash", how="left", maintain_order="left"
    )
    original = pl.when(pl.col("held").is_not_null()).then(pl.col("held_intent")).otherwise(pl.col("first_intent"))
    copy = pl.col("held").is_not_null() | ~pl.col("first")
    verdict = pl.when(copy & (pl.col("intent") != original).fill_null(False)).then(pl.lit("contradictory_label"))
    judged = joined.with_columns(verdict.when(copy).then(pl.lit("duplicate")).otherwise(None).alias("verdict"))
    ids = known.select("conversation_id").unique().with_columns(pl.lit(True).alias("taken"))
    stays = judged.filter(pl.col("verdict").is_null()).join(
        ids, on="conversation_id", how="left", maintain_order="left"
    )
    again = pl.col("taken").is_not_null() | (pl.col("row").cum_count().over("conversation_id") > 1)
    repeated = stays.filter(again).with_columns(repeated_id)
    columns = [*VERDICTS.names, "position"]
    judged = judged.filter(pl.col("verdict").is_not_null())
    found = pl.concat([table.select(columns) for table in (judged, repeated, replaced)])
    return found.sort("part", "position").select(VERDICTS.names).collect().to_arrow().cast(VERDICTS)


def _shared(new: Sequence[pa.Table], held: Sequence[pa.Table]) -> tuple[list[pa.Table], list[pa.Table]]:
    """The accepted records whose text or id may be another record's too, new or held: all that there can be a verdict
    on, and all that it follows from.

    Told by 64 bits of each, so that the keys of all records need not be in memory at once: of two million, each with an
    id and a label, those took 0.9 GB. Now and then bits are equal by chance: that is one record more to look at.
    """
    tables = [table for table in (*new, *held) if table.num_rows]
    valid = [np.asarray(pc.is_valid(table["content_hash"])) for table in tables]  # the others were refused
    chosen = [np.zeros(table.num_rows, bool) for table in tables]
    for bits in (_text_bits, _id_bits):
        every = [bits(table) for table in tables]
        ordered = np.sort(
            np.concatenate([np.empty(0, np.uint64), *(of[ok] for of, ok in zip(every, valid, strict=True))])
        )
        several = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
        for mask, of in zip(chosen, every, strict=True):
            mask |= _is_in(of, several)
    found = [table.filter(pa.array(mask & ok)) for table, mask, ok in zip(tables, chosen, valid, strict=True)]
    count = sum(table.num_rows > 0 for table in new)
    return found[:count], found[count:]


def _text_bits(table: pa.Table) -> np.ndarray:
    column = table["content_hash"].combine_chunks()
    offset, count = column.offset, len(column)
    return np.frombuffer(column.buffers()[1], "<u8").reshape(-1, 2)[offset : offset + count, 0]


def _id_bits(table: pa.Table) -> np.ndarray:
    import polars as pl

    ids = pl.Series(values=table["conversation_id"].combine_chunks(), dtype=pl.String)
    return ids.hash(seed=0).to_numpy()


def _is_in(values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Whether each value is one of the sorted others."""
    if not len(wanted):
        return np.zeros(len(values), bool)
    places = np.minimum(np.searchsorted(wanted, values), len(wanted) - 1)
    return np.asarray(wanted[places] == values)


def _passed_over(keys: "pl.DataFrame", known: "pl.DataFrame") -> "pl.DataFrame":
    """The places of new records whose id another conversation has, and whose text a later copy brings."""
    import polars as pl

    new = keys.join(known, on="content_hash", how="anti", maintain_order="left")
    shared = (pl.len().over("content_hash") > 1) | (pl.len().over("conversation_id") > 1)
    taken = set(known["conversation_id"])
    stays, waiting = set[bytes](), dict[bytes, list[tuple[int, int]]]()
    passed: list[tuple[int, int]] = []
    rows = new.filter(shared).select("part", "position", "content_hash", "conversation_id")
    for part, position, text, name in rows.iter_rows():
        if text in stays:
            continue
        if name in taken:
            waiting.setdefault(text, []).append((part, position))
            continue
        stays.add(text)
        taken.add(name)
        passed += waiting.pop(text, [])
    return pl.DataFrame(passed, {"part": pl.Int32, "position": pl.Int64}, orient="row")


def _frame(table: pa.Table, schema: pa.Schema) -> "pl.DataFrame":
    import polars as pl

    frame = pl.from_arrow(table.cast(schema))
    assert isinstance(frame, pl.DataFrame)
    return frame
