"""Make, load and save a causal language model and its tokenizer. Safetensors only; no remote code.

A model folder holds `model.safetensors` (or shards), `config.json`, the tokenizer, `intent/` (the small intent
model, see app/intent.py) and `lineage.json` (see app/lineage.py).
"""

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.errors import ModelError

if TYPE_CHECKING:  # seconds to import, and many a process only asks for a preset or whether a folder is a model
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Llama shapes: hidden size, layers, heads, feed-forward size. Embeddings are tied.
PRESETS = {
    "tiny": (64, 2, 2, 128),
    "small": (192, 4, 6, 512),
    "base": (320, 6, 8, 864),
}
PRESET = "preset:"


def is_preset(base_model: str) -> bool:
    """Whether training starts from random weights and a tokenizer of its own."""
    return base_model.startswith(PRESET)


def preset(base_model: str) -> tuple[int, int, int, int]:
    """The shape of a preset, as PRESETS has it.

    Raises:
        ModelError: There is no such preset.
    """
    name = base_model.removeprefix(PRESET)
    if name not in PRESETS:
        raise ModelError(f"there is no preset {name!r}", f"presets are {', '.join(PRESETS)}")
    return PRESETS[name]


def new_model(
    base_model: str, tokenizer: "PreTrainedTokenizerBase", context_tokens: int, seed: int
) -> "PreTrainedModel":
    """A randomly initialised Llama of a preset's shape, the same for the same seed.

    Raises:
        ModelError: There is no such preset.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden_size, layers, heads, feed_forward_size = preset(base_model)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=feed_forward_size,
        max_position_embeddings=max(2048, context_tokens),
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def load(source: str | Path, **options: Any) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """The model and tokenizer of a folder or hub id, in evaluation mode.

    `options` go to `from_pretrained` (dtype, quantization_config, device_map...).

    Raises:
        ModelError: The folder is incomplete, damaged, asks for remote code, or holds pickled weights only.
    """
    from transformers import AutoModelForCausalLM

    _check_source(source)
    _quiet()
    tokenizer = load_tokenizer(source)
    try:
        model = AutoModelForCausalLM.from_pretrained(source, use_safetensors=True, trust_remote_code=False, **options)
    except Exception as error:  # transformers, safetensors and hub clients raise a dozen kinds
        raise ModelError(
            f"cannot load model {str(source)!r} ({type(error).__name__}: {error})",
            "give a folder or hub id with config.json, a tokenizer and safetensors weights",
        ) from error
    model.train(False)
    if getattr(model, "is_loaded_in_8bit", False) and "quantization_config" not in options:
        from app.int8 import hasten

        hasten(model)
    return model, tokenizer


def load_tokenizer(source: str | Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a folder or hub id.

    Raises:
        ModelError: There is none that can be loaded.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # as in `load`
        raise ModelError(
            f"cannot load the tokenizer of {str(source)!r} ({type(error).__name__}: {error})",
            "give a folder or hub id with config.json, a tokenizer and safetensors weights",
        ) from error
    return tokenizer


def vocabulary(folder: Path) -> int:
    """Rows of a whole model's output; its tokenizer may have fewer tokens."""
    from transformers import AutoConfig

    check_folder(folder)
    return int(AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config().vocab_size)


def save(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    folder: Path,
    state_dict: "dict[str, torch.Tensor] | None" = None,
) -> None:
    """Write a model folder that `load` reads; `state_dict` stands in for weights that are spread over workers."""
    _quiet()
    model.save_pretrained(folder, state_dict=state_dict)
    tokenizer.save_pretrained(folder)


def _quiet() -> None:
    from transformers.utils.logging import disable_progress_bar

    # bitsandbytes 0.50 logs a warning at every product whose input is not float16: megabytes a minute, and
    # most of the time spent. transformers' progress bars do not belong into job logs either.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    disable_progress_bar()


def check_folder(folder: Path) -> None:
    """Refuse a folder that is not a whole, safe model.

    Raises:
        ModelError: Naming the file and what is wrong with it.
    """
    from safetensors import SafetensorError, safe_open

    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{folder / 'config.json'} cannot be read ({error})", "the folder must hold a whole model"
        ) from error
    if "auto_map" in config:
        raise ModelError(f"{folder} asks to run its own code (auto_map)", "remote code is never run; use a stock model")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        pickled = sorted(file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        found = f" (found pickled weights {', '.join(pickled)}, which are never loaded)" if pickled else ""
        raise ModelError(f"{folder} holds no safetensors weights{found}", "convert the model to safetensors")
    for file in weights:
        try:
            with safe_open(file, framework="pt") as tensors:
                tensors.keys()
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file} is damaged ({error})", "restore it or make the version again") from error


def _check_source(source: str | Path) -> None:
    """Refuse a folder that is not there or not a whole model; what a hub id stands for is seen on loading."""
    if Path(source).is_dir():
        check_folder(Path(source))
    elif Path(source).is_absolute():
        raise ModelError(f"there is no model folder {str(source)!r}", "give an existing folder, a hub id or a preset")


def weights_bytes(folder: Path) -> int:
    """Bytes of a folder's weights."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
