"""Databases as a source: all rows of a query, or those above the last value of a column that only grows."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any

from app.errors import SourceError
from app.ingestion import sql
from app.ingestion.parts import Marks, Read
from app.settings.ingestion import IngestionConfig, SourceConfig


@dataclass(frozen=True)
class QueryPart:
    """The rows of a query, or some of them."""

    uri: str
    source: int
    key: str
    after: Any
    until: Any
    """The highest value of the cursor column; none where there is no such column."""

    @property
    def size_bytes(self) -> int:
        """Not known."""
        return 0

    @property
    def arrived_at(self) -> None:
        """Not known."""

    @property
    def mark(self) -> tuple[str, Any] | None:
        """The last value that was read; a query without such a column is read again each time."""
        return None if self.until is None else (self.key, self.until)

    def reads(self, ingestion: IngestionConfig) -> Iterator[tuple[Read, int]]:
        """One task: only the database could share a query out."""
        source = ingestion.sources[self.source]
        assert source.query is not None
        bounds = {"cursor_column": source.cursor_column, "after": self.after, "until": self.until}
        column = source.columns.conversation_id
        yield (
            partial(
                sql.read, source.uri, source.query, ingestion.batch_rows, column, **bounds, timeout_s=source.timeout_s
            ),
            0,
        )


def parts(source: SourceConfig, index: int, marks: Marks) -> list[QueryPart]:
    """The rows that are new.

    Raises:
        SourceError: The query fails.
        SourceUnavailable: The database does not answer.
    """
    assert source.query is not None
    name = source.identity
    key = f"sql:{name}"
    if source.cursor_column is None:
        return [QueryPart(name, index, key, None, None)]
    until = sql.latest(source.uri, source.query, source.cursor_column, source.timeout_s)
    after = marks.get(key)
    if after is not None and until is not None and _went_back(after, until):
        raise SourceError(
            f"the highest {source.cursor_column} of {name} is {until}, but {after} was read already: the table was "
            f"made anew or has lost rows",
            "give the source another ingestion.sources name to read it from the beginning",
        )
    return [] if until is None or until == after else [QueryPart(f"{name}@{until}", index, key, after, until)]


def _went_back(after: Any, until: Any) -> bool:
    """Whether a cursor is lower than it was; of texts only times tell, others are in the database's own order."""
    if isinstance(after, int | float) and isinstance(until, int | float):
        return until < after
    try:
        return datetime.fromisoformat(str(until)) < datetime.fromisoformat(str(after))
    except (TypeError, ValueError):
        return False
