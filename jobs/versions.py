"""Versions of a table: list them, name one, go back to one, compare two.

python -m jobs.versions --config F                                      # list
python -m jobs.versions --config F --set versions.action=tag --set versions.tag=train-2026-11
python -m jobs.versions --config F --set versions.action=rollback --set versions.version=clean
python -m jobs.versions --config F --set versions.action=diff --set versions.old=raw --set versions.version=clean
"""

import sys
from dataclasses import asdict
from typing import Any

from app import table_versions, tables
from app.config import Config
from app.errors import TableError
from app.job import Job, Outcome
from app.snapshots import ancestors
from app.versions import TableVersion, as_json


def inputs(config: Config) -> dict[str, Any]:
    """The version that is meant; to compare, the earlier one too."""
    settings = config.versions
    which = settings.tag if settings.action == "delete_tag" else settings.version
    version = tables.resolve(config, which, _name(config))
    given: dict[str, Any] = {"action": settings.action, "version": as_json(version)}
    return given | ({"old": as_json(_old(config, version))} if settings.action == "diff" else {})


def run(config: Config, inputs: dict[str, Any]) -> Outcome:
    """Do what `versions.action` says."""
    settings, version = config.versions, TableVersion(**inputs["version"])
    outputs = {"table": inputs["version"]}
    if settings.action == "list":
        return Outcome(outputs, {"versions": _listed(config)})
    if settings.action == "diff":
        return _diff(config, TableVersion(**inputs["old"]), version)
    if settings.action == "rollback":
        before = tables.resolve(config, None, version.table)
        done = table_versions.rollback(config, version)
        return Outcome(outputs, {"before": before.snapshot_id}, "done" if done else "up_to_date")
    assert settings.tag is not None
    if settings.action == "tag":
        done = table_versions.tag(config, version, settings.tag, settings.move)
        return Outcome(outputs, {"tag": settings.tag}, "done" if done else "up_to_date")
    table_versions.delete_tag(config, settings.tag, version.table)
    return Outcome(outputs, {"deleted_tag": settings.tag})


def plan(config: Config, inputs: dict[str, Any]) -> dict[str, Any]:
    """What would be changed, and what there is."""
    return {**inputs, "tag": config.versions.tag, "versions": _listed(config)}


def _diff(config: Config, old: TableVersion, new: TableVersion) -> Outcome:
    from app.table_diff import diff, write_report

    found = diff(config, old, new)
    return Outcome({"table": as_json(new), "report": write_report(config, found)}, found.as_json())


def _old(config: Config, version: TableVersion) -> TableVersion:
    """The version to compare with.

    Raises:
        TableError: None is named, and the other one was made from none.
    """
    if config.versions.old is not None:
        return tables.resolve(config, config.versions.old, version.table)
    chain = list(ancestors(tables.open_table(config.storage, version.table), version.snapshot_id))
    if len(chain) < 2:
        raise TableError(f"{version} is the first of its history", "name another version as versions.old")
    return TableVersion(version.table, chain[1].snapshot_id)


def _listed(config: Config) -> list[dict[str, Any]]:
    return [asdict(entry) for entry in table_versions.versions(config, _name(config))]


def _name(config: Config) -> str:
    return config.versions.table or config.ingestion.table


JOB = Job(
    stage="versions",
    run=run,
    inputs=inputs,
    plan=plan,
    sections=("versions",),
    packages=(),
    still_there=lambda config, outputs: False,  # names move: no run stands for the next
    needs_cluster=False,
)

if __name__ == "__main__":
    sys.exit(JOB.main())
