"""`training.lora` and `training.dpo`: a base model adapted without changing its weights, and preference tuning."""

from typing import Annotated

from pydantic import Field

from app.settings.section import Count, Positive, Section


class LoraConfig(Section):
    """Low-rank adapters (Hu et al. 2021, LoRA): read where `training.method` is lora."""

    rank: Count = 16
    """Inner dimension of an adapter; its bytes grow with it."""
    alpha: Positive = 32.0
    """An adapter's output is scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of an adapter's inputs that is dropped in training."""
    target_modules: tuple[str, ...] = ()
    """Names of the layers that are adapted, such as q_proj; none: all linear layers but the output layer."""
    load_in_8bit: bool = False
    """Keep the frozen base in memory as int8 (bitsandbytes), adapters in `training.precision`, as in QLoRA."""


class DpoConfig(Section):
    """Direct preference optimisation (Rafailov et al. 2023): read where `training.objective` is dpo."""

    beta: Positive = 0.1
    """How strongly the model is held to the base model: the smaller, the further it may go from it."""
    sources: tuple[Annotated[str, Field(min_length=1)], ...] = ("traffic:",)
    """Where preference pairs come from. traffic: are answers of the product to the same question, one rated up, one
    rated down; else a .jsonl or .parquet file, or a folder of them, local or remote, with prompt, chosen, rejected."""
