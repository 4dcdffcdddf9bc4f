"""Ray Data's view of the sources: a read task for each file, or for each part of the sample."""

from collections.abc import Callable, Sequence
from typing import Any

from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata


class RawRecords(Datasource):
    """Read tasks that were planned by `app.ingestion.sources`."""

    def __init__(self, tasks: Sequence[tuple[Callable[[], Any], int]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tasks = tasks

    def get_name(self) -> str:
        """What Ray calls the read tasks."""
        return "RawRecords"

    def estimate_inmemory_data_size(self) -> int:
        """Bytes as stored; what is compressed grows."""
        return sum(size for _, size in self._tasks)

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """One task a part: a part cannot be split, since positions are counted from its beginning."""
        return [
            ReadTask(call, BlockMetadata(num_rows=None, size_bytes=size, input_files=None, exec_stats=None))
            for call, size in self._tasks
        ]
