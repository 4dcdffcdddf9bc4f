"""Low-rank adapters beside a frozen base model: attached, trained, saved alone, merged.

    model = attach(base, training)            # a peft model; only its adapters are trained
    save(model, tokenizer, folder / "adapter")    # adapter_model.safetensors, adapter_config.json: what peft reads
    merge(training, source, folder / "adapter", target)      # an ordinary model folder

The base is the one that `training.base_model` names, so a checkpoint of an adapted model holds the adapters and not the
base. An int8 base is merged as what its int8 weights stand for, in floating point: adding to int8 weights would round
most of an adapter away, and the adapters were trained beside the dequantised weights.

Source: Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models; Dettmers et al. 2023, QLoRA, section 3.
"""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app import model as models
from app.adapter import CONFIG, FOLDER, WEIGHTS
from app.errors import ModelError, StageFailed
from app.settings.training import TrainingConfig

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_base(training: TrainingConfig, source: str) -> "PreTrainedModel":
    """The base model in evaluation mode and in `training.precision`, its linear layers int8 if that is asked for.

    Raises:
        ModelError: It cannot be loaded, or is to be trained as a whole and is int8.
    """
    import torch

    options: dict[str, Any] = {"dtype": torch.bfloat16 if training.precision == "bf16" else torch.float32}
    if training.method == "full":
        # DeepSpeed turns it into `precision` and keeps these as the weights that the optimizer works on.
        options["dtype"] = torch.float32
    elif training.lora.load_in_8bit and not _is_int8(source):
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
        # The driver, which checks and merges, may be without a GPU.
        on_gpu = training.use_gpu and torch.cuda.is_available()
        options["device_map"] = {"": torch.cuda.current_device() if on_gpu else "cpu"}
    model, _ = models.load(source, **options)
    if getattr(model, "is_loaded_in_8bit", False):
        from app.int8 import prepare_for_adapters

        if training.method == "full":
            raise ModelError(
                f"base model {training.base_model} is int8, and int8 weights cannot be trained",
                "set training.method=lora, or name the version that it was compressed from",
            )
        prepare_for_adapters(model)
    return model


def attach(model: "PreTrainedModel", training: TrainingConfig) -> Any:
    """The model with new adapters beside its layers, all else frozen; it computes what it did before.

    The same `training.seed` makes the same adapters.

    Raises:
        ModelError: The model has no layer of a name in `training.lora.target_modules`.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    lora = training.lora
    settings = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # divided by the rank, so that it may be any number
        lora_dropout=lora.dropout,
        target_modules=list(lora.target_modules) or "all-linear",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        try:
            adapted: Any = get_peft_model(model, settings)
        except ValueError as error:
            if "arget modules" not in str(error):
                raise
            names = {name.rpartition(".")[2] for name, part in model.named_modules() if not list(part.children())}
            raise ModelError(
                f"training.lora.target_modules={list(lora.target_modules)} names no layer of {training.base_model}",
                f"its layers are {', '.join(sorted(names))}",
            ) from error
    adapted.register_state_dict_post_hook(_without_frozen)
    return adapted


def check(training: TrainingConfig, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
    """Refuse a base model that adapters alone cannot turn into a chatbot; attaches them to find out.

    Raises:
        ModelError: It has no chat template, so the tokens of ours would be new to it, or has tokens without
            embeddings; or as `attach`.
    """
    embeddings: Any = model.get_input_embeddings()
    reason = None
    if tokenizer.chat_template is None:
        reason = "has no chat template, and the tokens of another one are new to it"
    elif len(tokenizer) > embeddings.num_embeddings:
        reason = f"has {len(tokenizer)} tokens and {embeddings.num_embeddings} embeddings"
    if reason:
        raise ModelError(
            f"base model {training.base_model} {reason}: adapters do not train embeddings",
            "set training.method=full, or name a model that was trained for chat",
        )
    attach(model, training)


def is_adapted(model: Any) -> bool:
    """Whether a model is one that `attach` made."""
    return hasattr(model, "peft_config")


def save(
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    folder: Path,
    weights: "dict[str, torch.Tensor] | None" = None,
) -> None:
    """Write the adapters and the tokenizer; `weights` stands in for those of the model, which may be spread over
    workers or learn on meanwhile.

    Raises:
        StageFailed: What was written is not what was to be.
    """
    import torch
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    model.save_pretrained(folder, state_dict=weights, save_embedding_layers=False)
    (folder / "README.md").unlink()  # peft's model card, empty
    tokenizer.save_pretrained(folder)
    wanted = get_peft_model_state_dict(model, state_dict=weights, save_embedding_layers=False)
    written = load_file(folder / WEIGHTS)
    alike = written.keys() == wanted.keys() and all(
        torch.equal(written[name], weight.cpu()) for name, weight in wanted.items()
    )
    if not alike or not all(bool(weight.isfinite().all()) for weight in written.values()):
        raise StageFailed(
            f"the adapters written at {folder} are not those in training, or are not finite",
            "lower training.learning_rate; where they are finite, the disk or the memory is faulty",
        )


def merge(training: TrainingConfig, source: str, adapter: Path, target: Path) -> None:
    """Write a model folder with the adapters of a folder merged into their base model, in `training.precision`.

    Memory: the base in float32.

    Raises:
        ModelError: The base cannot be loaded.
        StageFailed: The merged weights are not finite.
    """
    import torch
    from peft import PeftModel

    base: Any = load_base(training, source)
    if getattr(base, "is_loaded_in_8bit", False):
        base = base.dequantize(torch.float32)
        # transformers 5.23 notes how it read int8 weights, and fails to save because that cannot be done backwards.
        base._weight_conversions = [
            each
            for each in getattr(base, "_weight_conversions", None) or ()
            if not any("bitsandbytes" in type(step).__module__ for step in getattr(each, "operations", ()))
        ]
    base = base.to(torch.float32)
    try:
        merged = PeftModel.from_pretrained(base, adapter).merge_and_unload(safe_merge=True)
    except ValueError as error:
        if "NaN" not in str(error):
            raise
        raise StageFailed(
            "the merged weights are not finite", "lower training.learning_rate or use training.precision=fp32"
        ) from error
    tokenizer = models.load_tokenizer(adapter)
    models.save(merged.to(torch.bfloat16 if training.precision == "bf16" else torch.float32), tokenizer, target)


def keep(adapter: Path, model_folder: Path, base_model: str) -> None:
    """Put the adapters into a model folder, and say there which base model they are for."""
    kept = model_folder / FOLDER
    kept.mkdir()
    settings = json.loads((adapter / CONFIG).read_text(encoding="utf-8"))
    settings["base_model_name_or_path"] = base_model
    (kept / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    shutil.copy(adapter / WEIGHTS, kept)


def parameters(model: Any) -> tuple[int, int]:
    """Parameters that are trained, and all."""
    counts = [(weight.numel(), weight.requires_grad) for weight in model.parameters()]
    return sum(count for count, trained in counts if trained), sum(count for count, _ in counts)


def _without_frozen(model: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Leave in a state what is trained. DeepSpeed leaves tied weights and the scales of int8 ones in (0.19)."""
    trained = {prefix + name for name, weight in model.named_parameters() if weight.requires_grad}
    for name in [name for name in state if name not in trained]:
        del state[name]


def _is_int8(source: str) -> bool:
    from transformers import AutoConfig

    return getattr(AutoConfig.from_pretrained(source), "quantization_config", None) is not None
