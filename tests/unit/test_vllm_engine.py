"""vLLM's engine by itself, in an environment that has it: `make vllm`, then its pytest. The oracle is transformers."""

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not in this environment: see cluster/vllm_cpu.sh")

import psutil
import torch
from safetensors.torch import load_file, save_file

from app import model as models
from app.conversation import prompt_ids
from app.errors import ModelError
from app.serving.engines import EngineFull, Unsupported
from app.serving.output_format import GrammarFailed
from app.serving.reply import Reply
from app.serving.schema import Delta, Refused, Sampling
from app.serving.vllm_engine import VllmEngine
from app.settings.serving import VllmConfig
from tests import answering_model
from tests.answering_model import ADAPTED_ANSWERS, ANSWERS, CONTEXT_TOKENS, ENDLESS, UNSURE
from tests.engine_replies import GREEDY, Client, submit

CONFIG = VllmConfig(dtype="float32", kv_cache_bytes=2**26, enforce_eager=True)
SLOTS, WAITING = 4, 60


class Asking:
    """An engine with the tokenizer that questions need, and the model for comparison."""

    def __init__(self, folder: Path, adapters: Mapping[str, Path] | None = None) -> None:
        self.model, self.tokenizer = models.load(folder)
        vocabulary = models.vocabulary(folder)
        self.engine = VllmEngine(folder, self.tokenizer, vocabulary, CONFIG, SLOTS, CONTEXT_TOKENS, WAITING, adapters)

    def prompt(self, question: str) -> list[int]:
        return prompt_ids(self.tokenizer, [{"role": "user", "content": question}])

    def ask(
        self, question: str, sampling: Sampling = GREEDY, max_tokens: int = 100, choice: int = 0, adapter: str = ""
    ) -> Client:
        client = Client()
        prompt = self.prompt(question)
        submit(self.engine, self.tokenizer, prompt, sampling, max_tokens, client, choice, adapter=adapter)
        return client

    def generated(self, question: str, max_tokens: int) -> str:
        """What transformers' own loop writes."""
        ids = torch.tensor([self.prompt(question)])
        with torch.inference_mode():
            whole = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False
            )
        text: str = self.tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)
        return text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine") / "float"
    answering_model.make(folder)
    return folder


@pytest.fixture(scope="module")
def asking(folder: Path) -> Iterator[Asking]:
    asking = Asking(folder)
    yield asking
    asking.engine.stop()
    wait_until_processes_are(set())


def engine_processes() -> set[psutil.Process]:
    """vLLM's, of this process; they give themselves names."""
    children = psutil.Process().children(recursive=True)
    return {child for child in children if "VLLM" in child.name() and child.status() != psutil.STATUS_ZOMBIE}


def wait_until_processes_are(expected: set[psutil.Process]) -> None:
    deadline_s = time.monotonic() + 30
    while engine_processes() != expected and time.monotonic() < deadline_s:
        time.sleep(0.1)
    assert engine_processes() == expected


def sampled(seed: int | None, **changes: Any) -> Sampling:
    return Sampling(**{"max_tokens": None, "temperature": 1.5, "top_p": 0.95, "seed": seed, "stop": (), **changes})


def wait_until_idle(engine: VllmEngine) -> None:
    deadline_s = time.monotonic() + 30
    while engine.slots_in_use and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert engine.slots_in_use == 0


def test_replies_batched_with_others_are_those_of_generate_alone(asking: Asking) -> None:
    questions = [*ANSWERS, ENDLESS, "x"]
    lengths = [100, 30, 100, 7, 100, 1, 64, 40]
    clients = [asking.ask(question, max_tokens=length) for question, length in zip(questions, lengths, strict=True)]
    for question, length, client in zip(questions, lengths, clients, strict=True):
        assert client.text == asking.generated(question, length), question


def test_a_reply_ends_at_the_end_token_at_a_stop_string_or_at_its_limit_and_says_which(asking: Asking) -> None:
    ended, cut = asking.ask("thank you"), asking.ask(ENDLESS, max_tokens=9)
    assert (ended.text, ended.finished.finish_reason) == (ANSWERS["thank you"], "stop")
    assert (cut.finished.finish_reason, cut.finished.completion_tokens) == ("length", 9)
    stopped = asking.ask("where is my order 4512?", Sampling(None, 0.0, 1.0, None, ("will arrive",)))
    assert (stopped.text, stopped.finished.finish_reason) == ("Order 4512 is on its way and ", "stop")
    wait_until_idle(asking.engine)


