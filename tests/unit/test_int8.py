"""int8 on a CPU: exact products of the int8 weights, in folders that bitsandbytes itself reads."""

import json
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Int8Params, Linear8bitLt

from app import conversation, int8
from app import model as models
from app.compression.quantize import quantize, scales
from app.errors import ModelError


def layer(inputs: int, outputs: int, bias: bool = False) -> Linear8bitLt:
    made = Linear8bitLt(inputs, outputs, bias=bias, has_fp16_weights=False, threshold=6.0)
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(1))
    made.weight = Int8Params(weight, has_fp16_weights=False, requires_grad=False).to("cpu")
    return made.train(False)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 48), (7, 48), (2, 5, 48), (0, 48)])
def test_a_small_layer_multiplies_with_the_dequantised_weights(shape: tuple[int, ...], bias: bool) -> None:
    made = layer(48, 33, bias)
    dequantised = made.weight.CB.float() * made.weight.SCB[:, None] / 127.0
    made.__class__ = int8.DequantisingLinear8bit
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(2))
    wanted = torch.nn.functional.linear(x, dequantised, made.bias)
    torch.testing.assert_close(made(x), wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(made(x.bfloat16()).float(), wanted, atol=0.2, rtol=0.02)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model")
    tokenizer = conversation.train_tokenizer(["where is my order?", "it is on its way"], 300)
    models.save(models.new_model("preset:tiny", tokenizer, 64, seed=5), tokenizer, made)
    return made


@pytest.fixture(scope="module")
def compressed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("int8")
    quantize(folder, made, 6.0)
    return made


def test_a_quantised_folder_holds_int8_weights_with_scales_and_loads_as_it_is(folder: Path, compressed: Path) -> None:
    from safetensors import safe_open

    assert (scales(folder), scales(compressed)) == (0, 14)
    with safe_open(compressed / "model.safetensors", framework="pt") as tensors:
        kinds = {str(tensors.get_tensor(name).dtype) for name in tensors.keys() if name.endswith("proj.weight")}  # noqa: SIM118
        assert kinds == {"torch.int8"}
        assert tensors.get_tensor("model.embed_tokens.weight").dtype == torch.bfloat16
    assert json.loads((compressed / "config.json").read_text())["quantization_config"]["load_in_8bit"]
    assert models.weights_bytes(compressed) < 0.7 * models.weights_bytes(folder)
    model, _ = models.load(compressed)
    assert model.dtype == torch.float32
    assert {type(module).__name__ for module in model.modules() if "8bit" in type(module).__name__} == {
        "DequantisingLinear8bit"
    }


def test_the_quantised_model_says_nearly_what_the_whole_one_says(folder: Path, compressed: Path) -> None:
    ids = torch.arange(40)[None]
    with torch.no_grad():
        whole, small = (models.load(place)[0](input_ids=ids).logits for place in (folder, compressed))
    assert float((whole - small).norm() / whole.norm()) < 0.03


def test_llm_int8_of_bitsandbytes_agrees(compressed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.arange(40)[None]
    with torch.no_grad():
        ours = models.load(compressed)[0](input_ids=ids).logits
        monkeypatch.setattr(int8, "SMALL_LAYER", 0)
        model, _ = models.load(compressed)
        assert model.dtype == torch.bfloat16
        theirs = model(input_ids=ids).logits.float()
    # Where a CPU has no VNNI, their int8 products saturate, and 7 % remain.
    assert float((ours - theirs).norm() / theirs.norm()) < 0.1


def test_what_is_quantised_already_is_refused(compressed: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is quantised already"):
        quantize(compressed, tmp_path, 6.0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize("shape", [(7, 48), (2, 5, 48)])
def test_gradients_through_a_frozen_layer_are_those_of_its_dequantised_weights(
    shape: tuple[int, ...], dtype: torch.dtype, tolerance: float
) -> None:
    made = layer(48, 33)
    dequantised = made.weight.CB.float() * made.weight.SCB[:, None] / 127.0
    made.__class__ = int8.DequantisingLinear8bit
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(*shape, generator=generator).to(dtype).requires_grad_()
    given = torch.randn(*shape[:-1], 33, generator=generator).to(dtype)
    made.train()(x).backward(given)
    wanted = given.float() @ dequantised
    assert x.grad is not None
    assert x.grad.dtype == dtype
    assert float((x.grad.float() - wanted).norm() / wanted.norm()) < tolerance


@pytest.mark.parametrize("in_folder", [False, True])
def test_adapters_beside_int8_weights_are_merged_as_they_were_trained(
    folder: Path, compressed: Path, tmp_path: Path, in_folder: bool
) -> None:
    """Whether the base is quantised as it is loaded, or is int8 in its folder."""
    from app.config import Config
    from app.training import adapters

    source = str(compressed if in_folder else folder)
    settings = {"base_model": source, "method": "lora", "lora.load_in_8bit": True, "lora.dropout": 0.0}
    training = Config().with_overrides({f"training.{key}": value for key, value in settings.items()}).training
    model = adapters.attach(adapters.load_base(training, source), training)
    ids = torch.arange(40)[None]
    before = float(model(input_ids=ids, labels=ids).loss)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    for _ in range(8):
        model.train()(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapters.save(model, models.load_tokenizer(source), tmp_path / "adapter")
    adapters.merge(training, source, tmp_path / "adapter", tmp_path / "merged")
    merged, _ = models.load(tmp_path / "merged")
    assert scales(tmp_path / "merged") == 0
    with torch.no_grad():
        apart = model.train(False)(input_ids=ids, labels=ids)
        torch.testing.assert_close(merged(input_ids=ids).logits, apart.logits, atol=1e-4, rtol=1e-4)
    assert float(apart.loss) < before - 0.05
