"""What killed ingests leave behind, and what must not be taken for it."""

import json
import os
import time
from pathlib import Path

import pyarrow as pa

from app import tables
from app.config import Config
from app.ingestion import marks
from app.ingestion.staging import BlockName, Staging
from app.leftovers import leftovers
from app.storage import Storage


def aged(folder: Path, hours: float) -> None:
    for file in folder.rglob("*"):
        os.utime(file, (time.time() - hours * 3_600,) * 2)


def test_old_staged_runs_and_marks_that_no_version_names_go(store: str) -> None:
    config = Config().with_overrides({"storage.uri": store})
    storage = Storage(store)
    for run in ("old", "new"):
        Staging(storage, run).begin(BlockName(0, 0, 5))
    named, forgotten = (marks.record(config, {"kafka:chats/0": offset}) for offset in (1, 2))
    table = tables.open_table(config.storage, config.ingestion.table, pa.schema([("conversation_id", pa.string())]))
    tables.append(table, [], named)
    aged(Path(store) / "staging" / "old", 48)
    aged(Path(store) / "ingested", 48)
    marks.record(config, {"kafka:chats/0": 3})
    planned = leftovers(config, config.maintenance, dry_run=True)
    assert len(planned.removed) == 2
    assert storage.list("staging") == ["new", "old"]
    assert leftovers(config, config.maintenance).removed == planned.removed
    assert storage.list("staging") == ["new"]
    left = storage.list("ingested")
    assert named[marks.DOCUMENT] in left
    assert forgotten[marks.DOCUMENT] not in left
    assert len(left) == 2  # the young one may be committed yet
    assert leftovers(config, config.maintenance).removed == []


def test_old_reports_and_tokens_of_versions_that_are_gone_go(store: str) -> None:
    config = Config().with_overrides({"storage.uri": store})
    storage = Storage(store)
    table = tables.open_table(config.storage, config.ingestion.table, pa.schema([("conversation_id", pa.string())]))
    kept = tables.append(table, [], {})
    for name in (str(kept), "17", "refused-abc"):
        storage.write(b"<html>", "reports", "ingest", name, "report.html")
    for name, snapshot_id in (("there", kept), ("gone", 17)):
        manifest = json.dumps({"table": {"table": config.ingestion.table, "snapshot_id": snapshot_id}})
        storage.write(manifest.encode(), "packed", name, "packed.json")
    storage.write(b"", "packed", "killed", "0a1b", "blocks", "000000.parquet")
    assert leftovers(config, config.maintenance).removed == [], "they are young"
    for folder in ("reports", "packed"):
        aged(Path(store) / folder, 48)
    assert len(leftovers(config, config.maintenance).removed) == 3
    assert storage.list("reports", "ingest") == sorted([str(kept), "refused-abc"])
    assert storage.list("packed") == ["there"]
