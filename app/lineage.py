"""Where a model version comes from, written into its folder as `lineage.json`.

Serving answers `why` from this file and the traffic log alone: no server has to be up.
"""

import datetime
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from app.errors import ModelError, StorageError
from app.storage import Storage

FILE = "lineage.json"


@dataclass(frozen=True)
class Lineage:
    """The chain from a model version back to the files and positions it learned from."""

    model: str
    """Name in the registry."""
    version: str | None
    """Version in the registry; none: the folder was made and not registered."""
    run_id: str
    """MLflow run that made it."""
    stage: str
    """train | compress"""
    table: str
    """Table it was trained on."""
    snapshot_id: int
    """Version of that table."""
    sources: list[dict[str, Any]]
    """What the table version holds, each {uri, records, first_position, last_position}."""
    config_digest: str
    """Of the whole configuration."""
    code_version: str
    """Of the code that ran."""
    job_id: str
    """Ray job that made it."""
    parent: str | None
    """Version it was compressed from."""
    created_at: str
    """ISO 8601, UTC."""


def now() -> str:
    """The time, as `created_at` says it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def write(folder: Path, lineage: Lineage) -> None:
    """Put the lineage into a model folder."""
    (folder / FILE).write_text(json.dumps(asdict(lineage), indent=2) + "\n", encoding="utf-8")


def read(uri: str) -> Lineage:
    """The lineage in the model folder at `uri`.

    Raises:
        ModelError: There is none, or it is damaged.
    """
    try:
        content = json.loads(Storage(uri).read(FILE))
        return Lineage(**{field.name: content[field.name] for field in fields(Lineage)})
    except (StorageError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{uri}/{FILE} cannot be read ({error})",
            "the model folder must be one that jobs.train or jobs.compress made",
        ) from error
