"""What a small model reaches with each of some hundred settings: real runs, made once, that searches then look up.

The embedded shop, preset:tiny, 64 steps, validation loss every four; one run for each point of `SPACE`, two at a time
in plain processes. Kept in .rayloop/bench-data/small_models.json, as it takes a quarter of an hour.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from app.config import Config
from app.settings.tuning import DimensionConfig
from app.storage import Storage, resolve
from app.tuning import space as spaces

KEPT = Path(resolve(".rayloop/bench-data/small_models.json"))
STORE = KEPT.with_name("small_models")
STEPS, EVERY = 64, 4
Values = dict[str, Any]
Curve = list[float]
"""Validation losses at each `EVERY` steps."""

GRID: dict[str, Sequence[Any]] = {
    "training.optimizer": ("adamw", "muon"),
    "training.learning_rate": [float(rate) for rate in np.geomspace(3e-4, 6e-2, 12).round(6)],
    "training.muon_learning_rate": [float(rate) for rate in np.geomspace(3e-3, 2e-1, 6).round(5)],
    "training.warmup_fraction": (0.0, 0.1, 0.25),
    "training.min_learning_rate_fraction": (0.0, 0.3),
}
SPACE: dict[str, DimensionConfig] = {
    key: DimensionConfig(kind="int", low=0, high=len(values) - 1) for key, values in GRID.items()
}
"""Places in the lists of `GRID`; Muon's learning rate is there where Muon is."""
SPACE["training.optimizer"] = DimensionConfig(kind="choice", choices=(0, 1))
SPACE["training.muon_learning_rate"] = SPACE["training.muon_learning_rate"].model_copy(
    update={"when": {"training.optimizer": 1}}
)
SETTINGS = {
    "training.base_model": "preset:tiny", "training.vocab_size": 512, "training.block_tokens": 128,
    "training.num_workers": 1, "training.micro_batch_size": 8, "training.max_steps": STEPS,
    "training.report_every_steps": EVERY, "training.validation_blocks": 32,
    "ingestion.sample.conversations": 4_000, "ingestion.max_refused_fraction": 0.1,
}  # fmt: skip


def configuration() -> Config:
    """What all runs have in common."""
    return Config().with_overrides({**SETTINGS, "storage.uri": str(STORE)})


def settings(values: Values) -> Values:
    """The configuration keys of a point of `SPACE`."""
    return {key: GRID[key][place] for key, place in values.items()}


def curves() -> dict[str, Curve]:
    """By `spaces.point`; trained now if they are not kept."""
    if KEPT.exists():
        found: dict[str, Curve] = json.loads(KEPT.read_text())
        return found
    STORE.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, "-W", "ignore", "-m", "benchmarks.small_models"], check=True)
    packed = (STORE / "packed.txt").read_text()
    points = list({spaces.point(values): values for values in spaces.points(SPACE)}.values())
    with ProcessPoolExecutor(2, get_context("spawn"), _begin, (packed,)) as pool:
        ended = list(pool.map(_train, points))
    found = {spaces.point(values): curve for values, curve in zip(points, ended, strict=True)}
    KEPT.write_text(json.dumps(found))
    return found


def _begin(packed: str) -> None:
    """A process that will train many models, one after another."""
    import warnings

    import torch
    import torch.distributed as dist
    from torch._C._distributed_c10d import HashStore

    from app.training import data

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "DS_ACCELERATOR": "cpu"}
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    found = data.find(Storage(configuration().storage.uri), packed)
    assert found is not None
    _process["packed"] = found


_process: dict[str, Any] = {}


def _train(values: Values) -> Curve:
    from app.training import data, loop
    from app.training.worker import start_model

    config, packed = configuration().with_overrides(settings(values)), _process["packed"]
    training, curve = config.training, Curve()
    tokenizer = data.load_tokenizer(packed)
    hooks = loop.Hooks(lambda metrics, part: curve.append(metrics["validation_loss"]), lambda values: None)
    take, validation = data.read(packed, training.seed).take, data.read_validation(packed)
    loop.run(start_model(training, tokenizer), tokenizer, training, take, validation, hooks, checkpoints=False)
    return curve


def main() -> None:
    """Ingest and pack, on a local Ray of its own."""
    import ray

    from app.ingestion.pipeline import ingest
    from app.training import data

    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    config = configuration()
    packed, _ = data.prepare(config, ingest(config).version)
    (STORE / "packed.txt").write_text(packed.digest)


if __name__ == "__main__":
    main()
