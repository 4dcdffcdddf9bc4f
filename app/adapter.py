"""A folder of low-rank adapters, as peft writes it: where it is, what it was trained beside, its weights.

    adapter_config.json          rank, alpha, the base model
    adapter_model.safetensors    of each adapted layer, lora_A (rank, inputs) and lora_B (outputs, rank)

What an adapter adds to its layer is alpha / rank · B · A · x. Source: Hu et al. 2021, LoRA, section 4.1.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app import lineage
from app.errors import ModelError, StorageError
from app.storage import Storage
from app.versions import ModelVersion

if TYPE_CHECKING:
    import torch
    from torch import nn

FOLDER = "adapter"
"""In a checkpoint, and beside the merged weights in a model folder."""
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_WEIGHT = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_BESIDE_THE_BASE_AS_IT_IS = (True, False, "gaussian", "eva", "orthogonal")
"""Of peft's ways to begin with adapters, those that leave the base's weights alone."""
_REMEDY = "train it with training.method=lora, or serve the version that it is merged into"
_REPAIR = "restore it or make the version again"


@dataclass(frozen=True)
class LowRank:
    """One layer's."""

    down: "torch.Tensor"
    """A: (rank, inputs)"""
    up: "torch.Tensor"
    """B, scaled: (outputs, rank)"""


def located(uri: str) -> str:
    """The folder of adapters alone: of a model folder, the part beside the merged weights, which are not needed.

    Raises:
        StorageError: The store does not answer.
    """
    storage = Storage(uri)
    return storage.uri(FOLDER) if storage.exists(FOLDER, CONFIG) else uri


def check_folder(folder: Path) -> None:
    """Refuse a folder that holds no adapters, or pickled ones.

    Raises:
        ModelError: Saying which.
    """
    if not (folder / CONFIG).is_file():
        raise ModelError(
            f"{folder} holds no adapters ({CONFIG})", "name a version that was trained with training.method=lora"
        )
    if not (folder / WEIGHTS).is_file():
        raise ModelError(f"{folder} holds no {WEIGHTS}", "pickled weights are never loaded; convert them")


def check_base(adapted: ModelVersion, folder: Path, base: ModelVersion) -> None:
    """Refuse adapters that are known to have been trained beside another model than the one they are served beside.

    Args:
        adapted: What they are called; its folder may hold the merged model, or them alone.
        folder: Theirs.

    Raises:
        ModelError: Their lineage, or else the base that peft noted, is another one; or a lineage is damaged. Where
            nothing is known, as of a base from a hub, whoever put the two together is believed.
    """
    known = _lineage(adapted.uri)
    begun_with = known.parent if known else _noted_base(folder)
    if begun_with is None or begun_with in (str(base), _compressed_from(base)):
        return
    raise ModelError(
        f"the adapters of {adapted} were trained beside {begun_with}, and are to be served beside {base}",
        f"serve them beside {begun_with}, or beside what it was compressed to",
    )


def _noted_base(folder: Path) -> str | None:
    """The version whose folder peft was given, where that folder says which it is."""
    noted = _config(folder).get("base_model_name_or_path")
    if not isinstance(noted, str) or not ("://" in noted or Path(noted).is_absolute()):
        return None  # a hub id, or a preset
    try:
        known = _lineage(noted)
    except (ModelError, StorageError):  # nobody has to have it any more
        return None
    return f"{known.model}/{known.version}" if known and known.version else None


def _compressed_from(version: ModelVersion) -> str | None:
    known = _lineage(version.uri)
    return f"{known.model}/{known.parent}" if known and known.stage == "compress" else None


def _lineage(uri: str) -> lineage.Lineage | None:
    """None where the folder has none."""
    return lineage.read(uri) if Storage(uri).exists(lineage.FILE) else None


