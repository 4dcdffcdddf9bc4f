"""Model version to a smaller one: int8, reloaded from disk, measured, accepted or refused.

python -m jobs.compress --config jobs/configs/demo.yaml [--set compression.max_perplexity_increase=0.01] [--dry-run]
"""

import sys
from typing import Any

from app.config import Config
from app.job import Job, Outcome
from app.versions import ModelVersion, as_json


def run(config: Config, inputs: dict[str, Any]) -> Outcome:
    """Compress, and register what is within the budget."""
    from app.compression.pipeline import compress

    compressed = compress(config, ModelVersion(**inputs["model"]))
    return Outcome({"model": as_json(compressed.version)}, compressed.figures)


def inputs(config: Config) -> dict[str, Any]:
    """The version that `inputs.model_version` names, else the newest trained one."""
    from app.registry import Registry

    return {"model": as_json(Registry(config).version(config.inputs.model_version, stage="train"))}


def plan(config: Config, inputs: dict[str, Any]) -> dict[str, Any]:
    """The weights that are read, and where the smaller ones go if they are within the budget."""
    from app.compression.gate import weights_bytes
    from app.storage import Storage

    size = weights_bytes(inputs["model"]["uri"])
    budget = config.compression
    return {
        "read": {**inputs["model"], "bytes": size},
        "write": {
            "folder": Storage(config.storage.uri).uri("models", config.registry.model, "<run id>"),
            "bytes_at_most": int(size * (1 - budget.min_bytes_reduction)),
        },
        "refuse_above": {"perplexity_increase": budget.max_perplexity_increase},
    }


def still_there(config: Config, outputs: dict[str, Any]) -> bool:
    """Whether the version is registered and its folder is there."""
    from app.registry import Registry

    return Registry(config).exists(ModelVersion(**outputs["model"]))


JOB = Job(
    stage="compress",
    run=run,
    inputs=inputs,
    plan=plan,
    sections=("compression", "registry"),
    packages=("compression", "training"),
    still_there=still_there,
)

if __name__ == "__main__":
    sys.exit(JOB.main())
