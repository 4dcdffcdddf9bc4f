"""A table version as plain files, Parquet or JSONL; or a model version, merged, or its adapters alone.

python -m jobs.export --config jobs/configs/demo.yaml --set export.uri=s3://bucket/out --set export.version=clean
python -m jobs.export --config jobs/configs/demo.yaml --set export.what=model --set inputs.model_version=3
"""

import sys
from typing import Any

from app import export, model_export
from app.config import Config
from app.job import Job, Outcome
from app.storage import Storage
from app.tables import rows
from app.versions import as_json


def inputs(config: Config) -> dict[str, Any]:
    """The version and the folder."""
    if config.export.what != "table":
        model, target = model_export.planned(config)
        return {"model": as_json(model), "uri": target.root_uri}
    version, _, target = export.planned(config, config.export)
    return {"table": as_json(version), "uri": target.root_uri}


def run(config: Config, inputs: dict[str, Any]) -> Outcome:
    """Write the files, and last of all `_SUCCESS`."""
    if config.export.what != "table":
        uri, copied, written = model_export.export(config)
        figures = {"files": len(copied.files), "bytes": sum(file.size_bytes for file in copied.files)}
        return Outcome({"uri": uri, "model": inputs["model"]}, figures, "done" if written else "up_to_date")
    uri, done, written = export.export(config, config.export)
    figures = {"rows": done.rows, "files": len(done.files), "bytes": sum(part.size_bytes for part in done.files)}
    return Outcome({"uri": uri, "table": inputs["table"]}, figures, "done" if written else "up_to_date")


def plan(config: Config, inputs: dict[str, Any]) -> dict[str, Any]:
    """What would be written where."""
    if config.export.what != "table":
        _, target = model_export.planned(config)
        return {**inputs, "what": config.export.what, "there": model_export.read(target) is not None}
    version, columns, target = export.planned(config, config.export)
    return {**inputs, "rows": rows(config, version), "columns": columns, "there": export.read(target) is not None}


def still_there(config: Config, outputs: dict[str, Any]) -> bool:
    """Whether the export is finished and all its files have their hashes."""
    target = Storage(outputs["uri"])
    if "model" in outputs:
        return model_export.read(target) is not None and not model_export.check(target)
    return export.read(target) is not None and not export.check(target)


JOB = Job(
    stage="export",
    run=run,
    inputs=inputs,
    plan=plan,
    sections=("export",),
    packages=(),
    still_there=still_there,
    needs_cluster=False,
)

if __name__ == "__main__":
    sys.exit(JOB.main())
