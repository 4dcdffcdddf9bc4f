"""Conversations removed from every version of the tables, and from the disk.

python -m jobs.forget --config jobs/configs/demo.yaml --set forget.ids_uri=ids.txt [--dry-run]

The file has an id a line. Neither ids nor texts are printed or kept in receipts: what was not found is told by line.
"""

import sys
from dataclasses import asdict
from typing import Any

from app.config import Config
from app.errors import ConfigError
from app.job import Job, Outcome
from app.storage import open_uri


def inputs(config: Config) -> dict[str, Any]:
    """How many conversations are to be forgotten, and where.

    Raises:
        ConfigError: No file of ids is named, or it is empty or cannot be read.
    """
    tables = [config.ingestion.table, config.ingestion.quarantine_table]
    return {"tables": tables, "conversations": len(_ids(config))}


def run(config: Config, inputs: dict[str, Any]) -> Outcome:
    """Remove them; running it again finds nothing, or goes on where it was stopped."""
    figures = _forgotten(config, dry_run=False)
    changed = figures["packs"] or any(entry["files"] or entry["deleted"] for entry in figures["tables"])
    return Outcome({}, figures, "done" if changed else "up_to_date")


def plan(config: Config, inputs: dict[str, Any]) -> dict[str, Any]:
    """What would go, and what is out of reach."""
    return _forgotten(config, dry_run=True)


def _forgotten(config: Config, dry_run: bool) -> dict[str, Any]:
    from app.forget import forget

    lines = _ids(config)
    outcome = forget(config, lines.keys(), config.maintenance, dry_run)
    return {
        "tables": [_told(asdict(entry)) for entry in outcome.tables],
        "packs": outcome.packs,
        "unknown_lines": sorted(lines[identity] for identity in outcome.unknown),
        "out_of_reach": outcome.out_of_reach,
    }


def _told(entry: dict[str, Any]) -> dict[str, Any]:
    """What is said of a table: no ids of conversations."""
    return {name: value for name, value in entry.items() if name not in ("found", "places")}


def _ids(config: Config) -> dict[str, int]:
    """The ids and the lines they stand on, from 1.

    Raises:
        ConfigError: No file of ids is named, or it is empty or cannot be read.
    """
    uri = config.forget.ids_uri
    if uri is None:
        raise ConfigError("forget.ids_uri is not set", "name a file with one conversation id a line")
    filesystem, path = open_uri(uri)
    try:
        with filesystem.open_input_stream(path, compression=None) as stream:
            lines = stream.read().decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read forget.ids_uri={uri!r} ({error})", "give one id a line, in UTF-8") from error
    ids = {line.strip(): number for number, line in enumerate(lines, 1) if line.strip()}
    if not ids:
        raise ConfigError(f"forget.ids_uri={uri!r} holds no id", "give one conversation id a line")
    return ids


JOB = Job(
    stage="forget",
    run=run,
    inputs=inputs,
    plan=plan,
    sections=("forget", "maintenance"),
    packages=(),
    still_there=lambda config, outputs: False,  # an ingest may have brought them back
    needs_cluster=False,
)

if __name__ == "__main__":
    sys.exit(JOB.main())
