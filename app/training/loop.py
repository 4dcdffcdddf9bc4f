"""The loop of one training worker: batches in, steps, reports out. It knows DeepSpeed and nothing of Ray.

It runs wherever torch.distributed is set up: under Ray Train, or under torchrun.
"""

import itertools
import logging
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy

from app.config import TrainingConfig
from app.training import checkpoint
from app.training.checkpoint import Position
from app.training.deepspeed_config import deepspeed_config, learning_rate
from app.training.packing import NOT_LEARNED, tokens_in

logger = logging.getLogger(__name__)

# Axes: B blocks of a micro batch, T tokens of a block, V vocabulary, L learned positions
Batch = dict[str, np.ndarray]
Batches = Callable[[int], Iterator[Batch]]
"""The batches of this worker in an epoch: always the same ones in the same order, as many on every worker."""


@dataclass(frozen=True)
class Hooks:
    """What the loop tells its surroundings."""

    report: Callable[[dict[str, float], Path | None], None]
    """On every worker, with its part of a checkpoint if one is kept; the folder is gone afterwards."""
    step: Callable[[dict[str, float]], None]
    """On worker 0, after each step."""


def run(
    model: Any,
    tokenizer: Any,
    training: TrainingConfig,
    batches: Batches,
    validation: Batch,
    hooks: Hooks,
    resume: Path | None = None,
    checkpoints: bool = True,
) -> None:
    """Train to `training.max_steps`, on every worker at once, from a checkpoint if there is one."""
    engine = start_engine(model, training)
    position = checkpoint.restore(engine, resume) if resume else Position()
    stream = _micro_batches(batches, position)
    meter = _Meter(position)
    while position.step < training.max_steps:
        rate = learning_rate(position.step, training)
        # Models with dropout draw the same masks when a step is done again after a restart.
        torch.manual_seed(_seed(training.seed, position.step, dist.get_rank()))
        _set_rates(engine, rate, training)
        loss, place, tokens = _step(engine, stream, training.gradient_accumulation_steps)
        epoch, batch = place
        position = replace(position, step=position.step + 1, epoch=epoch, batch=batch)
        meter.add(loss, tokens)
        if dist.get_rank() == 0:
            hooks.step({"step": position.step, "loss": loss, "learning_rate": rate, **meter.rate()})
        if position.step % training.report_every_steps == 0 or position.step == training.max_steps:
            position, metrics = _judge(engine, training, validation, position, meter)
            if checkpoints:
                with tempfile.TemporaryDirectory() as folder:
                    checkpoint.save(engine, tokenizer, Path(folder), position, metrics)
                    hooks.report(metrics, Path(folder))
            else:
                hooks.report(metrics, None)
            meter = _Meter(position)


def start_engine(model: Any, training: TrainingConfig) -> Any:
    """A DeepSpeed engine around the model."""
    deepspeed = import_deepspeed()
    decayed = [weight for weight in model.parameters() if weight.ndim > 1]
    plain = [weight for weight in model.parameters() if weight.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=[group for group in groups if group["params"]],
        config=deepspeed_config(training),
    )
    return engine


def import_deepspeed() -> Any:
    """DeepSpeed, without what a worker has no use for."""
    import os
    import sys

    if not torch.cuda.is_available():
        # Muon is compiled by TorchInductor on first use: 17 s on a CPU, and no faster for it (DeepSpeed 0.19).
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    # Its autotuner imports MLflow if that is there: 2 s a worker for nothing (DeepSpeed 0.19).
    hidden = sys.modules.get("mlflow")
    sys.modules["mlflow"] = None  # type: ignore[assignment]
    try:
        import deepspeed
    finally:
        del sys.modules["mlflow"]
        if hidden is not None:
            sys.modules["mlflow"] = hidden
    # Compiled on first use on a CPU (45 s and a g++), and then used for inference only (DeepSpeed 0.19).
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def validation_loss(engine: Any, blocks: Batch, micro_batch_size: int) -> float:
    """Mean negative log-likelihood of a learned token, over the blocks of all workers together."""
    rank, workers = dist.get_rank(), dist.get_world_size()
    total = torch.zeros(2, dtype=torch.float64, device=engine.device)
    engine.eval()
    with torch.no_grad():
        for batch in _shares(blocks, rank, workers, micro_batch_size):
            logits_LV, targets_L = _learned(engine, batch)
            total[0] += cross_entropy(logits_LV.float(), targets_L, reduction="sum").double()
            total[1] += len(targets_L)
    engine.train()
    dist.all_reduce(total)
    return float(total[0] / total[1])


