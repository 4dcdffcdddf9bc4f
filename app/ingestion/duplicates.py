"""Exact duplicates: of all rows with one key, only the first counts."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def ordered(rows: pa.Table) -> pa.Table:
    """The rows by key, then file, then position: an order that does not depend on how the work was shared out."""
    return rows.sort_by([("key", "ascending"), ("file", "ascending"), ("position", "ascending")])


def is_first(rows: pa.Table) -> pa.Array:
    """For each of the ordered rows, whether its key has not occurred before.

    Rows that stand for a table's history have the lowest file number, so what a table holds is never first.
    """
    if rows.num_rows == 0:
        return pa.array([], pa.bool_())
    keys = rows["key"].combine_chunks()
    changed = pc.not_equal(keys[1:], keys[:-1]).to_numpy(zero_copy_only=False)
    return pa.array(np.concatenate([[True], changed]))
