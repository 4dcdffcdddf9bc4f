"""Fine-tuning a registered model: all weights, adapters, adapters on int8; then one is served and asked.

    . .rayloop/cluster.env && python -m benchmarks.finetuning        # on a running head with nothing deployed

The base has learned the embedded shop for a while; each way goes on from it for as many steps, on the same blocks.
Writes benchmarks/results/<date>_<hardware>_finetuning.md.
"""

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import httpx

from app.storage import resolve
from benchmarks import measured
from benchmarks.lifecycle import submit

CONFIG = "jobs/configs/demo.yaml"
BASE_STEPS, STEPS = 200, 120
LORA = {"training.method": "lora", "training.lora.rank": 8, "training.lora.alpha": 16.0, "training.learning_rate": 2e-3}
WAYS: dict[str, dict[str, Any]] = {
    "all weights": {"training.learning_rate": 5e-4},
    "adapters of rank 8": LORA,
    "adapters of rank 8 on an int8 base": {**LORA, "training.lora.load_in_8bit": True},
}
QUESTION = "Where is my order 4512?"


def main() -> None:
    """Measure and write the dated file."""
    store = tempfile.mkdtemp(prefix="store-", dir=os.environ.get("RAYLOOP_STATE", resolve(".rayloop")))
    port = int(os.environ["RAYLOOP_HTTP_PORT"])
    settings: dict[str, Any] = {"storage.uri": store, "serving.port": port, "training.report_every_steps": 40}
    submit("ingest", CONFIG, settings)
    base, base_s = submit("train", CONFIG, settings | {"training.max_steps": BASE_STEPS})
    went_on = {"training.base_model": "models:/support/1", "training.optimizer": "adamw", "training.max_steps": STEPS}
    lines, seconds = {}, {}
    for way, changed in WAYS.items():
        lines[way], seconds[way] = submit("train", CONFIG, settings | went_on | changed)
    version = lines["adapters of rank 8 on an int8 base"]["outputs"]["model"]["version"]
    chosen = {"inputs.model_version": version}
    judged, _ = submit("evaluate", CONFIG, settings | chosen | {"evaluation.gate": {}})
    compressed, _ = submit("compress", CONFIG, settings | chosen)
    exported, _ = submit("export", CONFIG, settings | chosen | {"export.what": "adapter"})
    submit("serve", CONFIG, settings | chosen)
    answer, variant = ask(port)

    rows = [
        "| from the base, 120 steps | validation loss | merged | trained bytes | model bytes | tokens/s | seconds |",
        "|---|---|---|---|---|---|---|",
        f"| (the base, {BASE_STEPS} steps from random weights) | {base['figures']['validation_loss']:.4f} | | | | "
        f"{base['figures']['tokens_per_s']:,.0f} | {base_s:.0f} |",
    ]
    for way, line in lines.items():
        figures = line["figures"]
        merged = f"{math.log(figures['merged_perplexity']):.4f}" if "merged_perplexity" in figures else ""
        whole = compressed["figures"]["bytes_before"]  # all ways end with weights of the same shapes
        held = (f"{figures.get(name, whole):,}" for name in ("adapter_bytes", "model_bytes"))
        rows.append(
            f"| {way} | {figures['validation_loss']:.4f} | {merged} | {' | '.join(held)} | "
            f"{figures['tokens_per_s']:,.0f} | {seconds[way]:.0f} |"
        )
    measured.write(
        "finetuning",
        [
            "# Fine-tuning",
            "",
            measured.heading(),
            "",
            "`python -m benchmarks.finetuning`; one repetition. The embedded shop, preset:small in bfloat16, two "
            "workers, ZeRO-2; seconds are those of the submitted job.",
            "",
            *rows,
            "",
            f"Version {version}, of adapters on int8, merged: perplexity {judged['figures']['perplexity']:.3f}, "
            f"token F1 {judged['figures']['token_f1']:.3f}, replies about the right intent "
            f"{judged['figures'].get('reply_intent_accuracy', 0):.3f}; compressed to int8 "
            f"{compressed['figures']['bytes_before']:,} to {compressed['figures']['bytes_after']:,} bytes, perplexity "
            f"{compressed['figures']['perplexity_after']:.3f}; its adapters exported alone are "
            f"{exported['figures']['bytes']:,} bytes.",
            "",
            "The base has had a third of the demo's steps, and does not repeat order numbers yet.",
            "",
            f"Served as `{variant}` and asked over HTTP: {json.dumps(QUESTION)} -> {json.dumps(answer)}",
        ],
    )


def ask(port: int) -> tuple[str, str]:
    """The served model's answer, and the variant that gave it."""
    key = Path(os.environ.get("RAYLOOP_STATE", resolve(".rayloop")), "api_key").read_text().strip()
    body = {"model": "support", "messages": [{"role": "user", "content": QUESTION}]}
    reply = httpx.post(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        json=body,
        headers={"Authorization": f"Bearer {key}"},
        timeout=60,
    )
    reply.raise_for_status()
    return str(reply.json()["choices"][0]["message"]["content"]), reply.headers["x-rayloop-variant"]


if __name__ == "__main__":
    main()
