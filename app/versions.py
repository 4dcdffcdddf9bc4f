"""The nouns that stages hand on, and the digests that say whether one is up to date."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

APP = Path(__file__).parent


@dataclass(frozen=True)
class TableVersion:
    """One snapshot of one Iceberg table."""

    table: str
    snapshot_id: int

    def __str__(self) -> str:
        return f"{self.table}@{self.snapshot_id}"


@dataclass(frozen=True)
class ModelVersion:
    """One version of one registered model; `uri` is the folder that holds all that serves it."""

    model: str
    version: str
    uri: str

    def __str__(self) -> str:
        return f"{self.model}/{self.version}"


def as_json(version: TableVersion | ModelVersion) -> dict[str, Any]:
    """The form a version takes in a job's last line, in receipts and in lineage."""
    return asdict(version)


def digest(value: object) -> str:
    """A stable SHA-256 of any JSON-serialisable value, as 64 hex digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def code_version(*packages: str) -> str:
    """Digest of the shared modules and the named stage packages: it changes when their code does."""
    folders = [APP, *(APP / package for package in packages)]
    files = sorted(file for folder in folders for file in folder.glob("*.py"))
    content = hashlib.sha256()
    for file in files:
        content.update(str(file.relative_to(APP)).encode())
        content.update(file.read_bytes())
    return content.hexdigest()
