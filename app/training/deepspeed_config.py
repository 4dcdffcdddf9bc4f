"""The DeepSpeed engine's configuration, from ours."""

import math
from collections.abc import Sequence
from typing import Any

from app.settings.training import TrainingConfig

ADAM_BETAS = (0.9, 0.95)
MUON_MOMENTUM = 0.95
"""Jordan et al. 2024, Muon: An optimizer for hidden layers in neural networks."""
MOST_REDUCED, MOST_KEPT_WHOLE = 500_000_000, 100_000
"""DeepSpeed's own bucket of gradients, and its largest parameter that stage 3 does not share out; elements."""


def deepspeed_config(training: TrainingConfig, sizes: Sequence[int] = ()) -> dict[str, Any]:
    """What `deepspeed.initialize(config=...)` takes, for a model whose parameters have so many elements each.

    The learning rate stands for the peak; the loop sets that of each step.
    """
    return {
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        "gradient_clipping": _gradient_clipping(training),
        "optimizer": _optimizer(training),
        "bf16": {"enabled": training.precision == "bf16"},
        "zero_optimization": {
            "stage": training.zero_stage,
            # Muon needs whole matrices (DeepSpeed refuses the two together in stage 3).
            "reduce_scatter": training.optimizer != "muon",
            "contiguous_gradients": True,
            # Nothing to hide communication behind on a CPU, and gloo has no streams.
            "overlap_comm": training.use_gpu,
            **_buffers(sizes),
            **_offload(training),
        },
        **_parallel(training),
        "zero_allow_untested_optimizer": True,
        "steps_per_print": math.inf,
        "wall_clock_breakdown": False,
    }


def _buffers(sizes: Sequence[int]) -> dict[str, int]:
    """Buffers no larger than the model asks for: by default stage 3 makes one of a gigabyte for the smallest."""
    if not sizes:
        return {}
    whole = sum(sizes)
    return {
        "reduce_bucket_size": max(max(sizes), min(MOST_REDUCED, whole // 16)),
        # Parameters that every worker keeps whole; together they are next to nothing.
        "stage3_param_persistence_threshold": min(MOST_KEPT_WHOLE, whole // 100),
    }


def _offload(training: TrainingConfig) -> dict[str, Any]:
    """What ZeRO keeps outside of the accelerator's memory."""
    places = {"offload_optimizer": training.offload_optimizer, "offload_param": training.offload_parameters}
    return {
        name: {"device": place, "pin_memory": training.use_gpu}
        | ({"nvme_path": training.nvme_path} if place == "nvme" else {})
        for name, place in places.items()
        if place != "none"
    }


def _parallel(training: TrainingConfig) -> dict[str, Any]:
    """What DeepSpeed has to know of workers that compute one batch together."""
    if training.tensor_parallel_size > 1:
        # The head stays whole on each worker: the loss needs all logits of a token.
        return {
            "tensor_parallel": {
                "autotp_size": training.tensor_parallel_size,
                "vocab_parallel_lm_head": False,
            }
        }
    if training.sequence_parallel_size > 1:
        return {"sequence_parallel_size": training.sequence_parallel_size}
    return {}


def _gradient_clipping(training: TrainingConfig) -> float:
    """The largest gradient norm; 0 for none.

    Under ZeRO, Muon's orthogonalised update takes the gradient's place before DeepSpeed 0.19 clips, which would
    shrink every step by its norm, tens of times. Muon's step does not depend on the gradient's norm anyway.
    """
    return 0.0 if training.optimizer == "muon" else training.gradient_clipping


def _optimizer(training: TrainingConfig) -> dict[str, Any]:
    """DeepSpeed's `optimizer` section."""
    adam = {
        "betas": list(ADAM_BETAS),
        "weight_decay": training.weight_decay,
        # DeepSpeed's is compiled on first use and needs nvcc or g++.
        "torch_adam": training.adam_kernel != "deepspeed",
        **({"fused": True} if training.adam_kernel == "fused" else {}),
    }
    if training.optimizer == "adamw":
        return {"type": "AdamW", "params": {"lr": training.learning_rate, **adam}}
    rates = {"lr": training.muon_learning_rate, "adam_lr": training.learning_rate}
    # On a CPU the iteration runs in bf16, which the "gram" form is not stable in.
    method = "gram" if training.use_gpu else "standard"
    return {"type": "Muon", "params": {**rates, "momentum": MUON_MOMENTUM, "ns_method": method, **adam}}


def learning_rate(step: int, training: TrainingConfig) -> float:
    """The rate of step `step`, from 0: a linear rise over the warm-up, then a cosine down to the floor.

    Source: Loshchilov & Hutter 2017, SGDR, equation 5, without restarts.
    """
    warmup_steps = max(1, round(training.warmup_fraction * training.max_steps))
    if step < warmup_steps:
        return training.learning_rate * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, training.max_steps - warmup_steps)
    floor = training.min_learning_rate_fraction
    return training.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))
