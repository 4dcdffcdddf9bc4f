"""The loop of one training worker: batches in, steps, reports out. It knows DeepSpeed and nothing of Ray.

It runs wherever torch.distributed is set up: under Ray Train, or under torchrun and deepspeed (standalone.py).
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from app.errors import StageFailed
from app.settings.training import TrainingConfig
from app.training import bad_losses, checkpoint, dpo, loss
from app.training.bad_losses import Losses
from app.training.checkpoint import Position, Score, Snapshot
from app.training.deepspeed_config import learning_rate
from app.training.engine import start_engine
from app.training.packing import NOT_LEARNED, tokens_in
from app.training.parallel import Batch, Group
from app.training.utilisation import Utilisation

Take = Callable[[int, int], Batch]
"""The blocks of a run's sequence from a place on, so many: the same ones on every worker, and without end."""

NOTICE_INTERVAL_S = 5.0
"""About the seconds between two looks at whether a worker's node is about to go, which take some milliseconds."""


@dataclass(frozen=True)
class Hooks:
    """What the loop tells its surroundings, and asks them."""

    report: Callable[[dict[str, float], Snapshot | None], None]
    """On every worker, with its part of a checkpoint if one is kept, which may be written later on."""
    step: Callable[[dict[str, float]], None]
    """On worker 0, after each step."""
    bad_loss: Callable[[dict[str, Any]], None] = lambda event: None
    """On worker 0, when a loss is bad: {step, loss, action}."""
    newest: Callable[[], AbstractContextManager[Path | None]] = nullcontext
    """On every worker at once: the newest whole checkpoint of this run."""
    preempted: Callable[[], bool] = lambda: False
    """On every worker at once: whether the node of any of them is about to go."""


def run(
    model: Any,
    tokenizer: Any,
    training: TrainingConfig,
    take: Take,
    validation: Batch,
    hooks: Hooks,
    resume: Path | None = None,
    checkpoints: bool = True,
    preferences: Batch | None = None,
) -> None:
    """Train to `training.max_steps`, on every worker at once, from a checkpoint if there is one.

    `preferences` are the held-out pairs of `training.objective` dpo, whose batches are those of app/training/dpo.py.

    Raises:
        StageFailed: The loss is bad, and it is to be met by stopping, or cannot be met otherwise. Raised by all
            workers alike.
    """
    begun = checkpoint.state(resume) if resume else None
    blocks_per_step = begun["blocks_per_step"] if begun else training.blocks_per_step
    training = on_so_many_workers(training, blocks_per_step, Group.of(training).groups)
    engine = start_engine(model, training)
    computed = Computed(engine, training)
    position = checkpoint.restore(engine, resume) if resume else Position()
    stream = Stream(take, training, position.blocks)
    losses = Losses(training, begun.get("losses") if begun else None)
    notice = _Notice(hooks, position.step, engine.device)
    meter = _Meter(position)
    usage = Utilisation(engine, training) if dist.get_rank() == 0 else None
    while position.step < training.max_steps:
        rate = learning_rate(position.step, training)
        # Models with dropout draw the same masks when a step is done again after a restart.
        torch.manual_seed(_seed(training.seed, position.step, dist.get_rank()))
        rates = _set_rates(engine, rate, training)
        began = stream.next_step(losses.left_out)
        done = computed.step(stream, training.gradient_accumulation_steps, losses.is_good)
        if not losses.is_good(done.loss):
            if dist.get_rank() == 0:
                hooks.bad_loss({"step": position.step + 1, "loss": done.loss, "action": training.on_bad_loss})
            losses.meet(done.loss, position.step + 1, began)
            if training.on_bad_loss == "roll_back":
                position = _rolled_back(engine, hooks, losses, done.loss, position.step + 1)
                stream = Stream(take, training, position.blocks)
                meter = _Meter(position)
                continue
        else:
            losses.add(done.loss)
            meter.add(done)
        position = replace(position, step=position.step + 1, blocks=stream.place)
        if usage is not None:
            speed = meter.rate()
            values = {
                "loss": done.loss,
                **rates,
                **_gradient_norm(engine, training),
                "step_s": meter.lap_s(),
            }
            hooks.step({"step": position.step, **values, **speed, **usage.figures(speed["tokens_per_s"])})
        ends = position.step == training.max_steps
        if notice.came(position.step) or ends or position.step % training.report_every_steps == 0:
            position, metrics = _judge(computed, training, validation, position, meter)
            if preferences is not None:
                shares = _shares(preferences, dist.get_rank(), dist.get_world_size(), training.micro_batch_size)
                metrics |= dpo.validate(engine, shares, training.dpo.beta)
            part = None
            if checkpoints and math.isfinite(metrics["validation_loss"]):
                few = {name: column[: checkpoint.SCORED_BLOCKS] for name, column in validation.items()}
                score = Score(few, math.exp(computed.validation_loss(few, training.micro_batch_size)))
                about = {"blocks_per_step": blocks_per_step, "losses": losses.state()}
                part = checkpoint.snapshot(engine, tokenizer, position, about, metrics, score)
            elif ends and checkpoints:
                raise StageFailed("the validation loss at the end is not finite", bad_losses.LOWER)
            hooks.report(metrics, part)
            meter = _Meter(position)


