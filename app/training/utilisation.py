"""How much of the machine a worker uses: its floating-point operations against a matrix product's, and its memory."""

import resource
import time
from typing import Any

import torch
import torch.distributed as dist

from app.settings.training import TrainingConfig

PROBE_SIDE_CPU, PROBE_SIDE_GPU = 768, 8_192
"""Side of the square matrices of the probe: large enough that more of them would be no faster."""
PROBES = 5


class Utilisation:
    """A worker's figures of its use of the machine, for each step."""

    def __init__(self, engine: Any, training: TrainingConfig) -> None:
        self._device = engine.device
        dtype = next(engine.module.parameters()).dtype
        peak = matmul_peak_flops(self._device, dtype) * dist.get_world_size()
        # With tensor parallelism a worker sees its part of each matrix.
        needed = flops_per_token(engine.module, training.block_tokens) * training.tensor_parallel_size
        self._peak_tokens_per_s = peak / needed

    def figures(self, tokens_per_s: float) -> dict[str, float]:
        """mfu, the share of all workers' peak that so many tokens a second are, and memory_bytes of this one."""
        return {"mfu": tokens_per_s / self._peak_tokens_per_s, "memory_bytes": memory_bytes(self._device)}


def flops_per_token(model: Any, block_tokens: int) -> float:
    """Floating-point operations of a forward and a backward pass for one token of a block.

    Two for each weight that is multiplied with in the forward pass and in the gradient of the inputs, two more in the
    gradient of a weight that is trained; and 12 x layers x width x block_tokens for attention, as if it were not
    causal. Source: Chowdhery et al. 2022, PaLM, appendix B.
    """
    config = model.config
    # The embedding is looked up, unless the output layer multiplies with the same weights.
    embedding = model.get_input_embeddings().weight
    looked_up = 0 if model.get_output_embeddings() is None or _tied(model) else _count(embedding)
    # One that ZeRO-3 has spread over the workers is an empty vector here.
    weights = [weight for weight in model.parameters() if len(getattr(weight, "ds_shape", weight.shape)) > 1]
    multiplied = sum(_count(weight) for weight in weights) - looked_up
    trained = sum(_count(weight) for weight in weights if weight.requires_grad) - looked_up * embedding.requires_grad
    attention = 12 * config.num_hidden_layers * config.hidden_size * block_tokens
    return float(4 * multiplied + 2 * trained + attention)


def matmul_peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a square matrix product here, the fastest of a few; with the threads that
    this process may use."""
    side = PROBE_SIDE_GPU if device.type == "cuda" else PROBE_SIDE_CPU
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    fastest_s = float("inf")
    for _ in range(PROBES + 1):
        _finish(device)
        started_s = time.perf_counter()
        torch.matmul(left, right)
        _finish(device)
        fastest_s = min(fastest_s, time.perf_counter() - started_s)
    return 2 * side**3 / fastest_s


def memory_bytes(device: torch.device) -> int:
    """The most that this worker has held so far: of the GPU's memory, on a CPU of the machine's."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _tied(model: Any) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def _count(weight: Any) -> int:
    """Elements of a weight, also of one that ZeRO-3 has spread over the workers."""
    return int(getattr(weight, "ds_numel", weight.numel()))


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
