"""Adapters of several variants beside one base. The oracle is peft's own model, one request at a time."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from app import adapter, lineage
from app import model as models
from app.conversation import prompt_ids
from app.errors import ModelError
from app.serving.adapters import Adapters
from app.serving.engine import Engine
from app.serving.fixed_passes import FixedPasses
from app.serving.passes import FittingPasses
from app.serving.sampling import Sampling
from app.versions import ModelVersion
from tests import answering_model
from tests.answering_model import ADAPTED_ANSWERS, ANSWERS, CONTEXT_TOKENS, UNSURE
from tests.engine_replies import GREEDY, Client, submit

NAMES = ("polite", "welcoming", "")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    answering_model.make(folder)
    return folder


@pytest.fixture(scope="module")
def folders(base: Path) -> dict[str, Path]:
    """Of different ranks, layers and scales."""
    found = {name: base.parent / name for name in NAMES if name}
    answering_model.make_adapter(found["polite"], base)
    lora: dict[str, Any] = {"r": 4, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]}
    answering_model.make_adapter(found["welcoming"], base, "You are welcome! ", alpha_pattern={"down_proj": 24}, **lora)
    return found


class Asking:
    def __init__(self, base: Path, folders: dict[str, Path], passes: Any = None) -> None:
        self.base, self.folders = base, folders
        self.adapted: dict[str, Any] = {}
        model, self.tokenizer = models.load(base)
        self.engine = Engine(
            model, self.tokenizer, 4, CONTEXT_TOKENS, 100, 10_000_000, passes, Adapters(model, folders)
        )

    def prompt(self, question: str) -> list[int]:
        return prompt_ids(self.tokenizer, [{"role": "user", "content": question}])

    def ask(self, question: str, name: str, sampling: Sampling = GREEDY, max_tokens: int = 60) -> Client:
        client = Client()
        prompt = self.prompt(question)
        submit(self.engine, self.tokenizer, prompt, sampling, max_tokens, client, scope="key", adapter=name)
        return client

    def written_by_peft(self, question: str, name: str, max_tokens: int = 60) -> str:
        if name not in self.adapted:
            model, _ = models.load(self.base)
            self.adapted[name] = PeftModel.from_pretrained(model, self.folders[name]) if name else model
        ids = torch.tensor([self.prompt(question)])
        with torch.inference_mode():
            whole = self.adapted[name].generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False
            )
        text: str = self.tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)
        return text


@pytest.fixture(scope="module", params=["float32", "int8", "fixed", "fitting"])
def asking(
    request: pytest.FixtureRequest, base: Path, model_folder: Path, folders: dict[str, Path]
) -> Iterator[Asking]:
    folder = model_folder if request.param == "int8" else base
    asking = Asking(folder, folders, {"fixed": FixedPasses, "fitting": FittingPasses}.get(request.param))
    yield asking
    asking.engine.stop()


def test_each_reply_of_a_batch_is_written_with_its_own_adapter(asking: Asking) -> None:
    asked = [(question, name) for question in [*ANSWERS, "please " * 70 + "thank you"] for name in NAMES]
    clients = [asking.ask(question, name) for question, name in asked]
    for (question, name), client in zip(asked, clients, strict=True):
        assert client.text == asking.written_by_peft(question, name), (question, name)
    assert asking.ask("thank you", "polite").text == ADAPTED_ANSWERS["thank you"]
    assert asking.ask("thank you", "welcoming").text == f"You are welcome! {ANSWERS['thank you']}"


def test_a_long_beginning_that_one_adapter_has_read_is_not_taken_for_anothers(asking: Asking) -> None:
    question = "well " * 100 + "thank you"
    for is_new in (True, False):
        for name in NAMES:
            client = asking.ask(question, name)
            assert client.text == asking.written_by_peft(question, name)
            assert (client.finished.cached_tokens == 0) == is_new


def test_the_same_seed_gives_the_same_text_with_an_adapter_alone_and_in_any_company(asking: Asking) -> None:
    def sampling(seed: int) -> Sampling:
        return Sampling(None, 1.5, 0.95, seed, ())

    alone = [asking.ask(UNSURE, "polite", sampling(seed), 30).text for seed in range(8)]
    company = [asking.ask(question, name, sampling(99)) for question in ANSWERS for name in NAMES]
    assert [client.text for client in [asking.ask(UNSURE, "polite", sampling(seed), 30) for seed in range(8)]] == alone
    assert len(set(alone)) > 2
    assert all(client.finished.completion_tokens for client in company)


def test_vectors_are_the_adapted_models(asking: Asking, base: Path, folders: dict[str, Path]) -> None:
    prompt = asking.prompt("i want a refund")
    (plain,), (adapted,) = (
        [vector.result(60) for vector in asking.engine.embed([prompt], name)] for name in ("", "polite")
    )
    body = PeftModel.from_pretrained(models.load(base)[0], folders["polite"]).base_model.model.model
    with torch.inference_mode():
        expected = torch.nn.functional.normalize(body(torch.tensor([prompt])).last_hidden_state[0].mean(0), dim=0)
    assert float(torch.tensor(adapted) @ expected) > 0.999
    assert float(torch.tensor(plain) @ expected) < 0.99


def test_logits_are_pefts_in_bfloat16_and_float32(base: Path, folders: dict[str, Path]) -> None:
    """Close, not only of the same text."""
    ids = torch.arange(5, 45)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.15)):
        model, _ = models.load(base, dtype=dtype)
        adapters = Adapters(model, folders)
        for name in ("polite", "welcoming"):
            with torch.inference_mode(), adapters.of(torch.tensor([[adapters.number(name)]])):
                found = model(ids.unsqueeze(0)).logits[0].float()
            oracle = PeftModel.from_pretrained(models.load(base)[0], folders[name])
            with torch.inference_mode():
                expected = oracle(input_ids=ids.unsqueeze(0)).logits[0]
            assert float((found - expected).abs().max() / expected.std()) < tolerance, (dtype, name)


@pytest.fixture
def folder(folders: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders["polite"], tmp_path / "copy"))


def changed_settings(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def changed_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    change(weights)
    save_file(weights, folder / "adapter_model.safetensors")


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: changed_settings(folder, use_dora=True), "has DoRA"),
        (lambda folder: changed_settings(folder, init_lora_weights="pissa"), "init_lora_weights=pissa"),
        (lambda folder: changed_settings(folder, layer_replication=[[0, 1], [0, 2]]), "more than once"),
        (lambda folder: changed_settings(folder, peft_type="IA3"), "no low-rank adapter"),
        (lambda folder: changed_settings(folder, peft_type="no such"), "cannot be read"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "cannot be read"),
        (lambda folder: changed_settings(folder, lora_alpha=float("nan")), "is not finite"),
        (lambda folder: changed_settings(folder, lora_alpha="x"), "lora_alpha is 'x', and should be a number"),
        (lambda folder: changed_settings(folder, alpha_pattern={"(a+)+$": 1}), "more than names of layers"),
        (lambda folder: changed_weights(folder, lambda one: one.update({f"{Q}.lora_B.bias": torch.ones(64)})), "bias"),
        (lambda folder: changed_weights(folder, lambda one: one.pop(f"{Q}.lora_B.weight")), "do not fit together"),
        (lambda folder: changed_weights(folder, lambda one: one[f"{Q}.lora_A.weight"].fill_(torch.nan)), "not finite"),
        (lambda folder: changed_weights(folder, lambda one: one.clear()), "no adapters in it"),
        (
            lambda folder: changed_weights(
                folder, lambda one: one.update({f"{Q}.lora_A.weight": torch.ones(8, 32)})
            ),
            "is for 32 inputs and 64 outputs, and the base's layer has 64 and 64",
        ),
        (
            lambda folder: changed_weights(
                folder, lambda one: one.update({f"{Q}x.lora_{part}.weight": torch.ones(8, 8) for part in "AB"})
            ),
            "q_projx, of which this base has none",
        ),
        (
            lambda folder: changed_weights(
                folder,
                lambda one: one.update(
                    {f"base_model.model.lm_head.lora_{part}.weight": torch.ones(8, 8) for part in "AB"}
                ),
            ),
            "the output layer",
        ),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"no"), "is damaged"),
    ],
)  # fmt: skip
def test_what_is_no_such_adapter_is_refused_by_what_is_wrong(
    base: Path, folder: Path, change: Callable[[Path], object], message: str
) -> None:
    change(folder)
    model, _ = models.load(base)
    with pytest.raises(ModelError, match=message):
        Adapters(model, {"polite": folder})


def test_adapters_are_found_alone_and_beside_merged_weights_and_pickled_ones_are_refused(
    folder: Path, tmp_path: Path
) -> None:
    assert adapter.located(str(folder)) == str(folder)
    merged = tmp_path / "merged"
    shutil.copytree(folder, merged / "adapter")
    assert adapter.located(str(merged)) == str(merged / "adapter")
    adapter.check_folder(folder)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ModelError, match="pickled weights are never loaded"):
        adapter.check_folder(folder)
    with pytest.raises(ModelError, match="holds no adapters"):
        adapter.check_folder(tmp_path)


def test_adapters_are_served_beside_the_model_that_they_were_trained_beside_or_what_was_compressed_from_it(
    base: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    place, three = folders["polite"], ModelVersion("support", "3", str(base))
    adapted = ModelVersion("support", "4", str(place))  # trained beside support/3
    adapter.check_base(adapted, place, three)
    other = ModelVersion("support", "2", str(base))
    with pytest.raises(ModelError, match=r"adapters of support/4 were trained beside support/3, .* beside support/2"):
        adapter.check_base(adapted, place, other)
    known = lineage.read(str(base))
    for stage, parent, fits in (("compress", "3", True), ("compress", "1", False), ("train", "support/3", False)):
        lineage.write(tmp_path, lineage.Lineage(**{**vars(known), "version": "5", "stage": stage, "parent": parent}))
        smaller = ModelVersion("support", "5", str(tmp_path))
        if fits:
            adapter.check_base(adapted, place, smaller)
        else:
            with pytest.raises(ModelError, match="beside support/5"):
                adapter.check_base(adapted, place, smaller)


def test_adapters_without_lineage_are_known_by_the_base_that_peft_noted(base: Path, folder: Path) -> None:
    (folder / "lineage.json").unlink()
    adapted, three = ModelVersion("support", "4", str(folder)), ModelVersion("support", "3", str(base))
    other = ModelVersion("support", "9", str(base.parent / "other"))
    changed_settings(folder, base_model_name_or_path=str(base))  # whose lineage says that it is support/3
    adapter.check_base(adapted, folder, three)
    with pytest.raises(ModelError, match="were trained beside support/3, and are to be served beside support/9"):
        adapter.check_base(adapted, folder, other)
    for unknown in ("meta/llama", "/gone", None):
        changed_settings(folder, base_model_name_or_path=unknown)
        adapter.check_base(adapted, folder, other)
    (folder / "lineage.json").write_text("{")
    with pytest.raises(ModelError, match=r"lineage\.json cannot be read"):
        adapter.check_base(adapted, folder, three)


def test_what_does_not_fit_is_told_from_the_bases_configuration_alone(base: Path, folder: Path) -> None:
    adapter.check_fit(folder, base)
    for path, shape, message in (
        ("model.layers.0.self_attn.q_proj", (8, 32), "is for 32 inputs"),
        ("model.layers.7.self_attn.q_proj", (8, 64), "of which this base has none"),
        ("lm_head", (8, 64), "the output layer"),
        ("model.embed_tokens", (8, 64), "a Embedding and no nn.Linear"),
    ):
        weights = {"A": torch.ones(shape), "B": torch.ones(64, 8)}
        added = {f"base_model.model.{path}.lora_{part}.weight": weight for part, weight in weights.items()}
        plain = load_file(folder / "adapter_model.safetensors")
        save_file({**plain, **added}, folder / "adapter_model.safetensors")
        with pytest.raises(ModelError, match=message):
            adapter.check_fit(folder, base)
        save_file(plain, folder / "adapter_model.safetensors")


def test_tokens_and_templates_of_an_adapters_own_are_refused(base: Path, folder: Path) -> None:
    adapter.check_tokenizer(folder, base)
    tokenizer = models.load_tokenizer(base)
    tokenizer.save_pretrained(folder)
    adapter.check_tokenizer(folder, base)
    plain = tokenizer.chat_template
    tokenizer.chat_template = f"{plain}!"
    tokenizer.save_pretrained(folder)
    with pytest.raises(ModelError, match="brings a chat template of its own"):
        adapter.check_tokenizer(folder, base)
    tokenizer.chat_template = plain
    tokenizer.add_tokens(["<|new|>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ModelError, match="brings tokens of its own"):
        adapter.check_tokenizer(folder, base)


class Shared(torch.nn.Module):
    """A layer that is given rows and tokens as one, as experts that all tokens share are."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 4, bias=False)
        self.device, self.dtype = torch.device("cpu"), torch.float32

    def get_output_embeddings(self) -> None:
        return None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat: torch.Tensor = self.layer(x.flatten(0, 1))
        return flat.view_as(x)


def test_a_layer_that_is_given_rows_and_tokens_as_one_gets_each_rows_adapter(tmp_path: Path) -> None:
    model: Any = Shared()
    for name, rank in (("a", 1), ("b", 3)):
        weights = {"A": torch.randn(rank, 4), "B": torch.randn(4, rank)}
        (tmp_path / name).mkdir()
        save_file(
            {f"base_model.model.layer.lora_{part}.weight": weight for part, weight in weights.items()},
            tmp_path / name / "adapter_model.safetensors",
        )
        (tmp_path / name / "adapter_config.json").write_text(
            json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["layer"]})
        )
    adapters = Adapters(model, {name: tmp_path / name for name in "ab"})
    x = torch.randn(3, 5, 4)
    plain = model(x)
    with adapters.of(torch.tensor([[2], [0], [1]])):
        found = model(x)
    for row, name in ((0, "b"), (2, "a")):
        pair = adapter.read(tmp_path / name)["layer"]
        torch.testing.assert_close(found[row], plain[row] + x[row] @ pair.down.T @ pair.up.T)
    assert torch.equal(found[1], plain[1])
