"""A store with conversations that are in many places, and what shows whether anything is left of them on the disk."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import fastavro
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from app import tables
from app.config import Config
from app.ingestion.quarantine import QUARANTINE
from app.settings.tables import MaintenanceConfig
from app.table_maintenance import compact
from app.table_versions import tag
from app.versions import ModelVersion, TableVersion
from tests.table_rows import add, row, stage, table_of, text, trained_on

GONE = ("conversation-103", "conversation-110", "conversation-125", "conversation-131")
"""In the first file, which versions with a tag and a model have; the least id of the second, so that manifests name it;
in one that nothing holds; in the newest."""
STAY = sorted({f"conversation-{number}" for number in range(100, 140)} - set(GONE))
NUMBERS = [int(identity.rpartition("-")[2]) for identity in GONE]
SETTINGS = MaintenanceConfig(orphan_hours=1e-9)


@dataclass(frozen=True)
class Forgettable:
    """Versions of the table, and who holds them."""

    config: Config
    raw: TableVersion
    """Tagged `raw`: 100 to 109."""
    learned: TableVersion
    """A model was trained on it: 100 to 119."""
    model: ModelVersion
    other_model: ModelVersion
    """Trained on a version of another table."""
    free: TableVersion
    """Nothing holds it: 100 to 129."""
    current: TableVersion
    """100 to 139, in files that were put together."""


def make(store: str) -> Forgettable:
    """Four appends and a compaction; some of the conversations were refused once as well."""
    config = Config().with_overrides({"storage.uri": store})
    raw = add(config, range(100, 110), marks="m-0.json")
    learned = add(config, range(110, 120), marks="m-1.json")
    free = add(config, range(120, 130), marks="m-2.json")
    add(config, range(130, 140), marks="m-3.json")
    compact(config, table_of(config), MaintenanceConfig(min_small_files=2))
    tag(config, raw, "raw")
    model = trained_on(config, learned)
    other = trained_on(config, TableVersion("support.others", learned.snapshot_id))
    quarantine = tables.open_table(config.storage, config.ingestion.quarantine_table, QUARANTINE)
    refused = [
        _refused(1, orjson.dumps({"id": "conversation-103", "messages": "none"}).decode()),
        _refused(2, orjson.dumps(row(125)["messages"]).decode()),
        _refused(3, orjson.dumps({"id": "conversation-1030", "messages": "another one"}).decode()),
        _refused(4, orjson.dumps(row(104)["messages"]).decode()),
        _refused(5, None),
    ]
    content = pa.Table.from_pylist(refused, schema=QUARANTINE)
    tables.append(quarantine, [stage(quarantine, content, "refused")], {})
    return Forgettable(config, raw, learned, model, other, free, tables.latest(config))


def _refused(position: int, raw: str | None) -> dict[str, object]:
    return {
        "source": "file:///in.jsonl", "position": position, "reason": "copy", "detail": "", "raw": raw,
        "raw_bytes": len(raw or ""), "refusal_hash": f"{position:064x}",
    }  # fmt: skip


def traces(store: str, needles: Iterable[str] = ()) -> dict[str, list[str]]:
    """Which files below a folder hold which of the texts, whatever they are packed in."""
    wanted = list(needles) or [*GONE, *(text(number) for number in NUMBERS)]
    found = {}
    for file in sorted(path for path in Path(store).rglob("*") if path.is_file()):
        content = "\n".join(_unpacked(file))
        seen = [needle for needle in wanted if re.search(rf"{re.escape(needle)}(?![0-9])", content)]
        if seen:
            found[str(file.relative_to(store))] = seen
    return found


def _unpacked(file: Path) -> Iterator[str]:
    yield file.read_bytes().decode("utf-8", "replace")
    if file.suffix == ".parquet":
        yield orjson.dumps(pq.read_table(file).to_pylist(), default=str).decode()
    if file.suffix == ".avro":
        with file.open("rb") as stream:
            yield repr(list(fastavro.reader(stream)))
