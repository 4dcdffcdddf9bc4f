"""A model folder with int8 linear layers, made from a folder in full precision."""

from pathlib import Path

from app import model as models
from app.errors import ModelError


def quantize(source: Path, target: Path, llm_int8_threshold: float) -> None:
    """Write the model of `source` to `target`, its linear layers as int8 with a float32 scale for each output.

    What is not a linear layer (embeddings, norms) and the output layer are kept in bfloat16: perplexity does not
    feel it, and CPUs and GPUs compute in it. `target` is loaded like any other model folder.

    Raises:
        ModelError: `source` cannot be loaded, is quantised already, or has no linear layer.
    """
    import torch
    from transformers import AutoConfig, BitsAndBytesConfig

    models.check_folder(source)
    if getattr(AutoConfig.from_pretrained(source), "quantization_config", None) is not None:
        raise ModelError(f"{source} is quantised already", "compress the version it was made from")
    int8 = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=llm_int8_threshold)
    model, tokenizer = models.load(source, dtype=torch.bfloat16, quantization_config=int8, device_map={"": "cpu"})
    models.save(model, tokenizer, target)
    if not scales(target):
        raise ModelError(f"{source} has no linear layer that int8 could replace", "leave the stage compress out")


def scales(folder: Path) -> int:
    """How many int8 weights a folder holds, told by the scales beside them."""
    from safetensors import safe_open

    found = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="np") as tensors:
            names: list[str] = tensors.keys()
        found += sum(name.endswith(".SCB") for name in names)
    return found
