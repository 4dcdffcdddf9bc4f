"""Table version to model version: tokenizer, packing, DeepSpeed on Ray Train, checkpoints, registration.

python -m jobs.train --config jobs/configs/demo.yaml [--set training.max_steps=50] [--dry-run]
"""

import sys
from contextlib import suppress
from typing import Any

from app import tables
from app.config import Config
from app.errors import ClusterError
from app.job import Job, Outcome, connect
from app.versions import ModelVersion, TableVersion, as_json


def run(config: Config, inputs: dict[str, Any]) -> Outcome:
    """Train, going on from the checkpoints of an earlier attempt."""
    from app.training.trainer import train

    if "base_model" in inputs:
        base = ModelVersion(**inputs["base_model"])
        config = config.with_overrides({"training.base_model": f"models:/{base.model}/{base.version}"})
    trained = train(config, TableVersion(**inputs["table"]))
    status = "done" if trained.is_new else "up_to_date"
    return Outcome({"model": as_json(trained.version)}, trained.figures, status)


def inputs(config: Config) -> dict[str, Any]:
    """The table version to train on; the registered version to start from if the base model is one, and what
    preference pairs there are, where these are learned from."""
    from app.training.base_model import registered

    found: dict[str, Any] = {"table": as_json(tables.version(config))}
    if base := registered(config):
        found["base_model"] = as_json(base)
    if config.training.objective == "dpo":
        from app.training.preference_blocks import pairs_digest

        found["pairs"] = pairs_digest(config)
    return found


def plan(config: Config, inputs: dict[str, Any]) -> dict[str, Any]:
    """What would be read, computed, needed and written; without a cluster, not whether that is there."""
    from app.training.planning import plan

    with suppress(ClusterError):
        connect()
    return plan(config, TableVersion(**inputs["table"]))


def still_there(config: Config, outputs: dict[str, Any]) -> bool:
    """Whether the model version is registered and its folder is there."""
    from app.registry import Registry

    return Registry(config).exists(ModelVersion(**outputs["model"]))


JOB = Job(
    stage="train",
    run=run,
    inputs=inputs,
    plan=plan,
    sections=("training", "registry"),
    packages=("training",),
    still_there=still_there,
)

if __name__ == "__main__":
    sys.exit(JOB.main())