def _set_rates(engine: Any, rate: float, training: TrainingConfig) -> None:
    """Give AdamW's parameters their learning rate, and Muon's the one at the same place of its own schedule."""
    muon_rate = rate * training.muon_learning_rate / training.learning_rate
    for group in engine.optimizer.param_groups:
        group["lr"] = muon_rate if group.get("use_muon") else rate


def _step(
    engine: Any, stream: Iterator[tuple[tuple[int, int], Batch]], micro_batches: int
) -> tuple[float, tuple[int, int], int]:
    """One optimizer step: its loss, the place in the data after it, the tokens it read."""
    losses, tokens = 0.0, 0
    place = (0, 0)
    for after, batch in itertools.islice(stream, micro_batches):
        place = after
        logits_LV, targets_L = _learned(engine, batch)
        loss = cross_entropy(logits_LV.float(), targets_L, reduction="sum") / max(1, len(targets_L))
        engine.backward(loss)
        engine.step()
        losses += float(loss.detach())
        tokens += tokens_in(batch["position_ids"])
    return losses / micro_batches, place, tokens


def _learned(engine: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits where something is learned, and what is to be predicted there."""
    input_ids_BT, position_ids_BT, labels_BT = (
        torch.from_numpy(np.ascontiguousarray(batch[name])).long().to(engine.device)
        for name in ("input_ids", "position_ids", "labels")
    )
    logits_BTV = engine(input_ids=input_ids_BT, position_ids=position_ids_BT, use_cache=False).logits
    next_BT = labels_BT[:, 1:]
    learned_BT = next_BT != NOT_LEARNED
    return logits_BTV[:, :-1][learned_BT], next_BT[learned_BT]


def _seed(*parts: int) -> int:
    """A seed of its own for each combination of numbers; the same in every process."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def _micro_batches(batches: Batches, position: Position) -> Iterator[tuple[tuple[int, int], Batch]]:
    """Epoch after epoch from a position on: the place after each batch, and the batch."""
    for epoch in itertools.count(position.epoch):
        done = position.batch if epoch == position.epoch else 0
        for index, batch in enumerate(batches(epoch)):
            if index >= done:
                yield (epoch, index + 1), batch


def _shares(blocks: Batch, rank: int, workers: int, micro_batch_size: int) -> Iterator[Batch]:
    """This worker's batches of the blocks. All workers get as many, since ZeRO-3 computes in step."""
    count = len(blocks["labels"])
    share = math.ceil(count / workers)
    for start in range(0, share, micro_batch_size):
        mine = np.arange(start, min(start + micro_batch_size, share)) * workers + rank
        batch = {name: column[np.minimum(mine, count - 1)] for name, column in blocks.items()}
        batch["labels"] = np.where((mine < count)[:, None], batch["labels"], NOT_LEARNED)
        yield batch


class _Meter:
    """Losses and tokens since the last report."""

    def __init__(self, position: Position) -> None:
        self.position = position
        self.losses: list[float] = []
        self.tokens = 0
        self._started_s = time.monotonic()

    def add(self, loss: float, tokens: int) -> None:
        """Count one step."""
        self.losses.append(loss)
        self.tokens += tokens

    def rate(self) -> dict[str, float]:
        """Tokens a second, taking the other workers to be as fast."""
        seconds = time.monotonic() - self._started_s
        return {"tokens_per_s": self.tokens * dist.get_world_size() / max(1e-9, seconds)}

    def total(self, engine: Any) -> tuple[float, int, float]:
        """Mean training loss and tokens of all workers, and this worker's seconds."""
        seconds = time.monotonic() - self._started_s
        sums = torch.tensor([sum(self.losses), len(self.losses), self.tokens], dtype=torch.float64)
        sums = sums.to(engine.device)
        dist.all_reduce(sums)
        return float(sums[0] / sums[1]), int(sums[2]), seconds


def _judge(
    engine: Any, training: TrainingConfig, validation: Batch, position: Position, meter: _Meter
) -> tuple[Position, dict[str, float]]:
    """The position with what was done since the last report, and the metrics to report."""
    training_loss, tokens, seconds = meter.total(engine)
    position = replace(position, tokens=position.tokens + tokens, seconds=position.seconds + seconds)
    loss = validation_loss(engine, validation, training.micro_batch_size)
    return position, {
        "step": position.step,
        "training_loss": training_loss,
        "validation_loss": loss,
        "perplexity": math.exp(min(loss, 100.0)),
        "tokens": position.tokens,
        "tokens_per_s": position.tokens / max(1e-9, position.seconds),
        "learning_rate": learning_rate(position.step - 1, training),
    }