def on_so_many_workers(training: TrainingConfig, blocks_per_step: int, groups: int) -> TrainingConfig:
    """The settings with which so many workers, or groups of those that compute a batch together, learn from so many
    blocks a step.

    Raises:
        StageFailed: There is not a block for each.
    """
    if blocks_per_step < groups:
        raise StageFailed(
            f"a step of this run learns from {blocks_per_step} blocks, which {groups} workers cannot share",
            f"go on with {blocks_per_step} workers at most (training.num_workers)",
        )
    accumulation = math.ceil(blocks_per_step / (training.micro_batch_size * groups))
    update = {"gradient_accumulation_steps": accumulation, "global_batch_size": blocks_per_step}
    return training.model_copy(update=update)


@dataclass(frozen=True)
class Done:
    """What a step did."""

    loss: float
    """Mean over all that was learned, by all workers."""
    tokens: int
    """That all workers read, without padding."""
    waited_s: float
    """For data, in seconds."""


class Computed:
    """An engine and the loss it computes, together with the other workers of its group."""

    def __init__(self, engine: Any, training: TrainingConfig) -> None:
        self.engine = engine
        self.group = Group.of(training)
        self._beta = training.dpo.beta if training.objective == "dpo" else None
        self._head = loss.Head(engine.module, training.logits_tokens)
        # DeepSpeed 0.19 adds up the gradients of a group's parts of the blocks, yet takes their mean where it scatters
        # them under ZeRO 3.
        takes_mean = engine.zero_optimization_stage() == 3 and engine.zero_reduce_scatter()
        self._parts = self.group.size if self.group.splits_blocks and takes_mean else 1
        # ZeRO does so by itself, and in bf16 DeepSpeed's own optimizer.
        self._looks_at_gradients = not hasattr(engine.optimizer, "overflow")

    def step(self, stream: Iterator[Batch], micro_batches: int, good: Callable[[float], bool]) -> Done:
        """One optimizer step, unless its loss is not good.

        Every learned token or preference pair of a step counts as much, whichever micro batch and worker it is in.
        Where the loss is a number and its gradient is none, no step is taken either: that loss is then nan.
        """
        losses = torch.zeros((), dtype=torch.float64, device=self.engine.device)
        began_s = time.monotonic()
        batches = [next(stream) for _ in range(micro_batches)]
        waited_s = time.monotonic() - began_s
        share, tokens = self._counted(batches)
        for left, batch in zip(range(micro_batches - 1, -1, -1), batches, strict=True):
            mean = self._mean_loss(batch, share)
            self.engine.backward(mean * self._parts)
            losses += mean.detach()
            if left:
                self.engine.step()
        dist.all_reduce(losses)
        copies = 1 if self.group.splits_blocks else self.group.size
        found = float(losses) / micro_batches / self.group.groups / copies
        if not good(found):
            _discard(self.engine)
        elif self._looks_at_gradients and not _are_finite(self.engine.module):
            _discard(self.engine)
            found = math.nan
        else:
            self.engine.step()
            found = math.nan if getattr(self.engine.optimizer, "overflow", False) else found
        return Done(found, tokens, waited_s)

    def _counted(self, batches: list[Batch]) -> tuple[float, int]:
        """What the sum over a micro batch's tokens, or pairs, is multiplied with, so that the mean over micro batches
        and groups, which DeepSpeed takes, is the mean over all of the step; and the step's tokens."""
        if self._beta is None:
            learned = sum(int((batch["labels"][:, 1:] != NOT_LEARNED).sum()) for batch in batches)
        else:
            learned = sum(dpo.pairs_in(batch) for batch in batches)
        tokens = sum(tokens_in(batch["position_ids"]) for batch in batches)
        counted = torch.tensor([learned, tokens], dtype=torch.float64, device=self.engine.device)
        dist.all_reduce(counted)  # in which each worker of a group counts all of its blocks
        share = len(batches) * self.group.groups * self.group.size / max(1.0, float(counted[0]))
        return share, int(counted[1]) // self.group.size

    def _mean_loss(self, batch: Batch, share: float) -> torch.Tensor:
        """This worker's part of a micro batch's loss: see `step`."""
        if self._beta is not None:
            return dpo.loss(self.engine, batch, self._beta) * share
        return self.loss(batch)[0] * share

    def loss(self, batch: Batch) -> tuple[torch.Tensor, int]:
        """This worker's part of the sum over the learned tokens of a batch, and how many there are in all of it."""
        inputs = self.group.inputs(batch, self.engine.device)
        total = self._head.loss(
            self.engine, inputs.targets, input_ids=inputs.input_ids, position_ids=inputs.position_ids
        )
        return total, inputs.learned

    def validation_loss(self, blocks: Batch, micro_batch_size: int) -> float:
        """Mean negative log-likelihood of a learned token, over the blocks of all workers together."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.engine.device)
        self.engine.eval()
        with torch.no_grad():
            for batch in _shares(blocks, self.group.number, self.group.groups, micro_batch_size):
                total, learned = self.loss(batch)
                sums[0] += total.double() * (self.group.size if self.group.splits_blocks else 1)
                sums[1] += learned
        self.engine.train()
        dist.all_reduce(sums)  # a group's sums count as often as it has workers, in both
        return float(sums[0] / sums[1])


def _are_finite(model: Any) -> bool:
    """Whether all gradients are numbers; the same on every worker, since they have been averaged."""
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    return bool(torch.isfinite(torch.stack(torch._foreach_norm(gradients))).all()) if gradients else True


def _set_rates(engine: Any, rate: float, training: TrainingConfig) -> dict[str, float]:
    """Give AdamW's parameters their learning rate, and Muon's the one at the same place of its own schedule; returns
    both by name."""
    rates = {"learning_rate": rate}
    if training.optimizer == "muon":
        rates["muon_learning_rate"] = rate * training.muon_learning_rate / training.learning_rate
    for group in engine.optimizer.param_groups:
        group["lr"] = rates["muon_learning_rate"] if group.get("use_muon") else rate
    return rates


def _gradient_norm(engine: Any, training: TrainingConfig) -> dict[str, float]:
    """That of the latest step before clipping; nothing where DeepSpeed does not keep it, or with Muon, whose update
    has taken the gradient's place by then."""
    norm = None if training.optimizer == "muon" else engine.get_global_grad_norm()
    return {} if norm is None else {"gradient_norm": float(norm)}


