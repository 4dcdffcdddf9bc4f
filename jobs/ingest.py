"""Sources to a table version: read, check, de-duplicate, split, and append in one commit.

python -m jobs.ingest --config jobs/configs/demo.yaml [--set K=V] [--dry-run] [--follow]
"""

import logging
import sys
from typing import Any

from app import tables
from app.config import Config
from app.errors import SourceUnavailable, TableNotFound
from app.job import Job, Outcome
from app.versions import TableVersion, as_json

logger = logging.getLogger(__name__)


def run(config: Config, inputs: dict[str, Any]) -> Outcome:
    """Ingest everything that is not in the table yet; with `follow`, go on until SIGTERM."""
    if config.ingestion.follow.enabled:
        from app.ingestion.follow import follow

        followed = follow(config)
        return Outcome(followed.outputs, followed.figures)
    from app.ingestion.pipeline import ingest

    ingested = ingest(config)
    status = "done" if ingested.added else "up_to_date"
    return Outcome({"table": as_json(ingested.version)}, ingested.figures, status)


def inputs(config: Config) -> dict[str, Any]:
    """The state of every source; what is followed may be away for a while."""
    from app.ingestion.sources import state

    try:
        return {"sources": state(config)}
    except SourceUnavailable as error:
        if not config.ingestion.follow.enabled:
            raise
        logger.warning("%s: it is waited for", error.what)
        return {"sources": [{"uri": source.uri} for source in config.ingestion.sources]}


def plan(config: Config, inputs: dict[str, Any]) -> dict[str, Any]:
    """Which files are read, and what the tables hold now."""
    names = (config.ingestion.table, config.ingestion.quarantine_table)
    return {"read": inputs["sources"], "append_to": [_now(config, name) for name in names]}


def still_there(config: Config, outputs: dict[str, Any]) -> bool:
    """Whether the snapshot is the current version or one that it goes back to; following is never done."""
    return not config.ingestion.follow.enabled and tables.is_of_current(config, TableVersion(**outputs["table"]))


def _now(config: Config, name: str) -> dict[str, Any]:
    try:
        snapshot = tables.open_table(config.storage, name).current_snapshot()
    except TableNotFound:
        snapshot = None
    rows = int((snapshot.summary and snapshot.summary["total-records"]) or 0) if snapshot else 0
    return {"table": name, "snapshot_id": snapshot.snapshot_id if snapshot else None, "rows": rows}


JOB = Job(
    "ingest",
    run,
    inputs,
    plan,
    sections=("ingestion",),
    packages=("ingestion",),
    still_there=still_there,
    switches={"follow": ("ingestion.follow.enabled", "go on reading in micro-batches until SIGTERM")},
)

if __name__ == "__main__":
    sys.exit(JOB.main())
