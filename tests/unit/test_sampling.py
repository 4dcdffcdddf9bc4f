"""Penalties, biases and log-probabilities against OpenAI's formula and plain forward passes."""

import queue
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from app import model as models
from app.conversation import prompt_ids
from app.serving.engine import Engine
from app.serving.sampling import Draw, TokenTexts, choose
from app.serving.schema import Delta, Event, Finished, Sampling, TokenLogprob
from tests import answering_model
from tests.answering_model import ANSWERS, ENDLESS
from tests.engine_replies import submit

VOCABULARY = 9
PENALTIES = st.floats(-2, 2).map(lambda value: round(value, 3))


@given(
    logits=st.lists(st.floats(-8, 8), min_size=VOCABULARY, max_size=VOCABULARY),
    written=st.lists(st.integers(0, VOCABULARY - 1), max_size=12),
    frequency=PENALTIES,
    presence=PENALTIES,
    bias=st.dictionaries(st.integers(0, VOCABULARY - 1), st.floats(-100, 100), max_size=4),
)
def test_the_most_probable_token_is_that_of_openais_formula(
    logits: list[float], written: list[int], frequency: float, presence: float, bias: dict[int, float]
) -> None:
    draw = Draw(Sampling(None, 0.0, 1.0, None, (), frequency, presence, tuple(bias.items())))
    for token in written:
        draw.add(token)
    counts = Counter(written)
    wanted = [
        logit - counts[token] * frequency - (counts[token] > 0) * presence + bias.get(token, 0.0)
        for token, logit in enumerate(logits)
    ]
    plain = Draw(Sampling(None, 0.0, 1.0, None, ()))
    [token, other], [probability, _] = choose(torch.tensor([logits, logits]), [draw, plain])
    assert wanted[token] == pytest.approx(max(wanted), abs=1e-4)
    assert other == int(torch.tensor(logits).argmax()), "that is another reply's business"
    assert probability == pytest.approx(float(torch.softmax(torch.tensor(logits), -1)[token]), abs=1e-6)


class Asking:
    """The tiny model behind an engine."""

    def __init__(self, folder: Path) -> None:
        self.model, self.tokenizer = models.load(folder)
        self.engine = Engine(self.model, self.tokenizer, 4, answering_model.CONTEXT_TOKENS, 100)

    def prompt(self, question: str) -> list[int]:
        return prompt_ids(self.tokenizer, [{"role": "user", "content": question}])

    def ask(self, question: str, max_tokens: int = 60, **sampling: Any) -> tuple[str, list[TokenLogprob], Finished]:
        events: queue.Queue[Event] = queue.Queue()
        settings = Sampling(**{"max_tokens": None, "temperature": 0.0, "top_p": 1.0, "seed": 1, "stop": (), **sampling})
        submit(self.engine, self.tokenizer, self.prompt(question), settings, max_tokens, events.put)
        text, logprobs = "", list[TokenLogprob]()
        while not isinstance(event := events.get(timeout=60), Finished):
            assert isinstance(event, Delta)
            text += event.text
            logprobs += event.logprobs
        return text, logprobs, event

    def logits(self, ids: list[int]) -> torch.Tensor:
        """Of a plain forward pass, (tokens, vocabulary)."""
        with torch.inference_mode():
            found: torch.Tensor = self.model(torch.tensor([ids])).logits[0].float()
        return found.clone()


@pytest.fixture(scope="module")
def asking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asking]:
    folder = tmp_path_factory.mktemp("sampling") / "model"
    answering_model.make(folder)
    asking = Asking(folder)
    yield asking
    asking.engine.stop()


def test_log_probabilities_are_those_of_a_plain_forward_pass(asking: Asking) -> None:
    for question in [*ANSWERS, ENDLESS]:
        text, told, finished = asking.ask(question, top_logprobs=3)
        assert b"".join(one.text for one in told).decode() == text, "characters of several tokens too"
        prompt = asking.prompt(question)
        reply: list[int] = []
        for place, one in enumerate(told):
            logprobs = torch.log_softmax(asking.logits([*prompt, *reply])[-1], -1)
            reply.append(int(logprobs.argmax()))
            assert one.logprob == pytest.approx(float(logprobs[reply[-1]]), abs=1e-3), (question, place)
            best = torch.topk(logprobs, 3)
            assert [other.logprob for other in one.top] == pytest.approx(best.values.tolist(), abs=1e-3)
            texts = TokenTexts(asking.tokenizer)
            assert one.text == texts.text_bytes(reply[-1])
            assert one.top[0].text == one.text
        ends = finished.finish_reason == "stop"
        assert finished.completion_tokens == len(told) + ends, "the end of a reply is no part of its text"


def test_nothing_is_told_unasked_and_sampling_does_not_change_what_the_model_thought(asking: Asking) -> None:
    assert asking.ask("thank you")[1] == []
    text, told, _ = asking.ask("thank you", temperature=2.0, seed=5, top_logprobs=0)
    assert b"".join(one.text for one in told).decode("utf-8", "replace") == text
    assert all(one.top == () and one.logprob <= 0 for one in told)


def test_a_stop_string_takes_its_tokens_with_it(asking: Asking) -> None:
    text, told, finished = asking.ask("where is my order 4512?", stop=("will arrive",), top_logprobs=0)
    assert text == "Order 4512 is on its way and "
    texts = [one.text.decode() for one in told]
    assert "".join(texts).startswith(text)
    assert len("".join(texts[:-1])) < len(text), "the last one begins within the reply"
    assert finished.completion_tokens > len(told)


def test_penalised_replies_are_those_of_a_plain_loop(asking: Asking) -> None:
    """In company, each with its own."""
    penalties = {"frequency_penalty": 1.2, "presence_penalty": 0.7}
    prompt, reply, counts = asking.prompt(ENDLESS), list[int](), Counter[int]()
    while len(reply) < 40:
        logits = asking.logits([*prompt, *reply])[-1]
        for token, count in counts.items():
            logits[token] -= count * 1.2 + 0.7
        reply.append(int(logits.argmax()))
        counts[reply[-1]] += 1
        if reply[-1] == asking.tokenizer.eos_token_id:
            break
    wanted = asking.tokenizer.decode(reply, skip_special_tokens=True)
    plain = asking.ask(ENDLESS, max_tokens=40)[0]
    assert asking.ask(ENDLESS, max_tokens=40, **penalties)[0] == wanted
    assert wanted != plain
    assert asking.ask(ENDLESS, max_tokens=40)[0] == plain


def test_biases_forbid_and_force_tokens(asking: Asking) -> None:
    text, told, _ = asking.ask("thank you", top_logprobs=0)
    first = asking.tokenizer.encode(text, add_special_tokens=False)[0]
    without, _, _ = asking.ask("thank you", logit_bias=((first, -100.0),))
    assert not without.startswith(told[0].text.decode())
    forced, _, _ = asking.ask("thank you", max_tokens=5, logit_bias=((first, 100.0),))
    assert forced == told[0].text.decode() * 5
