"""The DeepSpeed engine's configuration, from ours."""

import math
from typing import Any

from app.config import TrainingConfig

ADAM_BETAS = (0.9, 0.95)
MUON_MOMENTUM = 0.95
"""Jordan et al. 2024, Muon: An optimizer for hidden layers in neural networks."""


def deepspeed_config(training: TrainingConfig) -> dict[str, Any]:
    """What `deepspeed.initialize(config=...)` takes.

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
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": math.inf,
        "wall_clock_breakdown": False,
    }


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
        # torch's own: DeepSpeed's is compiled on first use and needs nvcc or g++.
        "torch_adam": True,
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
