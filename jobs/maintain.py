"""Tables kept in order: small files put together, old versions expired, files that no version needs removed.

python -m jobs.maintain --config jobs/configs/demo.yaml [--set maintenance.expire_days=7] [--dry-run]
"""

import sys
from typing import Any

from app import table_maintenance, tables
from app.config import Config
from app.job import Job, Outcome
from app.leftovers import leftovers


def inputs(config: Config) -> dict[str, Any]:
    """The tables, and their current versions; -1 for one that is empty.

    Raises:
        TableError: One of them does not exist, or cannot be read.
    """
    names = table_maintenance.maintained(config, config.maintenance)
    return {"tables": {name: _current(config, name) for name in names}}


def run(config: Config, inputs: dict[str, Any]) -> Outcome:
    """All steps for one table, then for the next."""
    figures = _steps(config, inputs, dry_run=False)
    return Outcome({"tables": {name: _current(config, name) for name in inputs["tables"]}}, figures)


def plan(config: Config, inputs: dict[str, Any]) -> dict[str, Any]:
    """What each step would do to the tables as they are now."""
    return _steps(config, inputs, dry_run=True)


def _steps(config: Config, inputs: dict[str, Any], dry_run: bool) -> dict[str, Any]:
    done = []
    for name in inputs["tables"]:
        for step in config.maintenance.steps:
            table = tables.open_table(config.storage, name)
            done.append(table_maintenance.STEPS[step](config, table, config.maintenance, dry_run).as_json())
    if "orphans" in config.maintenance.steps:
        done.append(leftovers(config, config.maintenance, dry_run).as_json())
    return {"steps": done}


def _current(config: Config, name: str) -> int:
    return tables.open_table(config.storage, name).metadata.current_snapshot_id or -1


JOB = Job(
    stage="maintain",
    run=run,
    inputs=inputs,
    plan=plan,
    sections=("maintenance",),
    packages=(),
    still_there=lambda config, outputs: False,  # files grow old: no run stands for the next
    needs_cluster=False,
)

if __name__ == "__main__":
    sys.exit(JOB.main())
