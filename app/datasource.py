"""Ray Data's view of what is read and written: tasks planned by whoever knows the input, and files as blocks come."""

import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq
from pyarrow.fs import FileSystem
from ray.data import Datasink, Datasource, ReadTask
from ray.data.block import BlockAccessor, BlockMetadata
from ray.data.context import DataContext

LIMITS_INTERVAL_S = 0.05


def start_at_once() -> DataContext:
    """Let the datasets of this process use all CPUs from their first task on; returns the current context.

    Ray 2.60 asks what a dataset may use before the answer can be there, takes it for nothing, and asks again after a
    second: until then one task runs at a time. No option sets that second.
    """
    from ray.data._internal.execution.resource_manager import ResourceManager

    ResourceManager.GLOBAL_LIMITS_UPDATE_INTERVAL_S = LIMITS_INTERVAL_S  # type: ignore[assignment]
    return DataContext.get_current()


class Planned(Datasource):
    """Read tasks as they are given: what to call, and about how many bytes it gives."""

    def __init__(self, name: str, tasks: Sequence[tuple[Callable[[], Any], int]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._name, self._tasks = name, tasks

    def get_name(self) -> str:
        """What Ray calls the read tasks."""
        return self._name

    def estimate_inmemory_data_size(self) -> int:
        """Bytes as stored; what is compressed grows."""
        return sum(size for _, size in self._tasks)

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """As planned, whatever the parallelism."""
        return [
            ReadTask(call, BlockMetadata(num_rows=None, size_bytes=size, input_files=None, exec_stats=None))
            for call, size in self._tasks
        ]


@dataclass(frozen=True)
class WrittenFile:
    """A file that a task has finished."""

    name: str
    rows: int


class ParquetFiles(Datasink[WrittenFile | None]):
    """One Parquet file a task, written block by block: a task holds one block, where Ray's own holds all of its own.

    A task that is done again after its worker's death writes under another name, and what the first left does not
    count: `files` names those that were finished, in the order of the rows, once the write is over.
    """

    def __init__(self, folder: str, filesystem: FileSystem, **options: Any) -> None:
        self._folder, self._filesystem, self._options = folder, filesystem, options
        self.files: tuple[WrittenFile, ...] = ()

    def on_write_start(self, schema: Any = None) -> None:
        """Make the folder."""
        self._filesystem.create_dir(self._folder, recursive=True)

    def write(self, blocks: Iterable[Any], ctx: Any) -> WrittenFile | None:
        """Write a task's blocks; no file where there are none."""
        name = f"{ctx.task_idx:06d}-{uuid.uuid4().hex[:8]}.parquet"
        writer, rows = None, 0
        try:
            for block in blocks:
                table = BlockAccessor.for_block(block).to_arrow()
                if not table.num_rows:
                    continue
                if writer is None:
                    path = f"{self._folder}/{name}"
                    writer = pq.ParquetWriter(path, table.schema, filesystem=self._filesystem, **self._options)
                writer.write_table(table)
                rows += table.num_rows
        finally:
            if writer is not None:
                writer.close()
        return WrittenFile(name, rows) if rows else None

    def on_write_complete(self, write_result: Any) -> None:
        """Keep what the tasks have finished."""
        written = [file for file in write_result.write_returns if file is not None]
        self.files = tuple(sorted(written, key=lambda file: file.name))
