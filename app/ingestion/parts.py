"""What sources consist of: parts that are read by tasks, in pieces of raw records.

A record is read as it stands, as bytes with its place, so that one that turns out to be bad can be set aside with
the place it came from. A part that cannot be read to its end stops the stage.
"""

from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from app.ingestion.formats import Piece
from app.settings.ingestion import IngestionConfig

Read = Callable[[], Iterator[Piece]]
Marks = Mapping[str, Any]
"""How far each part has been read: part -> a JSON value that is another one when there is something new."""

BLOCK_BYTES = 16 << 20
"""Size of the blocks of records that a task works on."""

RAW = pa.schema(
    [
        ("part", pa.int32()),  # index in the list of parts
        ("position", pa.int64()),  # of the record in the part
        ("raw", pa.binary()),  # the record: a JSON line, or a row as one
        ("problem", pa.string()),  # why the reader could not make a record of it
        ("identified", pa.bool_()),  # whether records of this part carry their own id
        ("arrived", pa.timestamp("ms", tz="UTC")),  # when it was written, where that is known of each record
    ]
)
RAW_TIME = RAW.field("arrived").type


class Part(Protocol):
    """A file, a Kafka partition from one offset to another, the rows of a query: what one URI of provenance names."""

    @property
    def uri(self) -> str:
        """What provenance calls it: no credentials."""

    @property
    def source(self) -> int:
        """Index in `ingestion.sources`."""

    @property
    def size_bytes(self) -> int:
        """About how much there is to read, unpacked."""

    @property
    def arrived_at(self) -> datetime | None:
        """When it was written, if that is known: the time of conversations that have none."""

    @property
    def mark(self) -> tuple[str, Any] | None:
        """What is committed with its records, so that they are not read again; none: it is always read."""

    def reads(self, ingestion: IngestionConfig) -> Iterator[tuple[Read, int]]:
        """What to call to read it, in as many tasks as it can be shared among, and about how many bytes each gives."""


STREAMS = ("kafka:", "sql:")
"""Sources whose marks say what comes next; they hold whatever the settings are."""


def is_stream(part: Part) -> bool:
    """Whether a part's mark says what comes next."""
    return part.mark is not None and part.mark[0].startswith(STREAMS)


def block(index: int, piece: Piece) -> pa.Table:
    """A piece of the part at `index` as rows of `RAW`."""
    count = len(piece.raw)
    columns = [
        pa.array(np.full(count, index, np.int32)),
        pa.array(np.asarray(piece.positions, np.int64)),
        piece.raw if isinstance(piece.raw, pa.Array) else pa.array(piece.raw, pa.binary()),
        pa.nulls(count, pa.string()) if piece.problems is None else pa.array(piece.problems, pa.string()),
        pa.array(np.full(count, piece.identified)),
        pa.nulls(count, RAW_TIME) if piece.arrived_ms is None else pa.array(piece.arrived_ms, RAW_TIME),
    ]
    return pa.table(columns, schema=RAW)


def blocks(index: int, read: Read) -> Iterator[pa.Table]:
    """What a read task gives: pieces put together until they are worth a task's attention."""
    waiting: list[pa.Table] = []
    for piece in read():
        waiting.append(block(index, piece))
        if sum(table.nbytes for table in waiting) >= BLOCK_BYTES:
            yield pa.concat_tables(waiting).combine_chunks()
            waiting = []
    if waiting:
        yield pa.concat_tables(waiting).combine_chunks()
