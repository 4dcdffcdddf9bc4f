"""A folder of low-rank adapters, as peft writes it: where it is, what it was trained beside, its weights.

    adapter_config.json          rank, alpha, the base model
    adapter_model.safetensors    of each adapted layer, lora_A (rank, inputs) and lora_B (outputs, rank)

What an adapter adds to its layer is alpha / rank · B · A · x. Source: Hu et al. 2021, LoRA, section 4.1.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app import lineage
from app.errors import ModelError
from app.versions import ModelVersion

if TYPE_CHECKING:
    import torch

FOLDER = "adapter"
"""In a checkpoint, and beside the merged weights in a model folder."""
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_WEIGHT = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_BESIDE_THE_BASE_AS_IT_IS = (True, False, "gaussian", "eva", "orthogonal")
"""Of peft's ways to begin with adapters, those that leave the base's weights alone."""
_REMEDY = "train it with training.method=lora, or serve the version that it is merged into"


@dataclass(frozen=True)
class LowRank:
    """One layer's."""

    down: "torch.Tensor"
    """A: (rank, inputs)"""
    up: "torch.Tensor"
    """B, scaled: (outputs, rank)"""


def find(folder: Path) -> Path:
    """The adapters beside the merged weights in a model folder, or in a folder that has nothing else.

    Raises:
        ModelError: There are none, or only pickled ones.
    """
    for place in (folder / FOLDER, folder):
        if (place / CONFIG).is_file():
            if not (place / WEIGHTS).is_file():
                raise ModelError(f"{place} holds no {WEIGHTS}", "pickled weights are never loaded; convert them")
            return place
    raise ModelError(
        f"{folder} holds no adapters ({CONFIG})", "name a version that was trained with training.method=lora"
    )


def check_base(adapted: ModelVersion, base: ModelVersion) -> None:
    """Refuse adapters that are known to have been trained beside another model than the one they are served beside.

    Raises:
        ModelError: Their lineage names another base. Where there is none, whoever put the two together is believed.
    """
    known = _lineage(adapted)
    begun_with = known.parent if known else None
    if begun_with is None or begun_with in (str(base), _compressed_from(base)):
        return
    raise ModelError(
        f"the adapters of {adapted} were trained beside {begun_with}, and are to be served beside {base}",
        f"serve them beside {begun_with}, or beside what it was compressed to",
    )


def _compressed_from(version: ModelVersion) -> str | None:
    known = _lineage(version)
    return f"{known.model}/{known.parent}" if known and known.stage == "compress" else None


def _lineage(version: ModelVersion) -> lineage.Lineage | None:
    try:
        return lineage.read(version.uri)
    except ModelError:
        return None


def read(folder: Path) -> "dict[str, LowRank]":
    """An adapter folder's weights in float32, by the layer's name in its model.

    Raises:
        ModelError: They are damaged, not finite, or of a kind that is more than A and B beside a layer.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    settings = _settings(folder)
    try:
        weights = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{folder / WEIGHTS} is damaged ({error})", "restore it or make the version again") from error
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, weight in weights.items():
        match = _WEIGHT.fullmatch(name)
        if match is None or weight.dim() != 2:
            raise ModelError(f"{folder} has {name}, which is more than A and B beside a linear layer", _REMEDY)
        if not bool(weight.isfinite().all()):
            raise ModelError(f"{name} in {folder} is not finite", "restore it or make the version again")
        parts.setdefault(match[1], {})[match[2]] = weight.float()
    layers = {}
    for layer, pair in parts.items():
        down, up = pair.get("A"), pair.get("B")
        if down is None or up is None or down.shape[0] != up.shape[1]:
            raise ModelError(f"A and B of {layer} in {folder} do not fit together", "make the version again")
        layers[layer] = LowRank(down, up * _scale(settings, layer, down.shape[0]))
    if not layers:
        raise ModelError(f"{folder / WEIGHTS} has no adapters in it", "make the version again")
    return layers


def rank(folder: Path) -> int:
    """The largest of its layers'."""
    return max(layer.down.shape[0] for layer in read(folder).values())


def check_fit(folder: Path, base: Path) -> None:
    """Refuse adapters for layers of another shape than those of a model folder.

    What that folder stores under other names than its model has is left to whoever loads it.

    Raises:
        ModelError: Naming the layer; or as `read`.
    """
    layers, shapes = read(folder), _shapes(base)
    for path, layer in layers.items():
        found, there = (layer.up.shape[0], layer.down.shape[1]), shapes.get(f"{path}.weight")
        if there not in (None, found):
            raise misfit(path, found, there)


def misfit(path: str, found: tuple[int, int], there: tuple[int, int]) -> ModelError:
    """Adapters are for a layer of `found`, and it has `there`: outputs and inputs."""
    return ModelError(
        f"an adapter of {path} is for {found[1]} inputs and {found[0]} outputs, and the base's layer has "
        f"{there[1]} and {there[0]}",
        "serve it beside the model that it was trained beside",
    )


def _shapes(folder: Path) -> "dict[str, Any]":
    """Of a model folder's weights."""
    from safetensors import safe_open

    shapes: dict[str, Any] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as weights:
            shapes |= {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    return shapes


def _settings(folder: Path) -> Any:
    from peft import LoraConfig, PeftConfig

    try:
        settings: Any = PeftConfig.from_pretrained(str(folder))
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ModelError(
            f"{folder / CONFIG} cannot be read ({error})", "restore it or make the version again"
        ) from error
    if not isinstance(settings, LoraConfig):
        raise ModelError(f"{folder} holds {settings.peft_type}, which is no low-rank adapter", _REMEDY)
    begun = settings.init_lora_weights
    for held, what in (
        (settings.use_dora, "DoRA"),
        (settings.use_qalora, "QALoRA"),
        (settings.alora_invocation_tokens, "adapters that begin at some tokens"),
        (settings.layer_replication, "layers of the base more than once"),
        (begun not in _BESIDE_THE_BASE_AS_IT_IS, f"init_lora_weights={begun}, which changes the base"),
    ):
        if held:
            raise ModelError(f"{folder} has {what}, and adapters are served beside a base as it is", _REMEDY)
    return settings


def _scale(settings: Any, layer: str, rank: int) -> float:
    from peft.utils.other import get_pattern_key

    patterns = settings.alpha_pattern
    alpha = float(patterns.get(get_pattern_key(patterns.keys(), layer), settings.lora_alpha))
    return alpha / (rank**0.5 if settings.use_rslora else rank)
