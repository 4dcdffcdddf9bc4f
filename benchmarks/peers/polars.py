"""polars and Hugging Face tokenizers, a plain script: 2 processes, each with files of its own, one thread each.

Columns all the way; Python sees only the messages that hold something suspicious, and those beyond ASCII.
polars has no JSON reader that passes over a broken line, so lines of a file that has one are tried by orjson first.
"""

import multiprocessing
import os
from functools import cache, partial
from multiprocessing.pool import Pool
from pathlib import Path

os.environ["POLARS_MAX_THREADS"] = "1"

import numpy as np
import orjson
import polars as pl
import pyarrow.parquet as pq

from app.conversation import normalised
from app.ingestion.anomalies import mojibake, repaired
from app.privacy import SUSPECT, Mask
from benchmarks.peers.protocol import BATCH_ROWS, PROCESSES, Counts, Request, main
from benchmarks.peers.records import DETECTOR, RULES, Packer

MESSAGE = pl.Struct({"role": pl.String, "content": pl.String, "intent": pl.String})
RECORD = pl.Struct(
    dict.fromkeys(("conversation_id", "channel", "language", "started_at"), pl.String) | {"messages": pl.List(MESSAGE)}
)


def parsed(file: Path) -> pl.DataFrame:
    """The lines of a file that are JSON objects."""
    lines = pl.read_csv(
        file, has_header=False, separator="\x01", quote_char=None, new_columns=["line"], encoding="utf8-lossy",
        schema={"line": pl.String},
    ).filter(
        pl.col("line").str.starts_with("{") & pl.col("line").str.ends_with("}") & ~pl.col("line").str.contains("\ufffd")
    )["line"]  # fmt: skip
    try:
        return lines.str.json_decode(RECORD).struct.unnest()
    except pl.exceptions.ComputeError:
        return lines.filter([_is_json(line) for line in lines]).str.json_decode(RECORD).struct.unnest()


def _is_json(line: str) -> bool:
    try:
        orjson.loads(line)
    except orjson.JSONDecodeError:
        return False
    return True


def clean(file: Path, request: Request) -> pl.Series:
    """Write the valid conversations of a file; returns their keys, in the same order."""
    rows = parsed(file).with_row_index("row").filter(pl.col("conversation_id").str.strip_chars().str.len_chars() > 0)
    channel = pl.col("channel").fill_null("unknown").str.to_lowercase()
    time = pl.col("started_at").str.to_datetime("%Y-%m-%dT%H:%M:%SZ", time_zone="UTC", time_unit="us", strict=False)
    rows = rows.with_columns(channel, time, pl.col("started_at").is_not_null().alias("has_time"))
    rows = rows.filter(
        pl.col("channel").is_in(list(RULES.channels)),
        ~pl.col("has_time") | pl.col("started_at").is_between(pl.datetime(1970, 1, 1, time_zone="UTC"), RULES.now),
        pl.col("messages").list.len().is_between(1, RULES.max_messages),
    )
    turns = rows.select("row", "messages").explode("messages").unnest("messages")
    turns = turns.with_columns(normal(turns["content"]))
    if request.masks:
        turns = turns.with_columns(masked(turns))
    place = pl.int_range(pl.len()).over("row") - (pl.col("role").first().over("row") == "system").cast(pl.Int64)
    expected = pl.when(place < 0).then(pl.lit("system")).when(place % 2 == 0).then(pl.lit("user"))
    length = pl.col("content").str.len_chars()
    right = (length.is_between(1, RULES.max_message_chars)) & (
        pl.col("role") == expected.otherwise(pl.lit("assistant"))
    )
    turns = turns.with_columns(right.fill_null(False).alias("right"))
    said = pl.concat_str(pl.col("role").str.slice(0, 1), pl.col("content").str.to_lowercase(), separator="\x1f")
    whole = turns.group_by("row", maintain_order=True).agg(
        pl.col("right").all(), said.str.join("\x1e").hash().alias("key"),
        pl.struct("role", "content", "intent").alias("messages"),
        pl.col("intent").filter(pl.col("role") == "user").drop_nulls().first(),
    )  # fmt: skip
    valid = rows.drop("messages", "has_time").join(whole.filter("right"), on="row", maintain_order="left")
    valid.drop("row", "right").write_ipc(request.output / f"{file.stem}.arrow")
    return valid["key"]


def normal(texts: pl.Series) -> pl.Series:
    """Control characters out, white space single; beyond ASCII by Python, which also repairs mojibake."""
    spaced = texts.str.replace_all(r"[\x00-\x1f\x7f]|\s\s+", " ").str.replace_all("  +", " ").str.strip_chars()
    foreign = texts.str.contains(r"[^\x00-\x7f]").fill_null(False)
    if not foreign.any():
        return spaced.alias("content")
    places = foreign.arg_true()
    fixed = [normalised(repaired(text) if mojibake(text) else text) for text in texts.gather(places)]
    return spaced.scatter(places, fixed).alias("content")


def masked(turns: pl.DataFrame) -> pl.Series:
    """Suspicious messages masked, each conversation with placeholders of its own."""
    texts = turns["content"]
    places = texts.str.contains(SUSPECT).fill_null(False).arg_true()
    rows, found = turns["row"].gather(places).to_list(), texts.gather(places).to_list()
    fixed: list[str] = []
    mask, last = Mask(DETECTOR), -1
    for row, text in zip(rows, found, strict=True):
        if row != last:
            mask, last = Mask(DETECTOR), row
        fixed.append(mask.text(text))
    return texts.scatter(places, fixed)


def write(part: tuple[Path, np.ndarray], request: Request) -> None:
    """The chosen conversations of a file, as rows or as blocks."""
    file, chosen = part
    rows = pl.read_ipc(request.output / f"{file.stem}.arrow").filter(pl.Series(chosen))
    target = request.result / f"{file.stem}.parquet"
    if request.task == "B":
        rows.write_parquet(target)
        return
    packer = Packer(request.tokenizer)
    writer = None
    for start in range(0, len(rows), BATCH_ROWS):
        table = packer.blocks(rows["messages"][start : start + BATCH_ROWS].to_list())
        writer = writer or pq.ParquetWriter(target, table.schema)
        writer.write_table(table)
    if writer is not None:
        writer.close()


@cache
def workers() -> Pool:
    """The processes: they stay for the next run."""
    return multiprocessing.get_context("spawn").Pool(PROCESSES)  # polars must not be forked


def work(request: Request) -> Counts:
    """Clean, decide, write."""
    keys = workers().map(partial(clean, request=request), request.files, chunksize=1)
    first = pl.concat(keys).is_first_distinct().to_numpy()
    parts = np.split(first, np.cumsum([len(part) for part in keys])[:-1])
    workers().map(partial(write, request=request), list(zip(request.files, parts, strict=True)), chunksize=1)
    kept = int(first.sum())
    return Counts(kept, len(first) - kept)


if __name__ == "__main__":
    main(work)
