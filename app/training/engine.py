"""The DeepSpeed engine around a model, with all that the settings ask of the model before it is wrapped."""

from typing import Any

import torch

from app.errors import StageFailed
from app.settings.training import TrainingConfig
from app.training import attention, loss, parallel
from app.training.deepspeed_config import deepspeed_config

ATTENTION = {"flex": "flex_attention", "flash": "flash_attention_2"}
"""What transformers calls them."""


def start_engine(model: Any, training: TrainingConfig) -> Any:
    """A DeepSpeed engine around the model.

    Raises:
        ModelError: The model cannot be trained with these settings.
        StageFailed: The node lacks what they need.
    """
    deepspeed = import_deepspeed(training.compile)
    loss.check(model)
    if training.offload_parameters == "nvme":
        from deepspeed.ops.op_builder import AsyncIOBuilder

        if not AsyncIOBuilder().is_compatible(verbose=False):
            raise StageFailed(
                "training.offload_parameters=nvme needs libaio and its headers, which are not on this node",
                "install libaio-dev, or set training.offload_parameters=cpu",
            )
    if training.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if training.attention in ("auto", "varlen") and training.sequence_parallel_size == 1:
        attention.use(model, training)
    if training.attention in ATTENTION:
        try:
            model.set_attn_implementation(ATTENTION[training.attention])
        except ImportError as error:
            raise StageFailed(
                f"training.attention={training.attention} cannot be had on this node ({error})",
                "install what it needs, or set training.attention=auto",
            ) from error
    mpu = parallel.share_blocks(model, training) if training.sequence_parallel_size > 1 else None
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    decayed = [weight for weight in trained if weight.ndim > 1]
    plain = [weight for weight in trained if weight.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=[group for group in groups if group["params"]],
        config=deepspeed_config(training, [weight.numel() for weight in model.parameters()]),
        mpu=mpu,
    )
    if hasattr(engine.optimizer, "fp32_groups"):
        _forget_first_update(engine.optimizer)
    if training.compile:
        engine.compile()
    return engine


def _forget_first_update(optimizer: Any) -> None:
    """Undo the step without gradients by which DeepSpeed 0.19's optimizer of bf16 in stage 0 makes its state: Adam
    counts it, so that the first real ones would be a quarter shorter, and it decays the weights."""
    optimizer.state.clear()  # and is made again at the first step
    for kept, computed in zip(optimizer.fp32_groups, optimizer.fp16_groups, strict=True):
        for weight, value in zip(kept, computed, strict=True):
            weight.data.copy_(value.data)


def import_deepspeed(compiles: bool = False) -> Any:
    """DeepSpeed, without what a worker has no use for."""
    import os
    import sys

    if not (compiles or torch.cuda.is_available()):
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
