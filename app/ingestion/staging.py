"""Blocks of examined records on their way to data files: written by the task that examined them, seen by no reader of
the tables.

    staging/<run>/<part>-<first position>-<rows>.arrow
    staging/<run>/begun/<the same>.<try>                  empty: a task has begun with it

The name says which records a block holds, so a task that is tried again replaces its own blocks. A run that is killed
leaves its folder to jobs.maintain.
"""

import logging
import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import pyarrow as pa
from pyarrow import fs, ipc

from app.conversation import SCHEMA
from app.errors import StorageError
from app.filesystems import Whole
from app.storage import STAGING, Storage

logger = logging.getLogger(__name__)

FOLDER = STAGING
BEGUN = "begun"
SUFFIX = ".arrow"

EXAMINED = pa.schema(
    [
        *SCHEMA,
        ("reason", pa.string()),  # the rule that refuses the record; none: it is accepted
        ("detail", pa.string()),
        ("raw", pa.string()),  # of a refused record: its beginning, personal data masked
        ("raw_bytes", pa.int64()),
        ("refusal_hash", pa.string()),
        ("id_hash", pa.string()),
        ("warnings", pa.list_(pa.string())),  # rules it breaks that only warn
        ("features", pa.list_(pa.float32())),  # what anomalies are judged by
    ]
)

KEYS = pa.schema(
    [
        ("part", pa.int32()),
        ("position", pa.int64()),
        ("start", pa.int64()),  # with part and rows: the block that holds it
        ("rows", pa.int64()),
        ("row", pa.int32()),  # place in the block
        ("content_hash", pa.binary(16)),  # the first half; none: refused
        ("conversation_id", pa.string()),
        ("intent", pa.string()),
        ("turns", pa.int32()),
        ("chars", pa.int32()),
    ]
)
"""What is compared between records; small, so that it can be held for all of them."""


class BlockName(NamedTuple):
    """Which records a block holds."""

    part: int
    start: int
    """Position of the first."""
    rows: int


@dataclass(frozen=True)
class Staging:
    """The blocks of one run; plain, so that it can be sent to tasks."""

    storage: Storage
    run: str

    def begin(self, name: BlockName) -> None:
        """Note that a task has begun to examine a block.

        Raises:
            StorageError: It cannot be noted.
        """
        self.storage.write(b"", FOLDER, self.run, BEGUN, f"{_stem(name)}.{uuid.uuid4().hex[:8]}")

    def seen(self) -> tuple[int, int]:
        """How many records have been examined, and how often a block was begun anew since its task was lost."""
        done = [name for name in self.storage.list(FOLDER, self.run) if name.endswith(SUFFIX)]
        begun = self.storage.list(FOLDER, self.run, BEGUN)
        again = len(begun) - len({name.partition(".")[0] for name in begun})
        return sum(int(name.removesuffix(SUFFIX).rsplit("-", 1)[1]) for name in done), again

    def write(self, name: BlockName, rows: pa.Table) -> None:
        """Write a block; another try replaces it.

        Raises:
            StorageError: It cannot be written.
        """
        path = self._path(name)
        filesystem = self.storage.filesystem
        try:
            filesystem.create_dir(os.path.dirname(path), recursive=True)
            options = ipc.IpcWriteOptions(compression="lz4")
            # Written aside and renamed where that is atomic: two tries of one task may overlap.
            aside = f"{path}.{os.getpid()}" if self.storage.is_local else path
            with (
                filesystem.open_output_stream(aside, compression=None) as stream,
                ipc.new_file(stream, rows.schema, options=options) as writer,
            ):
                writer.write_table(rows)
            if aside != path:
                os.replace(aside, path)
        except OSError as error:
            raise StorageError(
                f"cannot write {self.storage.uri(FOLDER, self.run)} ({error})", "free some space or check permissions"
            ) from error

    def read(self, name: BlockName, columns: Sequence[str] | None = None) -> pa.Table:
        """A block, or some columns of it.

        Raises:
            StorageError: It cannot be read.
        """
        path = self._path(name)
        try:
            with self.storage.filesystem.open_input_file(path) as stream:
                wanted = None if columns is None else [EXAMINED.get_field_index(column) for column in columns]
                content = stream if self.storage.is_local else pa.PythonFile(Whole(stream), mode="r")
                return ipc.open_file(content, options=ipc.IpcReadOptions(included_fields=wanted)).read_all()
        except (OSError, pa.ArrowException) as error:
            raise StorageError(f"cannot read {path} ({error})", "run the job again") from error

    def remove(self) -> None:
        """Delete all blocks of the run; what cannot be deleted now is left to jobs.maintain."""
        path = self.storage.path(FOLDER, self.run)
        try:
            if self.storage.filesystem.get_file_info(path).type != fs.FileType.NotFound:
                self.storage.filesystem.delete_dir(path)
        except OSError as error:
            logger.warning("staged blocks under %s are left to jobs.maintain (%s)", path, error)

    def _path(self, name: BlockName) -> str:
        return self.storage.path(FOLDER, self.run, f"{_stem(name)}{SUFFIX}")


def _stem(name: BlockName) -> str:
    return f"{name.part:06d}-{name.start:018d}-{name.rows}"


def hash_below(share: float) -> str:
    """The beginning of a hash, 8 digits, that about this share of all content hashes do not go beyond."""
    return f"{int(min(1.0, share) * 0xFFFFFFFF):08x}"
