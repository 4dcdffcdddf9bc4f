"""Model version to figures on the held-out split, a report, and the champion if it passes the gate.

python -m jobs.evaluate --config jobs/configs/demo.yaml [--set evaluation.gate.min_token_f1=0.5] [--dry-run]
"""

import sys
from typing import Any

from app.config import Config
from app.job import Job, Outcome
from app.versions import ModelVersion, as_json


def run(config: Config, inputs: dict[str, Any]) -> Outcome:
    """Measure, report, and apply the gate."""
    from app.judgement import judge
    from app.training.data import validation_blocks

    judged = judge(config, ModelVersion(**inputs["model"]), validation_blocks)
    return Outcome({"model": inputs["model"], "report": judged.report, "champion": True}, judged.figures)


def inputs(config: Config) -> dict[str, Any]:
    """The version that `inputs.model_version` names, else the newest."""
    from app.registry import Registry

    return {"model": as_json(Registry(config).version(config.inputs.model_version))}


def plan(config: Config, inputs: dict[str, Any]) -> dict[str, Any]:
    """What is read, how much is answered, and where the report goes."""
    from app import tables
    from app.judgement import trained_on
    from app.registry import Registry
    from app.storage import Storage

    table = trained_on(Registry(config), ModelVersion(**inputs["model"]))
    settings = config.evaluation
    return {
        "read": {**inputs["model"], "table": str(table), "conversations": tables.rows(config, table)},
        "answer": {"questions_at_most": settings.replies, "tokens_at_most": settings.max_reply_tokens},
        "write": Storage(config.storage.uri).uri("reports", "evaluate", "<run id>", "report.html"),
        "gate": settings.gate.model_dump(exclude_none=True),
    }


def still_there(config: Config, outputs: dict[str, Any]) -> bool:
    """Whether the version and its report are there."""
    from app.registry import Registry
    from app.storage import Storage

    report, name = outputs["report"].rsplit("/", 1)
    return Registry(config).exists(ModelVersion(**outputs["model"])) and Storage(report).exists(name)


JOB = Job(
    stage="evaluate",
    run=run,
    inputs=inputs,
    plan=plan,
    sections=("evaluation", "registry"),
    packages=("training",),
    still_there=still_there,
)

if __name__ == "__main__":
    sys.exit(JOB.main())
