"""Answers in whose making something unforeseen happens in another deployment."""

import asyncio
import json
import logging
import time
from typing import Any

import pytest

from app.serving.answer import Answer
from app.serving.answering import Answering
from app.serving.functions import Functions
from app.serving.schema import AnswerRequest, Conclusion, Insight, Sampling
from app.settings.serving import RuleConfig, VariantConfig

VARIANT = VariantConfig(name="champion", version="1", uri="u")


class Calls:
    """A handle whose calls, of any method, end with this."""

    def __init__(self, outcome: Any) -> None:
        self._outcome = outcome

    def __getattr__(self, method: str) -> "Calls":
        return self

    def remote(self, *_: Any) -> "asyncio.Task[Any]":
        async def call() -> Any:
            if isinstance(self._outcome, Exception):
                raise self._outcome
            return self._outcome

        return asyncio.ensure_future(call())


def functions(**outcomes: Any) -> Functions:
    return Functions({name: Calls(outcome) for name, outcome in outcomes.items()}, 1.0)  # type: ignore[misc]


def refused(stream: bool) -> Answer:
    """One that a rule gives, so no language model is asked."""
    sampling = Sampling(None, 0.0, 1.0, None, ())
    request = AnswerRequest("chat", "support", ((),), (), "bomb?", sampling, 1, stream, False, None)
    rule = RuleConfig(name="weapons", message="I cannot help with that.", patterns=("bomb",))
    return Answer("r", "t", time.monotonic(), request, VARIANT, None, None, rule=rule)


async def streamed(answering: Answering, answer: Answer) -> tuple[list[str], Exception | None]:
    """What the client reads, and what the gate sees."""
    response: Any = await answering.answer(answer, [])
    lines: list[str] = []
    try:
        async for part in response.body_iterator:
            lines.append(part.decode().strip().removeprefix("data: "))
    except Exception as error:
        return lines, error
    return lines, None


def test_a_stream_that_cannot_be_settled_says_so_before_it_breaks_off() -> None:
    async def asked() -> tuple[list[str], Exception | None]:
        answering = Answering(Calls(ZeroDivisionError()), functions(), 1.0)  # type: ignore[arg-type]
        return await streamed(answering, refused(stream=True))

    lines, error = asyncio.run(asked())
    assert "I cannot help with that." in "".join(lines)
    assert json.loads(lines[-1])["error"]["type"] == "server_error"
    assert isinstance(error, ZeroDivisionError)


def test_a_function_that_fails_is_known_nothing_of_and_the_answer_is_given(caplog: pytest.LogCaptureFixture) -> None:
    async def asked() -> tuple[list[str], Exception | None, Insight]:
        broken = functions(intent=ZeroDivisionError("my number is 4512"), sentiment=0.5)
        answering = Answering(Calls(Conclusion("", None)), broken, 1.0)  # type: ignore[arg-type]
        answer = refused(stream=True)
        return *await streamed(answering, answer), answer.known

    with caplog.at_level(logging.ERROR):
        lines, error, known = asyncio.run(asked())
    assert (lines[-1], error) == ("[DONE]", None)
    assert known == Insight(None, 0.5)
    assert "function intent failed: ZeroDivisionError" in caplog.text
    assert "4512" not in caplog.text
