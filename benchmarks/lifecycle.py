"""The whole path on an empty store, again when all is up to date, and a model trained for a tenth as long.

    make bench                                            # the embedded shop
    python -m benchmarks.lifecycle --config jobs/configs/sgd.yaml      # on a running head

Writes benchmarks/results/<date>_<hardware>_<config>.md.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from app.config import load
from app.storage import resolve
from benchmarks import measured

SHOWN = {
    "ingest": ("records_read", "records_kept", "records_refused", "duplicates"),
    "tune": ("trials", "overrides"),
    "train": ("parameters", "tokens", "tokens_per_s", "validation_loss", "perplexity"),
    "compress": ("bytes_before", "bytes_after", "perplexity_before", "perplexity_after"),
    "evaluate": (
        "perplexity", "token_f1", "intent_accuracy", "intent_macro_f1", "reply_judge_accuracy", "reply_intent_accuracy",
    ),
    "serve": ("seconds_to_ready",),
    "monitor": ("exchanges", "feedback"),
}  # fmt: skip


def submit(verb: str, config: str, settings: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """Run one verb as a submitted job; its last line, and the seconds a user waits for it."""
    command = ["ray", "job", "submit", "--working-dir", ".", "--", "python", "-m", f"jobs.{verb}", "--config", config]
    for key, value in settings.items():
        command += ["--set", f"{key}={value if isinstance(value, str) else json.dumps(value)}"]
    started_s = time.monotonic()
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.monotonic() - started_s
    lines = [line for line in run.stdout.splitlines() if line.startswith('{"stage": ')]
    if run.returncode or not lines:
        sys.exit(f"{verb} did not finish:\n{run.stdout[-3000:]}{run.stderr[-1000:]}")
    line: dict[str, Any] = json.loads(lines[-1])
    return line, seconds


def value_of(value: Any) -> str:
    """A figure as the table shows it."""
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def table(stages: dict[str, Any]) -> list[str]:
    """One row a stage."""
    rows = ["| stage | seconds | figures |", "|---|---|---|"]
    for name, line in stages.items():
        figures = line["figures"]
        shown = ", ".join(f"{key} {value_of(figures[key])}" for key in SHOWN[name] if key in figures)
        rows.append(f"| {name} | {line['seconds']:.1f} | {shown} |")
    return rows


def main() -> None:
    """Measure and write the dated file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", default="jobs/configs/demo.yaml")
    name: str = parser.parse_args().config
    config = load(name)
    store = tempfile.mkdtemp(prefix="store-", dir=os.environ.get("RAYLOOP_STATE", resolve(".rayloop")))
    settings = {"storage.uri": store, "serving.port": int(os.environ.get("RAYLOOP_HTTP_PORT", config.serving.port))}

    first, first_s = submit("lifecycle", name, settings)
    stages = first["figures"]
    second, second_s = submit("lifecycle", name, settings)
    repeated = [stage for stage, line in second["figures"].items() if line["status"] != "up_to_date"]
    inputs = {
        "inputs.snapshot_id": first["outputs"]["ingest"]["table"]["snapshot_id"],
        **first["outputs"]["tune"]["overrides"],
    }
    tenth_steps = max(1, config.training.max_steps // 10)
    tenth, _ = submit("train", name, settings | inputs | {"training.max_steps": tenth_steps})

    text = [
        f"# The whole path: {name}",
        "",
        measured.heading(),
        "",
        f"`python -m benchmarks.lifecycle --config {name}`; one repetition.",
        "",
        *table(stages),
        "",
        f"- First run: {first_s:.0f} s. Second run: {second_s:.0f} s, stages that ran again: {', '.join(repeated)}.",
        f"- Perplexity after {config.training.max_steps} steps {stages['train']['figures']['perplexity']:.3f}, after a "
        f"tenth ({tenth_steps}) {tenth['figures']['perplexity']:.3f}.",
        f"- Refused by reason: {json.dumps(stages['ingest']['figures'].get('refused_by_reason', {}))}.",
        "",
        "<details><summary>All figures</summary>",
        "",
        "```json",
        json.dumps({stage: line["figures"] for stage, line in stages.items()}, indent=1, default=str),
        "```",
        "",
        "</details>",
    ]
    measured.write(Path(name).stem, text)


if __name__ == "__main__":
    main()
