"""Parquet files as tasks write them: whole, in the order of the rows, and each row once whatever dies on the way."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.data
from pyarrow.fs import LocalFileSystem

from app.datasource import ParquetFiles, Planned
from tests.conftest import RunningCluster

ROWS = 50


def part(number: int, flag: str | None) -> Iterator[pa.Table]:
    """Three blocks; part 2 dies before its third as long as nobody has died yet."""
    for start in range(0, 3 * ROWS, ROWS):
        if number == 2 and start == 2 * ROWS and flag is not None and not Path(flag).exists():
            Path(flag).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        yield pa.table({"row": range(number * 3 * ROWS + start, number * 3 * ROWS + start + ROWS)})


def write(folder: Path, flag: Path | None) -> ParquetFiles:
    tasks = [(lambda number=number: part(number, str(flag) if flag else None), 1_000) for number in range(4)]
    dataset = ray.data.read_datasource(Planned("parts", tasks))
    dataset.context.execution_options.preserve_order = True
    sink = ParquetFiles(str(folder), LocalFileSystem(), compression="lz4")
    dataset.write_datasink(sink)
    return sink


def read(folder: Path, sink: ParquetFiles) -> list[int]:
    tables = [pq.read_table(folder / file.name) for file in sink.files]
    assert [table.num_rows for table in tables] == [file.rows for file in sink.files]
    return [row for table in tables for row in table["row"].to_pylist()]


def test_rows_come_back_in_order(cluster: RunningCluster, tmp_path: Path) -> None:
    sink = write(tmp_path / "out", None)
    assert read(tmp_path / "out", sink) == list(range(4 * 3 * ROWS))


@pytest.mark.fault("F1", seen="the flag that the task writes right before its end")
def test_a_writer_that_is_killed_leaves_no_row_twice(cluster: RunningCluster, tmp_path: Path) -> None:
    sink = write(tmp_path / "out", tmp_path / "died")
    assert (tmp_path / "died").exists()
    assert read(tmp_path / "out", sink) == list(range(4 * 3 * ROWS))


def test_a_block_is_written_before_the_next_is_made(tmp_path: Path) -> None:
    held: list[int] = []

    def blocks() -> Iterator[pa.Table]:
        for start in range(3):
            file = next(tmp_path.glob("*.parquet"), None)
            held.append(file.stat().st_size if file else 0)
            yield pa.table({"row": range(start * 100_000, start * 100_000 + 100_000)})

    sink = ParquetFiles(str(tmp_path), LocalFileSystem(), use_dictionary=False)
    context: Any = SimpleNamespace(task_idx=7)
    written = sink.write(blocks(), context)
    assert written is not None
    assert written.rows == 300_000
    assert written.name.startswith("000007-")
    assert held[0] == 0
    assert 0 < held[1] < held[2]


def test_no_rows_make_no_file(tmp_path: Path) -> None:
    context: Any = SimpleNamespace(task_idx=0)
    assert (
        ParquetFiles(str(tmp_path), LocalFileSystem()).write([pa.table({"row": pa.array([], "int64")})], context)
        is None
    )
    assert not list(tmp_path.iterdir())
