"""What an ingest says of itself: the counts in a job's last line, and the summary of the version it made."""

import json
from collections.abc import Sequence
from typing import Any

from app.config import Config
from app.ingestion.sink import Extent, Staged
from app.ingestion.sources import SourceFile
from app.job import job_id
from app.tables import SUMMARY_PREFIX
from app.versions import code_version

LISTED_SOURCES = 500
"""Files that a snapshot's summary names one by one; beyond, it names the configured sources."""


def counts(staged: Staged) -> dict[str, object]:
    """How many records were read, and what became of them; reasons with the most frequent first."""
    return {
        "records_read": staged.read,
        "records_kept": staged.kept,
        "records_refused": staged.refused,
        "duplicates": staged.duplicates,
        "refused_by_reason": dict(sorted(staged.refused_by_reason.items(), key=lambda item: (-item[1], item[0]))),
    }


def describe(config: Config, key: str, files: Sequence[SourceFile], staged: Staged) -> dict[str, str]:
    """What a snapshot's summary says about the ingest that made it."""
    listed: dict[str, Extent] = {}
    for index, extent in sorted(staged.extents.items()):
        one_by_one = len(staged.extents) <= LISTED_SOURCES
        uri = files[index].uri if one_by_one else config.ingestion.sources[files[index].source].uri
        listed.setdefault(uri, Extent()).widen(extent)
    sampled = any(source.format == "sample" for source in config.ingestion.sources)
    about: dict[str, object] = {
        **counts(staged),
        "sources": [
            {
                "uri": uri,
                "records": extent.records,
                "first_position": extent.first_position,
                "last_position": extent.last_position,
            }
            for uri, extent in listed.items()
        ],
        **({"sample": config.ingestion.sample.model_dump()} if sampled else {}),
        "ingest_key": key,
        "config_digest": config.digest("ingestion"),
        "code_version": code_version("ingestion"),
        "job_id": job_id(),
    }
    return {
        f"{SUMMARY_PREFIX}{name}": value if isinstance(value, str) else json.dumps(value)
        for name, value in about.items()
    }


def figures(about: dict[str, str]) -> dict[str, Any]:
    """The counts in a summary, as a job's last line has them."""
    names = ("records_read", "records_kept", "records_refused", "duplicates", "refused_by_reason")
    return {name: json.loads(about[f"{SUMMARY_PREFIX}{name}"]) for name in names}
