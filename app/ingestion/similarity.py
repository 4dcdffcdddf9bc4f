"""Near-duplicates across the whole table: signatures of what is new and of what is held, compared band by band.

The signatures lie once in each node's memory, 128 bytes a conversation, and every band is a task of its own that
looks at all of them: no text is read again, and nothing is exchanged but the pairs that are found.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from app import cluster
from app.conversation import SIGNATURE_BYTES
from app.ingestion import near_duplicates as kernels
from app.ingestion.decision import VERDICTS
from app.ingestion.signatures import matrix
from app.ingestion.staging import BlockName, Staging

TASKS = 12
"""Bands are shared among so many tasks at most."""


def near_duplicates(keys: list[Any], held: list[Any], gone: pa.Table, staging: Staging, threshold: float) -> pa.Table:
    """`VERDICTS` on the new conversations that are nearly another one which stays: one that is held, or a better one.

    Better is the conversation with more turns, then the longer one, then the one that came first.

    Args:
        keys: References to tables of `KEYS`.
        held: References to tables of `HELD` with `minhash`.
        gone: `VERDICTS` on those that do not stay, which take no part.
        staging: Where the new signatures are.
        threshold: Least similarity of near-duplicates.
    """
    import ray

    gathering: Any = ray.remote(num_cpus=1, num_returns=3, max_retries=2)(_gathered)
    new, signed, count = gathering.remote(keys, held, gone, staging)
    shares = [range(kernels.BANDS)[at::TASKS] for at in range(TASKS)]
    edges = [cluster.submit(_edges, share, signed, count, threshold) for share in shares]
    [found] = cluster.collect([cluster.submit(_verdicts, new, count, edges)])
    return found


def _gathered(
    keys: list[Any], held: list[Any], gone: pa.Table, staging: Staging
) -> tuple[pa.Table, np.ndarray, int]:  # fmt: skip
    """The keys of the new conversations that take part; all signatures, held ones first; how many are held."""
    import polars as pl
    import ray

    before = [matrix(table["minhash"].drop_null()) for table in ray.get(held)]
    left_out = pl.DataFrame(gone).select("part", "start", "row")
    frame = pl.DataFrame(pa.concat_tables(ray.get(keys)))
    frame = frame.filter(pl.col("content_hash").is_not_null()).join(left_out, on=left_out.columns, how="anti")
    new = frame.sort("part", "start", "row")
    after = [_signed(staging, BlockName(*name), part) for name, part in _by_block(new)]
    signed = np.concatenate([*before, *after]) if before or after else np.empty((0, SIGNATURE_BYTES), np.uint8)
    return new.to_arrow(), signed, sum(map(len, before))


def _by_block(new: Any) -> Any:
    return new.partition_by("part", "start", "rows", maintain_order=True, as_dict=True).items()


def _signed(staging: Staging, block: BlockName, rows: Any) -> np.ndarray:
    column = staging.read(block, ["minhash"])["minhash"].take(rows["row"].to_arrow())
    return matrix(column)


def _edges(bands: Sequence[int], signed: np.ndarray, held: int, threshold: float) -> np.ndarray:
    """The similar rows that some bands bring together, (pairs, 2)."""
    found = [
        kernels.pairs(kernels.band_keys(signed, threshold, band), signed, threshold, held) for band in bands
    ]  # fmt: skip
    return np.unique(np.concatenate(found), axis=0)


def _verdicts(new: pa.Table, held: int, edges: list[Any]) -> pa.Table:
    import polars as pl
    import ray

    joined = np.concatenate(ray.get(edges))
    order = pl.DataFrame(new).with_row_index("at").sort(
        ["turns", "chars", "part", "position"], descending=[True, True, False, False]
    )["at"]  # fmt: skip
    rank = np.arange(held + new.num_rows)
    rank[held + order.to_numpy()] = held + np.arange(new.num_rows)
    lost = kernels.losing(joined, rank) - held
    rows = new.take(pa.array(lost[lost >= 0])).select(["part", "start", "rows", "row"])
    return rows.append_column("verdict", pa.array(["near_duplicate"] * rows.num_rows, pa.string())).cast(VERDICTS)