def test_a_prompt_and_reply_that_fill_the_context_to_the_last_position_are_written(asking: Asking) -> None:
    room = CONTEXT_TOKENS - len(asking.prompt(ENDLESS))
    assert asking.ask(ENDLESS, max_tokens=room).finished.completion_tokens == room


def test_the_same_seed_gives_the_same_text_alone_and_in_any_company(asking: Asking) -> None:
    alone = [asking.ask(UNSURE, sampled(seed), 30).text for seed in range(-1, 9)]
    company = [asking.ask(question, sampled(99), 60) for question in (ENDLESS, "x", *ANSWERS)]
    together = [asking.ask(UNSURE, sampled(seed), 30) for seed in range(-1, 9)]
    assert [client.text for client in together] == alone
    assert len(set(alone)) > 3
    assert all(client.text is not None for client in company)
    assert asking.ask(UNSURE, sampled(3), 30, choice=2).text == asking.ask(UNSURE, sampled(5), 30).text
    assert asking.ask(UNSURE, sampled(2**63 - 1), 30, choice=1).text


def test_without_a_seed_replies_differ(asking: Asking) -> None:
    assert len({client.text for client in [asking.ask(UNSURE, sampled(None), 20) for _ in range(8)]}) > 1


def test_confidence_and_log_probabilities_are_those_of_a_plain_forward_pass(asking: Asking) -> None:
    client = asking.ask(UNSURE, Sampling(None, 0.0, 1.0, None, (), top_logprobs=3))
    prompt = asking.prompt(UNSURE)
    reply = [*asking.tokenizer.encode(client.text, add_special_tokens=False), asking.tokenizer.eos_token_id]
    with torch.inference_mode():
        logits = asking.model(torch.tensor([[*prompt, *reply]])).logits[0, len(prompt) - 1 : -1].float()
    logprobs = torch.log_softmax(logits, -1)
    expected = logprobs[torch.arange(len(reply)), torch.tensor(reply)]
    assert client.finished.confidence == pytest.approx(float(expected.exp().mean()), abs=0.01)
    told = [one for event in client.events if isinstance(event, Delta) for one in event.logprobs]
    assert [one.logprob for one in told] == pytest.approx(expected[:-1].tolist(), abs=1e-3)
    assert [[other.logprob for other in one.top] for one in told] == [
        pytest.approx(row, abs=1e-3) for row in logprobs[:-1].topk(3).values.tolist()
    ]
    assert b"".join(one.text for one in told).decode() == client.text


def test_penalties_and_biases_have_their_effect(asking: Asking) -> None:
    plain = asking.ask(ENDLESS, max_tokens=20).text
    for changes in ({"frequency_penalty": 2.0, "presence_penalty": 2.0}, {"logit_bias": ((80, 100.0),)}):
        assert asking.ask(ENDLESS, Sampling(None, 0.0, 1.0, None, (), **changes), 20).text != plain  # type: ignore[arg-type]
    # A token that is named twice has both biases.
    cancelled = Sampling(None, 0.0, 1.0, None, (), logit_bias=((80, 100.0), (80, -100.0)))
    assert asking.ask(ENDLESS, cancelled, 20).text == plain


def test_a_reply_follows_its_grammar_and_the_next_one_needs_none(asking: Asking) -> None:
    lark = '%llguidance {}\nstart: "rating: " ("good" | "bad") "!"{2,4}\n'
    replies = [asking.ask(UNSURE, sampled(seed, grammar=lark, top_logprobs=5)) for seed in range(6)]
    plain = asking.ask("thank you")
    for client in replies:
        assert client.finished.finish_reason == "stop"
        word = client.text.removeprefix("rating: ").rstrip("!")
        assert word in ("good", "bad")
        told = [one for event in client.events if isinstance(event, Delta) for one in event.logprobs]
        assert all(other.logprob > -1e9 for one in told for other in one.top), "what may not come is not told"
    assert plain.text == ANSWERS["thank you"]
    with pytest.raises(GrammarFailed):
        asking.ask(UNSURE, sampled(0, grammar="%llguidance {}\nstart: ("))
    wait_until_idle(asking.engine)


