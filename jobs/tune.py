"""Search for better training settings: a few short trials, the winner's settings are what jobs.train then uses.

python -m jobs.tune --config jobs/configs/demo.yaml [--set tuning.trials=8] [--dry-run]
"""

import json
import shlex
import sys
from typing import Any

from app import tables
from app.config import Config
from app.job import Job, Outcome
from app.versions import ModelVersion, TableVersion, as_json


def run(config: Config, inputs: dict[str, Any]) -> Outcome:
    """Search, going on with an earlier attempt's trials."""
    from app.tuning.search import tune

    if "base_model" in inputs:
        base = ModelVersion(**inputs["base_model"])
        config = config.with_overrides({"training.base_model": f"models:/{base.model}/{base.version}"})
    tuned = tune(config, TableVersion(**inputs["table"]))
    shown = [(key, value if isinstance(value, str) else json.dumps(value)) for key, value in tuned.overrides.items()]
    found = " ".join(f"--set {shlex.quote(f'{key}={value}')}" for key, value in shown)
    print(f"tune: to train with what was found: python -m jobs.train --config F {found}", flush=True)
    return Outcome({"overrides": tuned.overrides}, tuned.figures)


def inputs(config: Config) -> dict[str, Any]:
    """The table version that trials train on, and the registered version they start from if the base model is one."""
    from app.training.base_model import registered

    base = registered(config)
    return {"table": as_json(tables.version(config)), **({"base_model": as_json(base)} if base else {})}


def plan(config: Config, inputs: dict[str, Any]) -> dict[str, Any]:
    """The space, the most that trials can cost, and where the search is kept."""
    from app.tuning.planning import plan

    return plan(config, TableVersion(**inputs["table"]))


JOB = Job(
    stage="tune",
    run=run,
    inputs=inputs,
    plan=plan,
    sections=("tuning", "training", "registry"),
    packages=("training", "tuning"),
)

if __name__ == "__main__":
    sys.exit(JOB.main())
