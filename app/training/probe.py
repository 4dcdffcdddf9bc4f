"""A few real steps on the workers that a run would have, on made-up tokens, to learn how fast it will be."""

import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from app.errors import RayloopError, StageFailed
from app.settings.training import TrainingConfig
from app.training.worker import start_model, use_threads

ROOM_TIMEOUT_S = 20.0
"""How long is waited for room on the cluster."""
LEFT_OUT_STEPS = 2
"""Before those that are measured: memory is taken, kernels are chosen."""


@dataclass(frozen=True)
class Speed:
    """What the steps of a probe took."""

    start_s: float
    step_s: float
    validation_s: float
    """Of one round of micro batches, one a worker."""
    memory_bytes: int
    """The most of any worker."""


class Workers:
    """The workers of a run, reserved for as long as the context lasts.

    Raises:
        TimeoutError: On entering, when the cluster has no room for them now.
    """

    def __init__(self, training: TrainingConfig) -> None:
        self._training = training
        self._bundle = {"CPU": training.cpus_per_worker, **({"GPU": 1.0} if training.use_gpu else {})}

    def __enter__(self) -> "Workers":
        self._began_s = time.monotonic()
        self._group = placement_group([self._bundle] * self._training.max_workers, strategy="PACK")
        if not self._group.wait(ROOM_TIMEOUT_S):
            remove_placement_group(self._group)
            raise TimeoutError(f"no room for {self._training.max_workers} workers within {ROOM_TIMEOUT_S:g} s")
        self._actors = [self._start(place) for place in range(self._training.max_workers)]
        return self

    def __exit__(self, *_: object) -> None:
        remove_placement_group(self._group)  # its actors end with it

    def _start(self, place: int) -> Any:
        where = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=place)
        options = {"num_cpus": self._bundle["CPU"], "num_gpus": self._bundle.get("GPU", 0)}
        return ray.remote(_Worker).options(scheduling_strategy=where, **options).remote()

    def available_bytes(self) -> int:
        """Memory that is free for each worker, where it is scarcest."""
        found: list[tuple[str, int]] = ray.get([actor.room.remote(self._training.use_gpu) for actor in self._actors])
        nodes = [node for node, _ in found]
        return min(available // (1 if self._training.use_gpu else nodes.count(node)) for node, available in found)

    def speed(self, tokenizer: Any, steps: int) -> Speed:
        """Train for some steps and validate once; what is learned is thrown away.

        Raises:
            RayloopError: What a worker met.
        """
        address = ray.get(self._actors[0].address.remote())
        workers = len(self._actors)
        measured = [
            actor.train.remote(self._training, tokenizer, steps, rank, workers, address)
            for rank, actor in enumerate(self._actors)
        ]
        try:
            found = ray.get(measured)
        except RayError as error:
            cause = getattr(error, "cause", error)
            if isinstance(cause, RayloopError):
                raise cause from error
            raise StageFailed(
                f"the steps of the probe failed ({type(cause).__name__}: {str(cause).strip().splitlines()[-1]})",
                "see the workers' log, or set training.probe_steps=0 to plan without them",
            ) from error
        step_times_s, validation_s, _ = found[0]
        step_s = float(np.median(step_times_s[LEFT_OUT_STEPS:]))
        spent_s = time.monotonic() - self._began_s
        return Speed(
            start_s=max(0.0, spent_s - sum(step_times_s) - validation_s),
            step_s=step_s,
            validation_s=validation_s,
            memory_bytes=max(memory_bytes for _, _, memory_bytes in found),
        )


def free_bytes(cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory that may still be taken here: of the machine's, and of what a container may have of it."""
    import psutil

    found = int(psutil.virtual_memory().available)
    # Of version 2 and 1; the page cache counts as used there, and what was not read lately is given up first.
    for folder, limit, used in (
        (cgroups, "memory.max", "memory.current"),
        (cgroups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            left = int((folder / limit).read_text()) - int((folder / used).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # none, or without a limit
            continue
        found = min(found, left + int(stat.get("total_inactive_file", stat.get("inactive_file", 0))))
    return found


class _Worker:
    """One of them."""

    def room(self, use_gpu: bool) -> tuple[str, int]:
        """The node, and the memory that is free there."""
        node = ray.get_runtime_context().get_node_id()
        if use_gpu:
            import torch

            return node, int(torch.cuda.mem_get_info()[0])
        return node, free_bytes()

    def address(self) -> str:
        """Where the workers may meet."""
        with socket.socket() as free:
            free.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"

    def train(
        self, training: TrainingConfig, tokenizer: Any, steps: int, rank: int, workers: int, address: str
    ) -> tuple[list[float], float, int]:
        """Seconds of each step, of a validation, and the most memory."""
        import torch.distributed as dist

        host, port = address.rsplit(":", 1)
        # DeepSpeed looks for these whether or not the group is there.
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(workers)}
        os.environ |= {"MASTER_ADDR": host, "MASTER_PORT": port}
        use_threads(training)
        from app.training import loop, utilisation
        from app.training.data import Sequence

        backend = "nccl" if training.use_gpu else "gloo"
        dist.init_process_group(backend, init_method=f"tcp://{address}", rank=rank, world_size=workers)
        last = LEFT_OUT_STEPS + steps
        few = training.model_copy(update={"max_steps": last, "report_every_steps": last, "on_bad_loss": "skip"})
        blocks = _made_up(len(tokenizer), training.block_tokens, few.blocks_per_step)
        groups = workers // training.workers_per_batch
        validation = {name: column[: training.micro_batch_size * groups] for name, column in blocks.items()}
        model = start_model(training, tokenizer)
        step_times_s: list[float] = []
        ends_s = [0.0, 0.0]

        def step(values: dict[str, float]) -> None:
            step_times_s.append(values["step_s"])
            ends_s[0] = time.monotonic()

        def report(metrics: dict[str, float], part: Any) -> None:
            ends_s[1] = time.monotonic()

        take = Sequence(blocks, training.seed).take
        loop.run(model, tokenizer, few, take, validation, loop.Hooks(report, step), checkpoints=False)
        device = next(model.parameters()).device
        memory_bytes = utilisation.memory_bytes(device)
        dist.destroy_process_group()
        return step_times_s, ends_s[1] - ends_s[0], memory_bytes


def _made_up(words: int, block_tokens: int, blocks: int) -> dict[str, np.ndarray]:
    """Blocks of random tokens, two conversations in each; every token is learned."""
    ids = np.random.default_rng(0).integers(0, words, (blocks, block_tokens), dtype=np.int32)
    positions = np.tile(np.arange(block_tokens, dtype=np.int32) % (block_tokens // 2 + 1), (blocks, 1))
    return {"input_ids": ids, "position_ids": positions, "labels": ids}