def _discard(engine: Any) -> None:
    """End a step without an update, as DeepSpeed (0.19.8) does when a gradient overflows."""
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer

    def overflows(*_: Any, **__: Any) -> None:
        optimizer.overflow = True

    if stage == 0:  # which keeps its gradients in the weights, where they are cleared after the optimizer's step
        instead: dict[str, Any] = {"step": lambda *_, **__: None}
    elif stage == 3:
        instead = {"_overflow_check_and_loss_scale_update": overflows}
    else:
        instead = {"check_overflow": overflows, "check_grad_overflow": True}
    before = {name: vars(optimizer)[name] for name in instead if name in vars(optimizer)}
    vars(optimizer).update(instead)
    try:
        engine.step()
    finally:
        for name in instead:
            del vars(optimizer)[name]
        vars(optimizer).update(before)


def _rolled_back(engine: Any, hooks: Hooks, losses: Losses, found: float, step: int) -> Position:
    with hooks.newest() as folder:
        if folder is None:
            raise StageFailed(
                f"the loss at step {step} is {found:.4g}: there is no checkpoint to go back to", bad_losses.LOWER
            )
        losses.go_back(checkpoint.state(folder).get("losses"))
        return checkpoint.restore(engine, folder)


def _seed(*parts: int) -> int:
    """A seed of its own for each combination of numbers; the same in every process."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


class Stream(Iterator[Batch]):
    """This worker's micro batches: the workers, or the groups of those that compute one together, take turns along
    the sequence, so that a step's blocks lie together. Where these do not divide, some batches have one block less;
    one that would have none is a block of padding, since all workers compute as many. Groups that split blocks compute
    batches of one size, which are filled up so."""

    def __init__(self, take: Take, training: TrainingConfig, place: int) -> None:
        self._take, self._group, self._step_blocks = take, Group.of(training), training.blocks_per_step
        self._turns = training.gradient_accumulation_steps * self._group.groups
        """That are taken in a step."""
        self._turn = self._group.number
        self._fewest = training.micro_batch_size if self._group.splits_blocks else 1
        self.place = place
        """Where the next step begins, once its micro batches were all taken."""

    def next_step(self, left_out: set[int]) -> int:
        """Where the next step begins, past those that begin at a place to be left out."""
        while self.place in left_out:
            self.place += self._step_blocks
        return self.place

    def __next__(self) -> Batch:
        first, end = (turn * self._step_blocks // self._turns for turn in (self._turn, self._turn + 1))
        batch = self._take(self.place + first, max(self._fewest, end - first))
        for name, padding in (("labels", NOT_LEARNED), ("position_ids", 0)):
            batch[name][end - first :] = padding
        self._turn += self._group.groups
        if self._turn >= self._turns:
            self._turn = self._group.number
            self.place += self._step_blocks
        return batch


class _Notice:
    """Whether it was said that the node of a worker is about to go: asked about every NOTICE_INTERVAL_S, told once."""

    def __init__(self, hooks: Hooks, step: int, device: Any) -> None:
        self._preempted, self._device = hooks.preempted, device
        self._told = False
        self._step = self._next = step + 1
        self._asked_s = time.monotonic()

    def came(self, step: int) -> bool:
        """After a step, on every worker at once."""
        if step < self._next or self._told:
            return False
        step_s = (time.monotonic() - self._asked_s) / max(1, step - self._step)
        # The workers ask together, so one of them says when.
        after = torch.tensor(max(1, round(NOTICE_INTERVAL_S / max(1e-4, step_s))), device=self._device)
        dist.broadcast(after, 0)
        self._step, self._next, self._asked_s = step, step + int(after), time.monotonic()
        self._told = self._preempted()
        return self._told


def _shares(blocks: Batch, number: int, groups: int, micro_batch_size: int) -> Iterator[Batch]:
    """A group's batches of the blocks. All groups get as many, all of one size, since they compute in step."""
    count = len(blocks["labels"])
    for start in range(0, math.ceil(count / groups), micro_batch_size):
        mine = np.arange(start, start + micro_batch_size) * groups + number
        batch = {name: column[np.minimum(mine, count - 1)] for name, column in blocks.items()}
        batch["labels"] = np.where((mine < count)[:, None], batch["labels"], NOT_LEARNED)
        yield batch


