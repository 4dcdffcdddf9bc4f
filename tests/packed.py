"""Packed blocks of the embedded shop, made without Ray, and runs of the loop over them under torchrun."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from app.config import Config
from app.storage import Storage
from app.training import data
from tests.conftest import ROOT

SETTINGS: dict[str, Any] = {
    "training.base_model": "preset:tiny",
    "training.vocab_size": 512,
    "training.block_tokens": 64,
    "training.micro_batch_size": 4,
    "training.max_steps": 12,
    "training.report_every_steps": 6,
}
NAME = "shop"


def make(root: Path, conversations: int = 120, files: Sequence[int] = (33, 90, 61)) -> Config:
    """A store that holds packed blocks, some in each file, and the configuration that trains on them."""
    from app import conversation
    from app.ingestion import sample
    from app.training.packing import fill

    config = Config().with_overrides({**SETTINGS, "storage.uri": str(root)})
    training = config.training
    records = [json.loads(line)["messages"] for line in sample.lines(7, 0, conversations, 0.0)]
    tokenizer = conversation.train_tokenizer((turn["content"] for turns in records for turn in turns), 512)
    encoded = [conversation.encode(tokenizer, turns, training.loss_on) for turns in records]
    columns = fill(encoded, training.block_tokens, data.pad_id(tokenizer)).columns()
    held_out, ends = 11, np.cumsum(files)
    assert len(columns["labels"]) >= held_out + ends[-1], f"{len(columns['labels'])} blocks"
    drawn = np.random.default_rng(1).permutation(len(columns["labels"]))  # packing puts the long ones first
    columns = {name: column[drawn] for name, column in columns.items()}
    folder = root / "packed" / NAME
    for part in ("blocks", "validation"):
        (folder / part).mkdir(parents=True)
    tokenizer.save_pretrained(folder / "tokenizer")
    np.savez(folder / "validation" / "blocks.npz", **{name: column[:held_out] for name, column in columns.items()})
    names = []
    for count, end in zip(files, ends, strict=True):
        rows = slice(held_out + end - count, held_out + end)
        table = {name: pa.array(list(column[rows]), pa.large_list(pa.int32())) for name, column in columns.items()}
        names.append(f"{len(names)}.parquet")
        pq.write_table(pa.table(table), folder / "blocks" / names[-1])
    manifest = {"folder": ".", "files": names, "blocks": int(ends[-1]), "bytes": 0}
    (folder / data.MANIFEST).write_text(json.dumps(manifest))
    return config


def found(config: Config) -> data.Packed:
    """The blocks of `make`."""
    packed = data.find(Storage(config.storage.uri), NAME)
    assert packed is not None
    return packed


def trained(root: Path, settings: Sequence[dict[str, Any]], workers: int = 2) -> list[dict[str, Any]]:
    """Train with each of some settings in the same workers, one after the other.

    Returns:
        For each: `steps`, the losses that worker 0 saw; `validation` by step; `tokens`; with the setting `checkpoints`
        also `model_loss`, of the model in the last one. With `resume` it goes on from step 6 of the one before.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers)]
    command += ["-m", "tests.packed", str(root), json.dumps(list(settings))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4_000:]
    return [json.loads(line.removeprefix("RESULT ")) for line in done.stdout.splitlines() if line.startswith("RESULT ")]


def _work(root: str, settings: list[dict[str, Any]]) -> None:
    import shutil
    import tempfile

    import torch
    import torch.distributed as dist

    from app.training import loop, worker

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, workers = dist.get_rank(), dist.get_world_size()
    aside = [tempfile.mkdtemp() if rank == 0 else ""]
    dist.broadcast_object_list(aside)
    folder = Path(aside[0]) / "kept"
    for given in settings:
        kept, resume = given.pop("checkpoints", False), given.pop("resume", False)
        config = Config().with_overrides({**SETTINGS, "storage.uri": root, "training.num_workers": workers, **given})
        training, packed = config.training, found(config)
        tokenizer = data.load_tokenizer(packed)
        result: dict[str, Any] = {"steps": [], "validation": {}}

        def step(values: dict[str, float], result: Any = result) -> None:
            result["steps"].append(values["loss"])

        def report(metrics: dict[str, float], written: Any, result: Any = result, tokenizer: Any = tokenizer) -> None:
            result["validation"][int(metrics["step"])] = metrics["validation_loss"]
            result["tokens"] = metrics["tokens"]
            if written is not None:
                with tempfile.TemporaryDirectory() as own:
                    written.write(Path(own))
                    shutil.copytree(own, folder / str(int(metrics["step"])), dirs_exist_ok=True)
                dist.barrier()

        if kept and not resume and rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
        dist.barrier()
        loop.run(
            worker.start_model(training, tokenizer),
            tokenizer,
            training,
            data.read(packed, training.seed).take,
            data.read_validation(packed),
            loop.Hooks(report, step),
            folder / "6" if resume else None,
            checkpoints=kept,
        )
        if kept and rank == 0:
            result["model_loss"] = _loss(folder / "12" / "model", data.read_validation(packed))
        if rank == 0:
            print("RESULT " + json.dumps(result), flush=True)
    dist.destroy_process_group()


def _loss(folder: Path, blocks: dict[str, np.ndarray]) -> float:
    """Of a model folder, as transformers computes it."""
    import torch

    from app import model as models

    model, _ = models.load(folder)
    tensors = {name: torch.from_numpy(column).long() for name, column in blocks.items()}
    with torch.no_grad():
        logits = model(input_ids=tensors["input_ids"], position_ids=tensors["position_ids"], use_cache=False).logits
    targets = tensors["labels"][:, 1:].flatten()
    return float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets))


if __name__ == "__main__":
    _work(sys.argv[1], json.loads(sys.argv[2]))