def test_a_cancelled_reply_frees_its_slot_and_delivers_nothing_more(asking: Asking) -> None:
    client = Client()
    reply = submit(asking.engine, asking.tokenizer, asking.prompt(ENDLESS), GREEDY, 480, client)
    assert client.begun.wait(30)
    assert asking.engine.slots_in_use == 1
    asking.engine.cancel([reply])
    wait_until_idle(asking.engine)
    delivered = len(client.events)
    assert not client.done.is_set()
    assert len(reply.tokens) < 470
    assert asking.ask("thank you").text == ANSWERS["thank you"]
    assert len(client.events) == delivered
    asking.engine.cancel([reply])  # once more changes nothing


def test_more_requests_than_slots_are_all_answered_and_beyond_the_waiting_room_they_are_refused(asking: Asking) -> None:
    clients = [asking.ask(question) for _ in range(5) for question in ANSWERS]
    assert asking.engine.slots_in_use <= SLOTS
    assert [client.text for client in clients] == [answer for _ in range(5) for answer in ANSWERS.values()]
    wait_until_idle(asking.engine)
    prompt, singers = asking.prompt(ENDLESS), Client()
    many = [Reply(prompt, GREEDY, 400, singers, asking.tokenizer.decode) for _ in range(SLOTS + WAITING)]
    asking.engine.prepare(many)
    asking.engine.submit(many)
    with pytest.raises(EngineFull):
        asking.ask("thank you")
    asking.engine.cancel(many)
    wait_until_idle(asking.engine)


def test_parameters_are_those_of_transformers_and_vectors_are_refused(asking: Asking) -> None:
    assert asking.engine.parameters == asking.model.num_parameters()
    with pytest.raises(Unsupported, match="/v1/embeddings"):
        asking.engine.embed([[1, 2]])


def test_each_reply_of_a_batch_is_written_with_its_own_adapter(folder: Path, tmp_path: Path) -> None:
    others = engine_processes()
    answering_model.make_adapter(tmp_path / "polite", folder)
    answering_model.make_adapter(tmp_path / "welcoming", folder, "You are welcome! ", r=4, target_modules=["q_proj"])
    asking = Asking(folder, {"polite": tmp_path / "polite", "welcoming": tmp_path / "welcoming"})
    clients = [(question, asking.ask(question), asking.ask(question, adapter="polite")) for question in ANSWERS]
    welcoming = asking.ask("thank you", adapter="welcoming")
    for question, plain, polite in clients:
        assert (plain.text, polite.text) == (ANSWERS[question], ADAPTED_ANSWERS[question])
    assert welcoming.text.startswith("You are welcome!")
    asking.engine.stop()
    wait_until_processes_are(others)


def test_an_adapter_that_does_not_fit_is_refused_when_the_model_is_loaded(folder: Path, tmp_path: Path) -> None:
    others = engine_processes()
    answering_model.make_adapter(tmp_path, folder)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    name = next(name for name in weights if name.endswith("q_proj.lora_A.weight"))
    save_file({**weights, name: weights[name][:, :32].contiguous()}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="is for 32 inputs"):
        Asking(folder, {"polite": tmp_path})
    wait_until_processes_are(others)


def test_int8_of_bitsandbytes_is_refused_with_what_to_do(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "bitsandbytes"}}')
    tokenizer = models.load_tokenizer(folder)
    with pytest.raises(ModelError, match="int8_per_channel_weight_only"):
        VllmEngine(tmp_path, tokenizer, 400, CONFIG, SLOTS, CONTEXT_TOKENS, WAITING)


def test_what_vllm_refuses_ends_with_its_reason(folder: Path) -> None:
    tokenizer = models.load_tokenizer(folder)
    with pytest.raises(ModelError, match=r"(?s)vLLM cannot serve .*max_model_len"):
        VllmEngine(folder, tokenizer, 400, CONFIG, SLOTS, 10**6, WAITING)


def test_an_engine_whose_process_is_gone_tells_its_clients_and_its_health_check(folder: Path) -> None:
    others = engine_processes()
    asking = Asking(folder)
    client = asking.ask(ENDLESS, max_tokens=480)
    assert client.begun.wait(30)
    (core,) = (process for process in engine_processes() - others if "EngineCore" in process.name())
    core.kill()
    assert client.done.wait(30)
    assert isinstance(client.events[-1], Refused)
    deadline_s = time.monotonic() + 30
    while not asking.engine.failure and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert asking.engine.failure
    with pytest.raises(EngineFull):
        asking.ask("thank you")
    asking.engine.stop()
    wait_until_processes_are(others)
