"""The oracle is transformers' own `generate`, one request at a time."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from app import model as models
from app.conversation import prompt_ids
from app.errors import ModelError
from app.serving.engine import Engine
from app.serving.engines import EngineFull
from app.serving.fixed_passes import FixedPasses
from app.serving.flat_passes import FlatPasses
from app.serving.passes import FittingPasses
from app.serving.prefix_cache import BLOCK_TOKENS
from app.serving.sampling import Draw, choose
from app.serving.schema import Refused, Sampling
from tests import answering_model
from tests.answering_model import ANSWERS, ENDLESS, UNSURE
from tests.engine_replies import GREEDY, Client, submit


class Asking:
    """An engine with the tokenizer that questions need."""

    def __init__(self, folder: Path, slots: int = 4, max_waiting: int = 100, passes: Any = None) -> None:
        self.model, self.tokenizer = models.load(folder)
        context = answering_model.CONTEXT_TOKENS
        self.engine = Engine(self.model, self.tokenizer, slots, context, max_waiting, 10_000_000, passes)

    def prompt(self, question: str) -> list[int]:
        return prompt_ids(self.tokenizer, [{"role": "user", "content": question}])

    def ask(self, question: str, sampling: Sampling = GREEDY, max_tokens: int = 100) -> Client:
        client = Client()
        submit(self.engine, self.tokenizer, self.prompt(question), sampling, max_tokens, client)
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
def float_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine") / "float"
    answering_model.make(folder)
    return folder


@pytest.fixture(scope="module", params=["float32", "int8", "fixed", "fitting"])
def asking(request: pytest.FixtureRequest, float_folder: Path, model_folder: Path) -> Iterator[Asking]:
    """On passes that fit, and on those of unchanging shapes that a GPU gets."""
    folder = model_folder if request.param == "int8" else float_folder
    asking = Asking(folder, passes={"fixed": FixedPasses, "fitting": FittingPasses}.get(request.param))
    yield asking
    asking.engine.stop()


def wait_until_idle(engine: Engine) -> None:
    deadline_s = time.monotonic() + 30
    while engine.slots_in_use and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert engine.slots_in_use == 0


def test_replies_batched_with_others_are_those_of_generate_alone(asking: Asking) -> None:
    questions = [*ANSWERS, ENDLESS, "an unknown question, longer than the others " * 3, "x", UNSURE]
    lengths = [100, 30, 100, 7, 100, 1, 64, 40, 90, 100]
    clients = [asking.ask(question, max_tokens=length) for question, length in zip(questions, lengths, strict=True)]
    for question, length, client in zip(questions, lengths, clients, strict=True):
        assert client.text == asking.generated(question, length), question


def test_a_reply_ends_at_the_end_token_or_at_its_limit_and_says_which(asking: Asking) -> None:
    ended, cut = asking.ask("thank you"), asking.ask(ENDLESS, max_tokens=9)
    assert (ended.text, ended.finished.finish_reason) == (ANSWERS["thank you"], "stop")
    assert (cut.finished.finish_reason, cut.finished.completion_tokens) == ("length", 9)


def test_a_prompt_and_reply_that_fill_the_context_to_the_last_position_are_written(asking: Asking) -> None:
    room = answering_model.CONTEXT_TOKENS - len(asking.prompt(ENDLESS))
    client = asking.ask(ENDLESS, max_tokens=room)
    assert client.finished.completion_tokens == room
    assert client.text == asking.generated(ENDLESS, room)


def test_a_stop_string_ends_the_reply(asking: Asking) -> None:
    client = asking.ask("where is my order 4512?", Sampling(None, 0.0, 1.0, None, ("will arrive",)))
    assert client.text == "Order 4512 is on its way and "
    assert client.finished.finish_reason == "stop"


def test_the_same_seed_gives_the_same_text_alone_and_in_any_company(asking: Asking) -> None:
    def sampling(seed: int) -> Sampling:
        return Sampling(None, 1.5, 0.95, seed, ())

    alone = [asking.ask(UNSURE, sampling(seed), 30).text for seed in range(12)]
    company = [asking.ask(question, sampling(99), 60) for question in (ENDLESS, "x", *ANSWERS)]
    together = [asking.ask(UNSURE, sampling(seed), 30) for seed in range(12)]
    assert [client.text for client in together] == alone
    assert len(set(alone)) > 3
    assert all(client.text is not None for client in company)


def test_without_a_seed_replies_differ(asking: Asking) -> None:
    sampling = Sampling(None, 1.5, 1.0, None, ())
    assert len({client.text for client in [asking.ask(UNSURE, sampling, 20) for _ in range(8)]}) > 1


def test_confidence_is_the_mean_probability_of_the_tokens_in_a_plain_forward_pass(asking: Asking) -> None:
    question = UNSURE
    client = asking.ask(question)
    prompt = asking.prompt(question)
    reply = [*asking.tokenizer.encode(client.text, add_special_tokens=False), asking.tokenizer.eos_token_id]
    with torch.inference_mode():
        logits = asking.model(torch.tensor([[*prompt, *reply]])).logits[0, len(prompt) - 1 : -1].float()
    expected = torch.softmax(logits, -1)[torch.arange(len(reply)), torch.tensor(reply)].mean()
    assert client.finished.confidence == pytest.approx(float(expected), abs=0.02)
    assert client.finished.confidence < asking.ask("thank you").finished.confidence


def test_a_prompt_that_begins_like_an_earlier_one_is_read_from_there_and_nothing_else_changes(asking: Asking) -> None:
    alike = "please " * 70
    alone = [asking.generated(f"{alike}{question}", 20) for question in ANSWERS]
    for scope, is_new in (("one", True), ("one", False), ("other", True)):
        for place, question in enumerate(ANSWERS):
            client = Client()
            prompt = asking.prompt(f"{alike}{question}")
            submit(asking.engine, asking.tokenizer, prompt, GREEDY, 20, client, scope=scope)
            assert client.text == alone[place]
            known = 0 if is_new and place == 0 else (len(asking.prompt(alike)) - 2) // BLOCK_TOKENS * BLOCK_TOKENS
            assert client.finished.cached_tokens == known


def test_a_cancelled_reply_frees_its_slot_and_delivers_nothing_more(asking: Asking) -> None:
    client = Client()
    reply = submit(asking.engine, asking.tokenizer, asking.prompt(ENDLESS), GREEDY, 480, client)
    assert client.begun.wait(30)
    asking.engine.cancel([reply])
    wait_until_idle(asking.engine)
    delivered = len(client.events)
    assert not client.done.is_set()
    assert asking.ask("thank you").text == ANSWERS["thank you"]
    assert len(client.events) == delivered


def test_more_requests_than_slots_are_all_answered(asking: Asking) -> None:
    clients = [asking.ask(question) for _ in range(5) for question in ANSWERS]
    assert [client.text for client in clients] == [answer for _ in range(5) for answer in ANSWERS.values()]


def test_a_request_beyond_the_waiting_room_is_refused_at_once(float_folder: Path) -> None:
    asking = Asking(float_folder, slots=1, max_waiting=1)
    singing, waiting = asking.ask(ENDLESS, max_tokens=400), asking.ask("thank you")
    with pytest.raises(EngineFull):
        asking.ask("thank you")
    assert waiting.text == ANSWERS["thank you"]
    assert singing.finished.completion_tokens == 400
    asking.engine.stop()


def test_an_engine_that_breaks_tells_its_clients_and_its_health_check(float_folder: Path) -> None:
    asking = Asking(float_folder)
    client = asking.ask(ENDLESS, max_tokens=400)
    assert client.begun.wait(30)
    broken = Client()
    submit(asking.engine, asking.tokenizer, [10**9], GREEDY, 5, broken)  # no such token: the embedding raises
    for each in (client, broken):
        assert each.done.wait(30)
        assert isinstance(each.events[-1], Refused)
    assert isinstance(asking.engine.failure, IndexError)
    with pytest.raises(EngineFull):
        asking.ask("thank you")


@pytest.mark.parametrize("passes", [FlatPasses, FittingPasses, FixedPasses])
def test_a_token_whose_weights_are_no_numbers_costs_nobody_else_a_reply(float_folder: Path, passes: Any) -> None:
    _, tokenizer = models.load(float_folder)
    torch.manual_seed(1)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    net = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), eos_token_id=1, **shape)).eval()
    harmless = [[5, 6, 7], [9, 8, 7, 6, 5, 4], [token % 30 + 100 for token in range(70)]]
    with torch.inference_mode():
        net.get_input_embeddings().weight[50] = torch.nan
    expected = plain(net, harmless)
    engine = Engine(net, tokenizer, 2, 256, 20, 0, passes)

    def written(prompts: Sequence[list[int]]) -> tuple[list[Client], list[Any]]:
        clients = [Client() for _ in prompts]
        requests = [
            submit(engine, tokenizer, prompt, GREEDY, 20, client)
            for prompt, client in zip(prompts, clients, strict=True)
        ]
        return clients, requests

    for damaged in ([5, 50, 7, 8], [50, *[token % 30 + 60 for token in range(150)]]):
        (refused, *clients), (_, *requests) = written([damaged, *harmless])
        assert refused.done.wait(30)
        assert isinstance(refused.events[-1], Refused)
        assert (refused.events[-1].status, refused.text) == (500, "")
        assert "no number for this text" in refused.events[-1].what
        _, (left,) = written([damaged])
        engine.cancel([left])
        more, others = written([*harmless, *harmless])
        assert all(client.done.wait(30) for client in [*clients, *more])
        assert [request.tokens for request in [*requests, *others]] == expected * 3
    for temperature in (0.0, 1.0):  # what is drawn may be what the grammar forbids
        client = Client()
        sampling = Sampling(None, temperature, 1.0, 0, (), grammar="%llguidance {}\nstart: %json {}\n")
        submit(engine, tokenizer, [5, 50], sampling, 20, client)
        assert client.done.wait(30)
        assert isinstance(client.events[-1], Refused)
        assert client.events[-1].status == 500
    with pytest.raises(ModelError, match="no number for this text"):
        engine.embed([[5, 50]])[0].result(60)
    engine.stop()
    assert engine.failure is None


def test_a_model_with_learned_positions_and_another_layout_is_served_alike(float_folder: Path) -> None:
    _, tokenizer = models.load(float_folder)
    torch.manual_seed(1)
    net = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=128, n_embd=32, n_layer=2, n_head=2))
    assert replies(net.eval(), tokenizer, [[5, 6, 7], [9, 8, 7, 6, 5, 4]]) == plain(
        net, [[5, 6, 7], [9, 8, 7, 6, 5, 4]]
    )


def test_a_model_with_grouped_heads_is_served_alike(float_folder: Path) -> None:
    _, tokenizer = models.load(float_folder)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    net = LlamaForCausalLM(config).eval()
    assert replies(net, tokenizer, [[5, 6, 7], [9, 8, 7, 6, 5, 4]]) == plain(net, [[5, 6, 7], [9, 8, 7, 6, 5, 4]])


def test_heads_that_are_too_large_for_the_quick_attention_are_attended_to_by_torchs(float_folder: Path) -> None:
    _, tokenizer = models.load(float_folder)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=520, max_position_embeddings=256,
    )  # fmt: skip
    net = LlamaForCausalLM(config).eval()
    assert FlatPasses.takes(net)
    long = [token % 50 + 5 for token in range(100)]
    assert replies(net, tokenizer, [[5, 6, 7], long], 256) == plain(net, [[5, 6, 7], long])


class FewAtOnce(FlatPasses):
    prompt_tokens = 64


def test_who_came_first_is_read_first(float_folder: Path) -> None:
    asking = Asking(float_folder, slots=3, passes=FewAtOnce)
    clients = [Client() for _ in range(12)]
    requests = [
        submit(asking.engine, asking.tokenizer, [number + 5] * 60, GREEDY, 1, client)
        for number, client in enumerate(clients)
    ]
    assert all(client.done.wait(30) for client in clients)
    asking.engine.stop()
    told = [request.first_token_s for request in requests]
    assert told == sorted(told)


def test_a_model_without_a_key_value_cache_is_refused_when_it_is_loaded(float_folder: Path) -> None:
    _, tokenizer = models.load(float_folder)
    net = MambaForCausalLM(MambaConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, state_size=4))
    with pytest.raises(ModelError, match="MambaForCausalLM"):
        Engine(net.eval(), tokenizer, 2, 64, 2)


def replies(
    net: PreTrainedModel, tokenizer: Any, prompts: Sequence[list[int]], context_tokens: int = 64
) -> list[list[int]]:
    engine = Engine(net, tokenizer, 2, context_tokens, 4)
    clients, requests = [Client() for _ in prompts], []
    for prompt, client in zip(prompts, clients, strict=True):
        requests.append(submit(engine, tokenizer, prompt, GREEDY, 20, client))
    assert all(client.done.wait(30) for client in clients)
    engine.stop()
    return [request.tokens for request in requests]


def plain(net: PreTrainedModel, prompts: Sequence[list[int]]) -> list[list[int]]:
    """Greedy tokens, each from a forward pass over everything before it."""
    written = []
    for prompt in prompts:
        ids = list(prompt)
        with torch.inference_mode():
            for _ in range(20):
                ids.append(int(net(torch.tensor([ids])).logits[0, -1].argmax()))
                if ids[-1] == 1:  # the tokenizer's end token
                    break
        written.append(ids[len(prompt) :])
    return written


class Fixed:
    """A generator that draws one number again and again."""

    def __init__(self, number: float) -> None:
        self.number = number

    def random(self) -> float:
        return self.number


@pytest.mark.parametrize(
    ("top_p", "drawn", "token"),
    [
        (1.0, 0.0, 0),
        (1.0, 0.29, 0),
        (1.0, 0.31, 1),
        (1.0, 0.51, 2),
        (1.0, 1 - 1e-12, 2),
        (0.45, 0.9999, 2),
        (0.75, 0.9999, 0),
    ],
)
def test_a_number_picks_the_token_in_whose_share_of_the_kept_probability_it_falls(
    top_p: float, drawn: float, token: int
) -> None:
    logits = torch.log(torch.tensor([[0.3, 0.2, 0.5]]))
    tokens, probabilities = choose(logits, [Draw(Sampling(None, 1.0, top_p, None, ()), generator=Fixed(drawn))])
    assert tokens == [token]
    assert probabilities == pytest.approx([[0.3, 0.2, 0.5][token]])


@pytest.mark.parametrize("top_p", [1.0, 0.999_999])
def test_no_number_picks_a_token_that_cannot_be(top_p: float) -> None:
    logits = torch.tensor([[-torch.inf, 1.0, -torch.inf, 1.0, -torch.inf]])
    for drawn in (0.0, 0.5, 1 - 2**-53):
        tokens, _ = choose(logits, [Draw(Sampling(None, 1.0, top_p, None, ()), generator=Fixed(drawn))])
        assert tokens in ([1], [3])


def test_sampled_tokens_follow_the_temperature() -> None:
    import random

    draw = random.Random(0)
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    counts = [0, 0, 0]
    for _ in range(4000):
        counts[choose(logits, [Draw(Sampling(None, 2.0, 1.0, None, ()), generator=draw)])[0][0]] += 1
    expected = torch.softmax(logits[0] / 2, -1).tolist()
    assert [count / 4000 for count in counts] == pytest.approx(expected, abs=0.03)


def test_a_vanishing_temperature_takes_the_most_probable_token() -> None:
    logits = torch.tensor([[0.0, 1000.0, 999.0]])
    assert choose(logits, [Draw(Sampling(None, 1e-30, 1.0, 0, ()), generator=Fixed(0.999))])[0] == [1]


@pytest.mark.parametrize(("temperature", "top_p"), [(1e-46, 1.0), (1.0, 1e-46), (1e-46, 1e-46)])
def test_what_is_no_number_of_32_bits_takes_the_most_probable_token(temperature: float, top_p: float) -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    draw = Draw(Sampling(None, temperature, top_p, 1, ()))
    assert choose(logits, [draw])[0] == [1]


def test_a_model_that_sees_less_than_the_context_is_refused(float_folder: Path) -> None:
    _, tokenizer = models.load(float_folder)
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2,
    }  # fmt: skip
    windowed = MistralForCausalLM(MistralConfig(**shape, sliding_window=32, max_position_embeddings=128))
    with pytest.raises(ModelError, match="sliding window of 32"):
        Engine(windowed.eval(), tokenizer, 2, 64, 2)
    short = LlamaForCausalLM(LlamaConfig(**shape, max_position_embeddings=48))
    with pytest.raises(ModelError, match="knows 48 positions"):
        Engine(short.eval(), tokenizer, 2, 64, 2)
