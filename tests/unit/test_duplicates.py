from collections.abc import Callable
from typing import Any

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from app.ingestion.duplicates import is_first, ordered
from app.ingestion.pipeline import LEAST_SHARE_BYTES, SHARE_BYTES, shares
from app.ingestion.records import HISTORY
from app.ingestion.sink import Extent, Staged, extents

SCHEMA = pa.schema([("key", pa.string()), ("file", pa.int32()), ("position", pa.int64())])
entries = st.lists(
    st.tuples(st.sampled_from("abcd"), st.integers(HISTORY, 3), st.integers(0, 5)), max_size=40, unique=True
)


def table(rows: list[tuple[str, int, int]]) -> pa.Table:
    return pa.Table.from_pylist([dict(zip(SCHEMA.names, row, strict=True)) for row in rows], schema=SCHEMA)


@given(entries, st.randoms())
def test_the_first_of_each_key_counts_whatever_the_order_of_arrival(
    rows: list[tuple[str, int, int]], random: Any
) -> None:
    wanted = {min(row for row in rows if row[0] == key) for key, _, _ in rows}
    random.shuffle(rows)
    found = ordered(table(rows))
    chosen = found.filter(is_first(found)).to_pylist()
    assert {(row["key"], row["file"], row["position"]) for row in chosen} == wanted
    assert len(chosen) == len(wanted)


def test_what_a_table_holds_is_never_first() -> None:
    found = ordered(table([("a", 0, 0), ("a", HISTORY, 0), ("b", 1, 7)]))
    new = found.filter(is_first(found)).to_pylist()
    assert [(row["key"], row["file"]) for row in new] == [("a", HISTORY), ("b", 1)]


def test_no_rows_have_no_first() -> None:
    assert len(is_first(table([]))) == 0


@given(entries)
def test_extents_cover_what_was_read_and_not_the_history(rows: list[tuple[str, int, int]]) -> None:
    read = [(file, position) for _, file, position in rows if file != HISTORY]
    for file, extent in extents(table(rows)).items():
        positions = [position for other, position in read if other == file]
        assert extent == Extent(len(positions), min(positions), max(positions))
    assert set(extents(table(rows))) == {file for file, _ in read}


def test_parts_add_up_to_the_whole() -> None:
    first = Staged(["a"], [], 2, 1, extents={0: Extent(3, 0, 4)})
    second = Staged(["b"], ["c"], 1, 0, extents={0: Extent(2, 1, 9), 1: Extent(1, 0, 0)})
    second.refused_by_reason["invalid_json"] = 2
    whole = Staged.sum([first, second])
    assert (whole.kept_files, whole.refused_files) == (["a", "b"], ["c"])
    assert (whole.kept, whole.duplicates, whole.refused, whole.read) == (3, 1, 2, 6)
    assert whole.extents == {0: Extent(5, 0, 9), 1: Extent(1, 0, 0)}
    assert first.extents == {0: Extent(3, 0, 4)}


@given(st.integers(0, 10**13), st.integers(1, 512))
def test_a_share_fits_into_memory_and_is_worth_a_task(size: int, cpus: int) -> None:
    count = shares(size, cpus)
    assert count * SHARE_BYTES >= size
    assert count == 1 or size / count > LEAST_SHARE_BYTES / 2


def test_more_cpus_never_mean_fewer_shares() -> None:
    counts: Callable[[int], list[int]] = lambda size: [shares(size, cpus) for cpus in (1, 2, 8, 64)]  # noqa: E731
    assert counts(100 << 20) == [1, 2, 8, 13]
    assert counts(100 << 30) == [800, 800, 800, 800]
