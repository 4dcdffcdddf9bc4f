"""The last step of a task: drop duplicates, stage what remains as data files, and count.

A task gets all rows of its share of the keys, those of the tables' history among them, so what it decides
needs nobody else. Files are named by run and task: one that is tried again replaces its own files.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
from ray.data import Datasink

from app.ingestion.duplicates import is_first, ordered
from app.ingestion.records import HISTORY
from app.tables import file_schema, stage_at

if TYPE_CHECKING:
    from pyiceberg.table import Table


@dataclass(frozen=True)
class Target:
    """Where and how a table's data files are written; plain, so that it can be sent to a task."""

    location: str
    properties: dict[str, str]
    schema: pa.Schema

    @classmethod
    def of(cls, table: "Table") -> "Target":
        """The target that a table is."""
        return cls(table.location(), dict(table.io.properties), file_schema(table))


@dataclass
class Extent:
    """What was read of one file."""

    records: int = 0
    first_position: int = 2**63 - 1
    last_position: int = -1

    def widen(self, other: "Extent") -> None:
        """Add another part of the same file."""
        self.records += other.records
        self.first_position = min(self.first_position, other.first_position)
        self.last_position = max(self.last_position, other.last_position)


@dataclass
class Staged:
    """What tasks have staged, and the counts of what they saw."""

    kept_files: list[str] = field(default_factory=list)
    refused_files: list[str] = field(default_factory=list)
    kept: int = 0
    duplicates: int = 0
    refused_by_reason: Counter[str] = field(default_factory=Counter)
    extents: dict[int, Extent] = field(default_factory=dict)
    """By index in the list of files."""

    @property
    def refused(self) -> int:
        """Records that broke a rule."""
        return self.refused_by_reason.total()

    @property
    def read(self) -> int:
        """Records in all."""
        return self.kept + self.duplicates + self.refused

    @classmethod
    def sum(cls, parts: Iterable["Staged"]) -> "Staged":
        """All parts as one."""
        whole = cls()
        for part in parts:
            whole.kept_files += part.kept_files
            whole.refused_files += part.refused_files
            whole.kept += part.kept
            whole.duplicates += part.duplicates
            whole.refused_by_reason += part.refused_by_reason
            for file, extent in part.extents.items():
                whole.extents.setdefault(file, Extent()).widen(extent)
        return whole


class StagingSink(Datasink[Staged]):
    """Stages accepted and refused rows under their tables; `staged` holds the result once the write is done."""

    def __init__(self, kept: Target, refused: Target, run: str) -> None:
        self._kept = kept
        self._refused = refused
        self._run = run
        self.staged = Staged()

    def get_name(self) -> str:
        """What Ray calls the tasks."""
        return "Stage"

    def write(self, blocks: Iterable[pa.Table], ctx: Any) -> Staged:
        """One task's share: called where the task runs."""
        rows = ordered(pa.concat_tables(blocks))
        new = is_first(rows)
        accepted = pc.is_valid(rows["content_hash"])
        refused = pc.is_valid(rows["reason"])
        kept = rows.filter(pc.and_(accepted, new))
        set_aside = rows.filter(pc.and_(refused, new))
        name = f"{self._run}-{ctx.task_idx:05d}"
        return Staged(
            kept_files=_stage(self._kept, kept, name),
            refused_files=_stage(self._refused, set_aside, name),
            kept=kept.num_rows,
            duplicates=pc.sum(accepted).as_py() - kept.num_rows if rows.num_rows else 0,
            refused_by_reason=Counter(rows.filter(refused)["reason"].to_pylist()),
            extents=extents(rows),
        )

    def on_write_complete(self, write_result: Any) -> None:
        """On the driver, with what all tasks returned."""
        self.staged = Staged.sum(part for part in write_result.write_returns if part is not None)


def extents(rows: pa.Table) -> dict[int, Extent]:
    """How many records of each file there are, and the first and last position."""
    read = rows.select(["file", "position"]).filter(pc.not_equal(rows["file"], HISTORY))
    grouped = read.group_by("file").aggregate([("position", "count"), ("position", "min"), ("position", "max")])
    columns: Sequence[str] = ("position_count", "position_min", "position_max")
    return {row["file"]: Extent(*(row[column] for column in columns)) for row in grouped.to_pylist()}


def _stage(target: Target, rows: pa.Table, name: str) -> list[str]:
    if rows.num_rows == 0:
        return []
    return [stage_at(target.location, target.properties, target.schema, rows, name)]
