"""What an ingest says of itself: the counts in a job's last line, and the summary of the version it made."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from app.config import Config
from app.ingestion.finalisation import Extent, Outcome
from app.ingestion.parts import Part
from app.job import job_id
from app.tables import SUMMARY_PREFIX
from app.versions import code_version

LISTED_SOURCES = 500
"""Parts that a snapshot's summary names one by one; beyond, it names the configured sources."""
FIGURES = (
    "records_read", "records_kept", "records_refused", "duplicates", "near_duplicates", "refused_by_reason",
    "warned_by_rule", "imputed_by_column", "masked",
)  # fmt: skip


def counts(outcome: Outcome) -> dict[str, Any]:
    """How many records were read, and what became of them; reasons with the most frequent first."""
    return {
        "records_read": outcome.read,
        "records_kept": outcome.kept,
        "records_refused": outcome.refused,
        "duplicates": outcome.duplicates,
        "near_duplicates": outcome.near_duplicates,
        "refused_by_reason": _ordered(outcome.quarantined + outcome.dropped),
        "warned_by_rule": _ordered(outcome.warned),
        "imputed_by_column": _ordered(outcome.imputed),
        "masked": outcome.masked,
    }


def nothing() -> dict[str, Any]:
    """The counts of an ingest that found nothing new."""
    return counts(Outcome())


def _ordered(counter: Counter[str]) -> dict[str, int]:
    return dict(sorted(counter.items(), key=lambda item: (-item[1], item[0])))


def describe(config: Config, key: str, parts: Sequence[Part], outcome: Outcome) -> dict[str, str]:
    """What a snapshot's summary says about the ingest that made it."""
    listed: dict[str, Extent] = {}
    for index, extent in sorted(outcome.extents.items()):
        one_by_one = len(outcome.extents) <= LISTED_SOURCES
        uri = parts[index].uri if one_by_one else config.ingestion.sources[parts[index].source].uri
        listed.setdefault(uri, Extent()).widen(extent)
    sampled = any(source.format == "sample" for source in config.ingestion.sources)
    about: dict[str, object] = {
        **counts(outcome),
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


def figures(about: Mapping[str, str]) -> dict[str, Any]:
    """The counts in a summary, as a job's last line has them."""
    found = {name: about.get(f"{SUMMARY_PREFIX}{name}") for name in FIGURES}
    return {name: json.loads(value) for name, value in found.items() if value is not None}