def read(folder: Path) -> "dict[str, LowRank]":
    """An adapter folder's weights in float32, by the layer's name in its model.

    Raises:
        ModelError: They are damaged, not finite, or of a kind that is more than A and B beside a layer.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    settings = _settings(folder)
    try:
        weights = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{folder / WEIGHTS} is damaged ({error})", _REPAIR) from error
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, weight in weights.items():
        match = _WEIGHT.fullmatch(name)
        if match is None or weight.dim() != 2:
            raise ModelError(f"{folder} has {name}, which is more than A and B beside a linear layer", _REMEDY)
        parts.setdefault(match[1], {})[match[2]] = weight.float()
    layers = {}
    for layer, pair in parts.items():
        down, up = pair.get("A"), pair.get("B")
        if down is None or up is None or down.shape[0] != up.shape[1]:
            raise ModelError(f"A and B of {layer} in {folder} do not fit together", "make the version again")
        layers[layer] = LowRank(down, up * _scale(settings, layer, down.shape[0]))
        if not all(bool(part.isfinite().all()) for part in (down, layers[layer].up)):
            raise ModelError(f"the adapter of {layer} in {folder} is not finite", _REPAIR)
    if not layers:
        raise ModelError(f"{folder / WEIGHTS} has no adapters in it", "make the version again")
    return layers


def rank(folder: Path) -> int:
    """The largest of its layers'."""
    return max(layer.down.shape[0] for layer in read(folder).values())


def check_fit(folder: Path, base: Path) -> None:
    """Refuse adapters that do not fit the model of a folder, whose weights are not loaded.

    Raises:
        ModelError: As `read` and `adapted_layer`.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    layers = read(folder)
    config = AutoConfig.from_pretrained(base, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    for path, layer in layers.items():
        adapted_layer(model, path, layer)


def check_tokenizer(folder: Path, base: Path) -> None:
    """Refuse adapters that bring other tokens or another chat template along: prompts are made as the base's say.

    Raises:
        ModelError: Saying which differs; or a tokenizer cannot be loaded.
    """
    from app.model import load_tokenizer

    if not (folder / "tokenizer.json").is_file():
        return
    own, theirs = load_tokenizer(folder), load_tokenizer(base)
    for what, differs in (
        ("tokens", own.get_vocab() != theirs.get_vocab()),
        ("a chat template", own.chat_template not in (None, theirs.chat_template)),
    ):
        if differs:
            raise ModelError(
                f"{folder} brings {what} of its own, and is served with those of the base", "serve the merged version"
            )


def adapted_layer(model: Any, path: str, pair: LowRank) -> "nn.Linear":
    """The layer of a model that an adapter is for.

    Raises:
        ModelError: It is not there, no linear one, the output layer, or of another shape.
    """
    from torch import nn

    try:
        layer = model.get_submodule(path)
    except AttributeError:
        layer = None
    if not isinstance(layer, nn.Linear):
        what = "of which this base has none" if layer is None else f"here a {type(layer).__name__} and no nn.Linear"
        linear = {name.rpartition(".")[2] for name, part in model.named_modules() if isinstance(part, nn.Linear)}
        raise ModelError(f"an adapter is for {path}, {what}", f"its linear layers are {', '.join(sorted(linear))}")
    if layer is model.get_output_embeddings():
        raise ModelError(f"an adapter is for {path}, the output layer", "train it without that layer")
    found, there = (pair.down.shape[1], pair.up.shape[0]), (layer.in_features, layer.out_features)
    if found != there:
        raise ModelError(
            f"an adapter of {path} is for {found[0]} inputs and {found[1]} outputs, and the base's layer has "
            f"{there[0]} and {there[1]}",
            "serve it beside the model that it was trained beside",
        )
    return layer


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / CONFIG} cannot be read ({error})", _REPAIR) from error
    if not isinstance(config, dict):
        raise ModelError(f"{folder / CONFIG} is no JSON object", _REPAIR)
    return config


def _settings(folder: Path) -> Any:
    from peft import LoraConfig, PeftConfig

    given = _config(folder)
    patterns = given.get("alpha_pattern") or {}
    # peft takes them for regular expressions, and may be at one for ever.
    if not isinstance(patterns, dict) or not all(re.fullmatch(r"[\w.]+", str(name)) for name in patterns):
        raise ModelError(f"{folder / CONFIG}: alpha_pattern has more than names of layers", _REMEDY)
    for name, alpha in {"lora_alpha": given.get("lora_alpha", 8), **patterns}.items():
        if not isinstance(alpha, int | float) or isinstance(alpha, bool):
            raise ModelError(f"{folder / CONFIG}: {name} is {alpha!r}, and should be a number", _REPAIR)
    try:
        settings: Any = PeftConfig.from_pretrained(str(folder))
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ModelError(f"{folder / CONFIG} cannot be read ({error})", _REPAIR) from error
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

    patterns: dict[str, float] = settings.alpha_pattern or {}
    alpha = float(patterns.get(get_pattern_key(list(patterns), layer), settings.lora_alpha))
    return alpha / (rank**0.5 if settings.use_rslora else rank)
