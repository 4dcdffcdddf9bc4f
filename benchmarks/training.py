"""Training: the price of Ray, peers on the same tokens and cores, packing, and memory under ZeRO.

    python -m benchmarks.training                       # preset:small on two CPU workers, gloo
    python -m benchmarks.training --model preset:base   # a larger one
    python -m benchmarks.training --gpu                 # a 124M model on one GPU a worker; needs `--workers`, `--model`

Conversations of the Schema-Guided Dialogue data (../shared/data), the embedded shop where it is missing, ingested and
tokenized by the product. Each run is a process of its own; tools take turns. Writes
benchmarks/results/<date>_<hardware>_training.md.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from benchmarks import measured
from benchmarks.peers import training as runs

ROOT = Path(__file__).parent.parent
SGD = ROOT.parent / "shared" / "data" / "sgd" / "train.jsonl.gz"
BIN = Path(sys.executable).parent
BLOCK_TOKENS = 512
OURS = ("packed", "compiled", "padded", "ray", "deepspeed", "ray_alone", "deepspeed_alone")
PEERS = ("trainer", "trainer_compiled", "accelerate")
Figures = dict[str, Any]


class Bench:
    """A folder with the data, and runs over it."""

    def __init__(self, folder: Path, model: str, workers: int, gpu: bool, steps: int) -> None:
        self.folder, self.workers, self.gpu, self.steps = folder, workers, gpu, steps
        sgd = {"uri": str(SGD), "format": "jsonl"}
        training = {
            "base_model": model, "vocab_size": 4_096, "block_tokens": BLOCK_TOKENS, "precision": "bf16",
            "micro_batch_size": 32 if gpu else 4, "max_steps": steps, "report_every_steps": steps,
            "validation_blocks": 48, "num_workers": workers, "use_gpu": gpu, "zero_stage": 1,
            "adam_kernel": "fused",
        }  # fmt: skip
        config = {
            "storage": {"uri": str(folder / "store")},
            "ingestion": {
                "sources": [sgd if SGD.exists() else {"uri": "sample:shop", "format": "sample"}],
                "max_refused_fraction": 0.1,
            },
            "training": training,
        }
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        self.data = self._said(["-m", "benchmarks.peers.training", "prepare", str(folder)], "FIGURES")[0]
        real = self.data["tokens"] / self.data["conversations"]
        # As many real tokens a step as a step of ours has.
        self.batch = max(1, round(training["micro_batch_size"] * BLOCK_TOKENS / real))

    def run(self, tool: str) -> Figures:
        """One run of one tool."""
        workers = 1 if tool.endswith("_alone") else self.workers
        if tool.startswith("ray"):
            settings = json.dumps({"training.num_workers": workers})
            (found,) = self._said(["-m", "benchmarks.peers.training", "ray", str(self.folder), settings], "FIGURES")
            found["start_s"] = found["seconds"] - found["steps_s"]
            return found
        if tool in PEERS:
            settings = {"peer.batch": self.batch, "peer.packed": "padded", "peer.compile": tool == "trainer_compiled"}
            program = tool.removesuffix("_compiled")
            command = [*self._torchrun(), "benchmarks.peers.training", program, str(self.folder), json.dumps(settings)]
            return self._said(command, "FIGURES")[0]
        return self._standalone(tool, workers)

    def memory(self) -> list[Figures]:
        """Bytes of each parameter in each ZeRO stage."""
        settings = {"training.use_gpu": self.gpu}
        command = [*self._torchrun(), "benchmarks.peers.training", "memory", str(self.folder), json.dumps(settings)]
        return self._said(command, "MEMORY")

    def _standalone(self, tool: str, workers: int) -> Figures:
        events = self.folder / "events.jsonl"
        module = ["app.training.standalone", "--config", str(self.folder / "config.yaml"), "--name", tool]
        module += ["--packed", "padded" if tool == "padded" else self.data["packed"], "--events", str(events)]
        if tool == "compiled":
            module += ["--set", "training.compile=true"]
        if tool == "padded":
            module += ["--set", f"training.micro_batch_size={self.batch}"]
        command = [*self._torchrun(), *module]
        if tool.startswith("deepspeed"):
            module += ["--set", f"training.num_workers={workers}"]
            command = ["-m", "deepspeed.launcher.runner", "--num_accelerators", str(workers), "--module", *module]
        started_s = time.monotonic()
        self._said(command)
        seconds = time.monotonic() - started_s
        shutil.rmtree(self.folder / "store" / "checkpoints" / tool)  # or the next run would go on from it
        found = runs.of_events([json.loads(line) for line in events.read_text().splitlines()])
        return {**found, "start_s": seconds - found["steps_s"]}

    def _torchrun(self) -> list[str]:
        return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.workers), "-m"]

    def _said(self, command: list[str], mark: str | None = None) -> list[Figures]:
        """What a program printed after a mark."""
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "PATH": f"{BIN}:{os.environ['PATH']}",
        }
        environment |= {"RAY_AUTH_MODE": "disabled"} | ({} if self.gpu else {"DS_ACCELERATOR": "cpu"})
        done = subprocess.run(
            [sys.executable, "-W", "ignore", *command],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3_000:]}")
        lines = done.stdout.splitlines() if mark else []
        return [json.loads(line.removeprefix(f"{mark} ")) for line in lines if line.startswith(f"{mark} ")]


def formula(stage: int, workers: int) -> float:
    """Bytes of each parameter in bf16 with AdamW: Rajbhandari et al. 2020, ZeRO, section 3 (K = 12)."""
    return [16.0, 4 + 12 / workers, 2 + 14 / workers, 16 / workers][stage]


def spread(found: list[Figures], name: str, digits: int = 0) -> str:
    """Median and range."""
    values = [figures[name] for figures in found]
    return f"{median(values):,.{digits}f} ({min(values):,.{digits}f}-{max(values):,.{digits}f})"


def middle(found: list[Figures], name: str) -> float:
    """The median."""
    return float(median(figures[name] for figures in found))


def tables(bench: Bench, found: dict[str, list[Figures]], stages: list[Figures]) -> list[str]:
    """The report's tables."""
    lines = [
        "## Tools on the same conversations",
        "",
        "| tool | useful tokens/s | ours, packed, is | tokens seen | validation loss | data stall |",
        "|---|---|---|---|---|---|",
    ]
    names = {
        "packed": "ours, packed blocks", "compiled": "ours, packed, torch.compile",
        "padded": "ours, a conversation a block", "trainer": "transformers Trainer",
        "trainer_compiled": "transformers Trainer, torch.compile", "accelerate": "accelerate",
    }  # fmt: skip
    for tool, name in names.items():
        if of := found.get(tool):
            ratio = middle(found["packed"], "tokens_per_s") / middle(of, "tokens_per_s")
            stall = f"{middle(of, 'stall'):.2%}" if "stall" in of[0] else ""
            lines.append(
                f"| {name} | {spread(of, 'tokens_per_s')} | {ratio:.2f}x | {middle(of, 'tokens'):,.0f} | "
                f"{spread(of, 'validation_loss', 3)} | {stall} |"
            )
    packing = bench.data["padding"], bench.data["packed_padding"]
    lines += [
        "",
        f"Padding: {packing[0]:.1%} of the tokens where each conversation has a block, {packing[1]:.1%} packed; so at "
        f"most {(1 - packing[1]) / (1 - packing[0]):.2f}x is to be had from packing.",
    ]
    if "padded" in found:
        gain = middle(found["packed"], "tokens_per_s") / middle(found["padded"], "tokens_per_s")
        lines += [f"Had: {gain:.2f}x, {gain * (1 - packing[0]):.2f} of the ceiling 1/(1 - padding) (target 0.9)."]
    if "ray" in found and "deepspeed" in found:
        lines += [
            "", "## The price of Ray", "",
            "From the end of a step to the end of the next, median.", "",
            "| workers | launcher | step, s | start-up and end, s | validation loss |", "|---|---|---|---|---|",
        ]  # fmt: skip
        ratios = []
        for workers, alone in ((bench.workers, ""), (1, "_alone")):
            if not {f"ray{alone}", f"deepspeed{alone}"} <= found.keys():
                continue
            for launcher in ("ray", "deepspeed"):
                of = found[launcher + alone]
                cells = spread(of, "step_s", 4), spread(of, "start_s", 1), spread(of, "validation_loss", 6)
                lines.append(f"| {workers} | {launcher} | {' | '.join(cells)} |")
            ratio = middle(found[f"ray{alone}"], "step_s") / middle(found[f"deepspeed{alone}"], "step_s")
            ratios.append(f"{ratio:.3f}x with {workers} of {os.cpu_count()} cores at work")
        lines += ["", f"A step under Ray Train takes {', '.join(ratios)} (target 1.01)."]
    if stages:
        lines += [
            "", f"## Memory of {stages[0]['parameters']:,} parameters on {bench.workers} workers, bf16, AdamW", "",
            "Tensors that a worker holds before an update, without activations.", "",
            "| ZeRO | bytes a parameter | formula | measured / formula |", "|---|---|---|---|",
        ]  # fmt: skip
        for stage in stages:
            expected = formula(stage["stage"], bench.workers)
            lines.append(
                f"| {stage['stage']} | {stage['bytes']:.2f} | {expected:.2f} | {stage['bytes'] / expected:.2f} |"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="preset:small")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--only", default=",".join((*OURS, *PEERS, "memory")), help="some of the tools, and memory")
    given = parser.parse_args()
    if given.gpu:
        import torch

        if torch.cuda.device_count() < given.workers:
            sys.exit(f"there are {torch.cuda.device_count()} GPUs here, --workers is {given.workers}")
    chosen = given.only.split(",")
    found: dict[str, list[Figures]] = {tool: [] for tool in (*OURS, *PEERS) if tool in chosen}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), given.model, given.workers, given.gpu, given.steps)
        print(f"{bench.data}; peers take {bench.batch} conversations a batch", flush=True)
        for _ in range(given.repetitions):
            for tool, of in found.items():
                of.append(bench.run(tool))
                print(tool, json.dumps(of[-1]), flush=True)
        stages = bench.memory() if "memory" in chosen else []
    lines = [
        "# Training", "", measured.heading(), "",
        f"`python -m benchmarks.training {' '.join(sys.argv[1:])}`: {given.model}, {given.workers} workers, bf16, "
        f"AdamW, {given.steps} steps of about {bench.workers * bench.batch} conversations, {given.repetitions} "
        f"repetitions in turns; median (range), the first {runs.WARM_STEPS} steps left out of rates. Useful tokens are "
        "those that are no padding. Peers: padded batches of conversations of like length, fused AdamW, bf16 autocast, "
        "as many tokens a step.",
        "", *tables(bench, found, stages),
    ]  # fmt: skip
    measured.write("training", lines)


if __name__ == "__main__":
    main()
