"""What lies between two versions of a table: rows added, removed and changed, and how the whole of it has shifted.

    found = diff(config, old, new)
    found.added, found.removed, found.changed

Only the data files that one version has and the other has not are compared, by conversation id and content hash.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from app.config import Config
from app.drift import total_variation
from app.errors import TableError
from app.report import Bars, Block, Card, Cards, Section, Table, render
from app.storage import Storage
from app.table_files import Manifests, batches
from app.table_schema import top_level
from app.tables import open_table, resolve
from app.versions import TableVersion, as_json

if TYPE_CHECKING:
    import polars as pl
    from pyiceberg.table import Table as IcebergTable

KEYS = ("conversation_id", "content_hash")
CATEGORIES = ("intent", "channel", "language")
DISTRIBUTIONS = (*CATEGORIES, "turns", "message_chars")
MISSING = "(none)"
MOST_TURNS = 20
SHOWN = 20
"""Categories that a report draws."""


@dataclass
class Distributions:
    """What a version's rows are made of: for each of `DISTRIBUTIONS`, how many there are of each value."""

    rows: int = 0
    counts: dict[str, Counter[str]] = field(default_factory=lambda: {name: Counter() for name in DISTRIBUTIONS})
    """turns: messages of a conversation; message_chars: messages by length, in powers of two."""

    def add(self, batch: pa.RecordBatch) -> None:
        """Count rows."""
        self.rows += batch.num_rows
        for name in CATEGORIES:
            self.counts[name].update(_counted(pc.fill_null(batch.column(name), MISSING)))
        messages = batch.column("messages")
        turns = pc.min_element_wise(pc.fill_null(pc.list_value_length(messages), 0), MOST_TURNS)
        self.counts["turns"].update(_counted(turns))
        lengths = pc.fill_null(pc.utf8_length(messages.flatten().field("content")), 0)
        bins = np.log2(np.maximum(1, lengths.to_numpy(zero_copy_only=False))).astype(np.int64)
        self.counts["message_chars"].update(_counted(pa.array(2**bins)))

    def merge(self, other: "Distributions") -> None:
        """Count what another one counted."""
        self.rows += other.rows
        for name, counter in other.counts.items():
            self.counts[name].update(counter)

    def as_json(self) -> dict[str, dict[str, int]]:
        """Plain values; categories with the most frequent first, numbers in their order."""
        ordered = {name: dict(self.counts[name].most_common()) for name in CATEGORIES}
        numbers = {name: dict(sorted(self.counts[name].items(), key=_number)) for name in ("turns", "message_chars")}
        return ordered | numbers


@dataclass(frozen=True)
class Diff:
    """Two versions, compared."""

    old: TableVersion
    new: TableVersion
    old_rows: int
    new_rows: int
    added: int
    """Conversations whose id the old version has not; and more rows of an id than it has."""
    removed: int
    changed: int
    """Conversations with the same id and another content."""
    files_compared: int
    before: Distributions
    after: Distributions

    @property
    def shifts(self) -> dict[str, float]:
        """For each distribution, the share of it that would have to move to make the old one the new one."""
        pairs = {name: (self.before.counts[name], self.after.counts[name]) for name in DISTRIBUTIONS}
        return {name: _shift(old, new) for name, (old, new) in pairs.items()}

    def as_json(self) -> dict[str, Any]:
        """Plain values, for a job's last line and report.json."""
        distributions = {"old": self.before.as_json(), "new": self.after.as_json()}
        names = ("old_rows", "new_rows", "added", "removed", "changed", "files_compared", "shifts")
        figures = {name: getattr(self, name) for name in names}
        return {"old": as_json(self.old), "new": as_json(self.new), **figures, "distributions": distributions}


def diff(config: Config, old: TableVersion, new: TableVersion) -> Diff:
    """Compare two versions of one table.

    Memory: ids and hashes of the files that differ. Rows without an id are compared by their content alone.

    Raises:
        TableError: They are of different tables, one does not exist, or the table has no ids and hashes.
    """
    if old.table != new.table:
        raise TableError(f"{old} and {new} are of different tables", "compare two versions of one")
    old, new = (resolve(config, version.snapshot_id, version.table) for version in (old, new))
    table = open_table(config.storage, old.table)
    columns = top_level(table.schema())
    if not set(KEYS) <= set(columns):
        raise TableError(f"table {old.table} has no columns {' and '.join(KEYS)}", "compare versions of conversations")
    manifests = Manifests(table)
    before, after = (set(manifests.data_files(_snapshot(table, version))) for version in (old, new))
    added, removed, changed = compared(_keys(table, before - after), _keys(table, after - before))
    old_side, new_side = _distributions(table, before, after)
    return Diff(
        old, new, old_side.rows, new_side.rows, added, removed, changed, len(before ^ after), old_side, new_side
    )  # fmt: skip