class _Meter:
    """Losses and tokens since the last report."""

    def __init__(self, position: Position) -> None:
        self.position = position
        self.losses: list[float] = []
        self.tokens = 0
        self.waited_s = 0.0
        self._started_s = self._lap_s = time.monotonic()

    def lap_s(self) -> float:
        """Seconds since the last call."""
        began_s, self._lap_s = self._lap_s, time.monotonic()
        return self._lap_s - began_s

    def add(self, done: Done) -> None:
        """Count one step."""
        self.losses.append(done.loss)
        self.tokens += done.tokens
        self.waited_s += done.waited_s

    def rate(self) -> dict[str, float]:
        """Tokens a second of all workers; share of the time that this one waited for data."""
        seconds = max(1e-9, time.monotonic() - self._started_s)
        return {"tokens_per_s": self.tokens / seconds, "data_stall_fraction": self.waited_s / seconds}

    def total(self) -> tuple[float, int, float]:
        """Mean training loss and tokens of all workers, and this worker's seconds."""
        loss = statistics.fmean(self.losses) if self.losses else math.nan
        return loss, self.tokens, time.monotonic() - self._started_s


def _judge(
    computed: Computed, training: TrainingConfig, validation: Batch, position: Position, meter: _Meter
) -> tuple[Position, dict[str, float]]:
    """The position with what was done since the last report, and the metrics to report."""
    stall = meter.rate()["data_stall_fraction"]
    training_loss, tokens, seconds = meter.total()
    position = replace(position, tokens=position.tokens + tokens, seconds=position.seconds + seconds)
    found = computed.validation_loss(validation, training.micro_batch_size)
    return position, {
        "step": position.step,
        "training_loss": training_loss,
        "validation_loss": found,
        "perplexity": math.exp(min(found, 100.0)),
        "tokens": position.tokens,
        "tokens_per_s": position.tokens / max(1e-9, position.seconds),
        "learning_rate": learning_rate(position.step - 1, training),
        "data_stall_fraction": stall,
    }
