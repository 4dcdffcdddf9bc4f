"""Answers in whose making something unforeseen happens in another deployment."""

import asyncio
import json
import logging
import time
from collections.abc import Sequence
from typing import Any

import pytest

from app.serving import limits
from app.serving.answer import Answer
from app.serving.answering import Answering
from app.serving.functions import Functions
from app.serving.ledger import Granted, Reservation
from app.serving.schema import AnswerRequest, Conclusion, Delta, Insight, Refused, Sampling, Started
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


class Writes(Calls):
    """A language model that sends these events."""

    def options(self, **_: Any) -> "Writes":
        return self

    def remote(self, *_: Any) -> Any:
        async def events() -> Any:
            for event in self._outcome:
                if event is None:
                    await asyncio.Event().wait()
                yield event

        return Source(events())


class Source:
    """A streamed call."""

    def __init__(self, events: Any) -> None:
        self.events = events

    def __aiter__(self) -> Any:
        return self.events

    def cancel(self) -> None:
        """Nothing."""


class Log(Calls):
    """Response management that keeps what it is given."""

    def __init__(self) -> None:
        super().__init__(Conclusion("", None))
        self.drafts: list[Any] = []

    def remote(self, draft: Any) -> "asyncio.Task[Any]":
        self.drafts.append(draft)
        return super().remote()


def spent(events: Sequence[Any], read: int | None = None) -> tuple[list[Any], int | None]:
    """Drafts that were logged, and tokens that were spent, of a stream whose client leaves after so many lines."""
    log = Log()

    async def answer() -> int | None:
        visit = limits.Visit(Granted(None, None, Reservation("a", 0, 0, "l")), 100)  # type: ignore[arg-type]
        limits.visiting(visit)
        asked = refused(stream=True)
        asked.rule = None
        answering = Answering(log, functions(), 1.0)  # type: ignore[arg-type]
        response: Any = await answering.answer(asked, [(VARIANT, Writes(events))])  # type: ignore[list-item]
        lines = 0
        async for _ in response.body_iterator:
            lines += 1
            if lines == read:
                break
        await response.body_iterator.aclose()
        await asyncio.sleep(0.05)
        return visit.spent_tokens

    return log.drafts, asyncio.run(answer())


def test_a_reply_that_is_refused_after_it_has_begun_is_logged_and_costs_nothing() -> None:
    drafts, tokens = spent([Started(5), Delta("Hel", tokens=2), Refused(500, "no", "server_error")])
    assert [(draft.status, draft.reply, draft.completion_tokens) for draft in drafts] == [("error", "Hel", 2)]
    assert tokens == 0


def test_a_client_that_leaves_has_spent_the_tokens_that_were_written_for_it() -> None:
    drafts, tokens = spent([Started(5), Delta("Hello " * 40, tokens=40), Delta("you", tokens=3), None], read=3)
    assert [(draft.status, draft.completion_tokens) for draft in drafts] == [("cancelled", 43)]
    assert tokens == 48