def compared(old: "pl.DataFrame", new: "pl.DataFrame") -> tuple[int, int, int]:
    """How many rows were added, removed and changed, by two tables of `KEYS`; rows in both do not count.

    Of an id that has rows of its own in both, as many are changed as the side with fewer of them has.
    """
    import polars as pl

    sides = [old.with_columns(number=-1), new.with_columns(number=1)]
    left = pl.concat(sides).group_by(KEYS).agg(pl.col("number").sum()).filter(pl.col("number") != 0)
    identity = pl.coalesce("conversation_id", "content_hash")
    by_id = left.group_by(identity.alias("id")).agg(
        gone=-pl.col("number").clip(upper_bound=0).sum(), come=pl.col("number").clip(lower_bound=0).sum()
    )
    changed = int(by_id.select(pl.min_horizontal("gone", "come").sum()).item())
    return int(by_id["come"].sum()) - changed, int(by_id["gone"].sum()) - changed, changed


def write_report(config: Config, found: Diff) -> str:
    """Write a comparison as a page and as JSON; returns the page's URI.

    Raises:
        StorageError: It cannot be written.
    """
    storage = Storage(config.storage.uri)
    place = ("reports", "versions", f"{found.old.snapshot_id}-{found.new.snapshot_id}")
    storage.write(json.dumps(found.as_json()).encode(), *place, "report.json")
    return storage.write(page(found).encode(), *place, "report.html")


def page(found: Diff) -> str:
    """The comparison as one HTML page."""
    names = {"rows before": found.old_rows, "rows after": found.new_rows, "added": found.added}
    names |= {"removed": found.removed, "changed": found.changed}
    sections = [Section("Rows", [Cards([Card(name, value) for name, value in names.items()])])]
    for name, shift in found.shifts.items():
        blocks = _drawn(name, found.before.as_json()[name], found.after.as_json()[name])
        sections.append(Section(name.replace("_", " "), blocks, note=f"{shift:.1%} of it has moved"))
    return render(f"Versions of {found.old.table}", sections, f"{found.old.snapshot_id} to {found.new.snapshot_id}")


def _drawn(name: str, old: Mapping[str, int], new: Mapping[str, int]) -> list[Block]:
    shares = [{key: count / max(1, sum(side.values())) for key, count in side.items()} for side in (old, new)]
    sides = ("old", "new")
    keys = list(dict.fromkeys([*new, *old]))
    keys = keys[:SHOWN] if name in CATEGORIES else sorted(keys, key=int)
    drawn = {side: {key: values.get(key, 0.0) for key in keys} for side, values in zip(sides, shares, strict=True)}
    rows = [(key, old.get(key, 0), new.get(key, 0)) for key in keys]
    return [Bars(drawn, f"{name.replace('_', ' ')}, shares"), Table([name, "old", "new"], rows)]


def _snapshot(table: "IcebergTable", version: TableVersion) -> Any:
    snapshot = table.snapshot_by_id(version.snapshot_id)
    assert snapshot is not None, version
    return snapshot


def _keys(table: "IcebergTable", files: Iterable[str]) -> "pl.DataFrame":
    import polars as pl

    parts = [batch for uri in sorted(files) for batch in batches(table, uri, KEYS)]
    schema = dict.fromkeys(KEYS, pl.String)
    return pl.DataFrame(pl.from_arrow(pa.Table.from_batches(parts)) if parts else None, schema=schema)


def _distributions(
    table: "IcebergTable", before: set[str], after: set[str]
) -> tuple[Distributions, Distributions]:  # fmt: skip
    """Of both versions, each data file read once."""
    sides = Distributions(), Distributions()
    for uri in sorted(before | after):
        one = Distributions()
        for batch in batches(table, uri, [*CATEGORIES, "messages"]):
            one.add(batch)
        for files, side in zip((before, after), sides, strict=True):
            if uri in files:
                side.merge(one)
    return sides


def _counted(column: pa.Array) -> dict[str, int]:
    return {str(entry["values"]): entry["counts"] for entry in pc.value_counts(column).to_pylist()}


def _number(item: tuple[str, int]) -> int:
    return int(item[0])


def _shift(old: Counter[str], new: Counter[str]) -> float:
    keys = sorted(old.keys() | new.keys())
    return total_variation(np.array([old[key] for key in keys]), np.array([new[key] for key in keys])) if keys else 0.0
