"""Model folders are whole, safe and reproducible, or refused with a sentence."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from app import model
from app.conversation import train_tokenizer
from app.errors import ModelError


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["where is my order"] * 10, vocab_size=300)


@pytest.fixture
def folder(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    model.save(model.new_model("preset:tiny", tokenizer, 64, seed=1), tokenizer, tmp_path / "m")
    return tmp_path / "m"


def test_the_same_seed_makes_the_same_weights(tokenizer: PreTrainedTokenizerFast) -> None:
    first, second = (model.new_model("preset:tiny", tokenizer, 64, seed=3).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_what_is_saved_loads_and_computes_the_same(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    original = model.new_model("preset:tiny", tokenizer, 64, seed=1).train(False)
    loaded, loaded_tokenizer = model.load(folder)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(original(ids).logits, loaded(ids).logits)
    assert loaded_tokenizer.chat_template == tokenizer.chat_template
    assert model.weights_bytes(folder) > 4 * 64 * 300


def test_an_unknown_preset_names_those_there_are(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ModelError, match="tiny, small, base"):
        model.new_model("preset:huge", tokenizer, 64, seed=1)


def test_damaged_weights_are_refused_by_name(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged"):
        model.load(folder)


def test_pickled_weights_are_never_loaded(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return eval, (f"open({str(marker)!r}, 'w').close()",)

    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(ModelError, match=r"pytorch_model\.bin, which are never loaded"):
        model.load(folder)
    assert not marker.exists()


def test_a_model_that_brings_its_own_code_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "evil.Model"}}))
    with pytest.raises(ModelError, match="remote code is never run"):
        model.load(folder)


@pytest.mark.parametrize("content", [None, "{", ""])
def test_a_folder_without_a_configuration_is_refused(folder: Path, content: str | None) -> None:
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_text(content)
    with pytest.raises(ModelError, match=r"config\.json cannot be read"):
        model.load(folder)


def test_a_model_that_is_nowhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no-such-model"):
        model.load("no-such-model-anywhere")
