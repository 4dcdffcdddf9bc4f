"""Where conversations can be found: in a table's rows, in files beside its versions, and elsewhere in the storage."""

import html
import json
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson
import pyarrow as pa
import pyarrow.compute as pc

from app.config import Config
from app.conversation import id_hash
from app.storage import Storage
from app.table_files import Manifests, batches
from app.table_schema import top_level

if TYPE_CHECKING:
    from pyiceberg.table import Table
    from pyiceberg.table.snapshots import Snapshot

LEAST_EXCERPT_CHARS = 200
"""A refused record's excerpt of so many characters is known by its text."""
LEAST_TEXT_CHARS = 30
"""Shorter messages are said by many customers, so they are not looked for elsewhere."""
ELSEWHERE = ("traffic", "reports", "handovers", "serving/conversations")
"""Folders of the storage root that may hold texts of conversations."""

Mask = Callable[[pa.RecordBatch], pa.Array]
"""Which rows of a batch are to go."""


@dataclass(frozen=True)
class Sought:
    """The conversations to forget."""

    ids: frozenset[str]
    texts: dict[str, list[str]]
    """Their messages as the quarantine table would hold them, by the first characters."""

    messages: frozenset[str]
    """Contents of their messages, those that are long enough to be nobody else's."""

    @classmethod
    def of(cls, ids: frozenset[str], table: "Table") -> "Sought":
        """What is to be looked for, texts as the table of conversations holds them in any version."""
        rows = _messages_of(table, ids)
        texts: dict[str, list[str]] = {}
        for messages in rows:
            text = orjson.dumps(messages).decode()
            texts.setdefault(text[:LEAST_EXCERPT_CHARS], []).append(text)
        contents = {message["content"] for messages in rows for message in messages}
        return cls(ids, texts, frozenset(text for text in contents if len(text) >= LEAST_TEXT_CHARS))

    def mask(self, table: "Table") -> tuple[list[str], Mask]:
        """The columns by which rows of a table are known, and what knows them."""
        known = top_level(table.schema())
        there: list[str] = [name for name in ("conversation_id", "id_hash", "raw") if name in known]
        return there, self._mask

    def _mask(self, batch: pa.RecordBatch) -> pa.Array:
        known = pa.array([False] * batch.num_rows)
        if "conversation_id" in batch.schema.names:
            known = pc.is_in(batch.column("conversation_id"), pa.array(sorted(self.ids), pa.string()))
        if "id_hash" in batch.schema.names:
            hashes = pa.array(sorted(map(id_hash, self.ids)), pa.string())
            known = pc.or_(known, pc.is_in(batch.column("id_hash"), hashes))
        if "raw" in batch.schema.names:
            known = pc.or_(known, self._told(batch.column("raw")))
        return known

    def _told(self, excerpts: pa.Array) -> pa.Array:
        """Which excerpts of refused records hold one of the ids, or the text of one of the conversations."""
        import polars as pl

        forms = _forms(self.ids)
        texts = excerpts.to_pylist()
        likely = pl.Series(texts, dtype=pl.String).str.contains_any(forms).fill_null(False).to_list()
        told = [
            text is not None and (self._is_text(text) or (maybe and mentions(text, forms)))
            for text, maybe in zip(texts, likely, strict=True)
        ]
        return pa.array(told, pa.bool_())

    def _is_text(self, excerpt: str) -> bool:
        return any(text.startswith(excerpt) for text in self.texts.get(excerpt[:LEAST_EXCERPT_CHARS], []))


def mentions(text: str, forms: Collection[str]) -> bool:
    """Whether a text holds one of some ids, not merely as a part of a longer one."""
    return any(form in text and re.search(rf"(?<![\w-]){re.escape(form)}(?![\w-])", text) for form in forms)


def _messages_of(table: "Table", ids: frozenset[str]) -> list[list[dict[str, Any]]]:
    wanted = pa.array(sorted(ids), pa.string())
    found = []
    for uri in files_of(table, table.snapshots(), Manifests(table)):
        for batch in batches(table, uri, ["conversation_id", "messages"]):
            chosen = batch.filter(pc.is_in(batch.column("conversation_id"), wanted))
            found += chosen.column("messages").to_pylist()
    return found


def files_of(table: "Table", snapshots: "Sequence[Snapshot]", manifests: Manifests) -> list[str]:
    """The data files of some versions."""
    return sorted({uri for snapshot in snapshots for uri in manifests.data_files(snapshot)})


def tells(table: "Table", uri: str, sought: Sought, there: set[str]) -> bool:
    """Whether a file that no version needs holds some of the conversations, or an id.

    Args:
        table: Whose location it is under.
        uri: Of the file.
        sought: The conversations.
        there: URIs of all files under the location.
    """
    if uri.endswith(".parquet"):
        columns, mask = sought.mask(table)
        return any(pc.any(mask(batch)).as_py() for batch in batches(table, uri, columns))
    return uri.endswith(".avro") and _is_stale_manifest(table, uri, sought, there)


def _is_stale_manifest(table: "Table", uri: str, sought: Sought, there: set[str]) -> bool:
    """Whether a manifest holds an id as a bound of a column, and files that are gone, so it cannot be committed."""
    import fastavro

    with table.io.new_input(uri).open() as opened:
        stream: Any = opened
        records: list[Any] = list(fastavro.reader(stream))
    entries = [record for record in records if "data_file" in record]
    bounds = {
        bound["value"]
        for entry in entries
        for side in ("lower_bounds", "upper_bounds")
        for bound in entry["data_file"][side] or []
    }
    # Bounds of texts are cut after 16 characters, the upper one rounded up, so the id itself is all that can be known.
    known = not bounds.isdisjoint(form.encode() for identity in sought.ids for form in (identity, identity[:16]))
    return known and all(entry["status"] == 2 or entry["data_file"]["file_path"] not in there for entry in entries)


def elsewhere(config: Config, sought: Sought) -> dict[str, int]:
    """Files outside the tables, of logs and reports, that hold an id or a text: how many lines each.

    Names are below the storage root; URIs where serving logs to another place. Memory: the largest file.

    Raises:
        StorageError: A place cannot be listed, or a file not be read.
    """
    import polars as pl

    ids = _forms(sought.ids)
    texts = [*_forms(sought.messages), *(html.escape(text) for text in sought.messages)]
    found = {}
    own = Storage(config.storage.uri).root_uri
    for storage, folder in _logs_and_reports(config):
        for info in storage.files(folder):
            name = info.path.removeprefix(storage.root_path).lstrip("/")
            lines = pl.Series(storage.read(name).decode(errors="replace").split("\n"), dtype=pl.String)
            likely = lines.filter(lines.str.contains_any([*ids, *texts])).to_list()
            count = sum(any(text in line for text in texts) or mentions(line, ids) for line in likely)
            if count:
                found[name if storage.root_uri == own else storage.uri(name)] = count
    return found


def _logs_and_reports(config: Config) -> Iterator[tuple[Storage, str]]:
    roots = dict.fromkeys((config.storage.uri, config.serving.storage_uri or config.storage.uri))
    yield from ((Storage(root), folder) for root in roots for folder in ELSEWHERE)


def _forms(texts: Collection[str]) -> list[str]:
    """Texts as they stand in files: as they are, and as JSON writes them."""
    return sorted({form for text in texts for form in (text, json.dumps(text)[1:-1])})
