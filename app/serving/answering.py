"""Answers from the first token to the log: collected or streamed, settled, and recorded whatever happens."""

import asyncio
import contextvars
import logging
import time
from collections.abc import AsyncGenerator, Coroutine, Sequence
from typing import Any, Literal

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from app.errors import RequestError
from app.serving import limits, openai_format
from app.serving.answer import Answer
from app.serving.functions import Functions
from app.serving.models import version_gone
from app.serving.schema import Conclusion, Delta, Event, Finished, Refused, Started
from app.settings.serving import VariantConfig
from app.telemetry import (
    COMPLETION_TOKENS,
    END_TO_END_LATENCY,
    PROMPT_TOKENS,
    TIME_TO_FIRST_TOKEN,
    counter,
    histogram,
)

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 60.0
"""How long a question waits for a language model to accept it before the client reads 503."""


class Answering:
    """Makes answers with a language model, functions and response management."""

    def __init__(self, response: "DeploymentHandle[Any]", functions: Functions, fallback_after_s: float) -> None:
        self._response, self._functions, self._fallback_after_s = response, functions, fallback_after_s
        self.heard_s: dict[str, float] = {}
        """By `VariantConfig.deployment`, when its model last wrote something."""
        self._background: set[asyncio.Task[Any]] = set()
        self._waking: dict[str, asyncio.Task[Any]] = {}
        """By deployment, what ends once a replica of it is there."""
        self._time_to_first_token, self._latency = histogram(TIME_TO_FIRST_TOKEN), histogram(END_TO_END_LATENCY)
        self._prompt_tokens, self._completion_tokens = counter(PROMPT_TOKENS), counter(COMPLETION_TOKENS)

    async def answer(
        self, answer: Answer, language_models: Sequence[tuple[VariantConfig, "DeploymentHandle[Any]"]]
    ) -> Response:
        """The HTTP response: JSON, or a stream of events once a language model has accepted the question.

        Args:
            language_models: To be asked in turn, the next one if one does not accept the question soon.

        Raises:
            RequestError: The language model or response management refused.
            RayError, TimeoutError: A replica is gone.
        """
        events = self._refused(answer) if answer.rule else await self._begun(answer, language_models)
        if answer.insight is None and answer.request.endpoint == "chat":
            # Not before the language model has the question: the customer waits for its first token, not for these.
            answer.insight = self._functions.ask(answer.request.question, answer.variant.name)
        headers = {"x-rayloop-variant": answer.variant.name}
        if answer.request.stream:
            return _EventStream(self._stream(answer, events), headers=headers, media_type="text/event-stream")
        async for event in events:
            answer.take(event)
        conclusion = await self._conclude(answer)
        for reply in answer.replies:
            reply.choice.text += conclusion.added
        choices = [reply.choice for reply in answer.replies]
        ours = answer.ours(conclusion)
        return JSONResponse(answer.frame.whole(choices, answer.usage, ours), headers=headers)

    async def _begun(
        self, answer: Answer, language_models: Sequence[tuple[VariantConfig, "DeploymentHandle[Any]"]]
    ) -> AsyncGenerator[Event, None]:
        """The events of the first language model that accepts the question, behind that."""
        for place, (variant, handle) in enumerate(language_models, start=1):
            answer.is_trial = place < len(language_models)
            if answer.is_trial and variant.deployment in self._waking:
                continue
            answer.variant = variant
            events = self._events(answer, handle)
            try:
                async with asyncio.timeout(self._fallback_after_s if answer.is_trial else START_TIMEOUT_S):
                    answer.take(await anext(events))
                answer.is_trial = False
                return events
            except (TimeoutError, RayError, RayServeException):
                if not answer.is_trial:
                    raise
                self._wake(variant.deployment, handle)
            except RequestError as error:
                if not answer.is_trial or error.status not in (429, 503):
                    raise
        raise AssertionError("the last one is no trial")

    def _wake(self, variant: str, handle: "DeploymentHandle[Any]") -> None:
        """Keep one request waiting for a variant, so that a replica of it is started, and notice when it is there."""
        if variant not in self._waking:
            self._waking[variant] = self._in_background(self._ready(variant, handle))

    async def _ready(self, variant: str, handle: "DeploymentHandle[Any]") -> None:
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await handle.ready.remote()
        except (TimeoutError, RayError, RayServeException) as error:
            logger.warning("variant %s is not there yet: %s", variant, type(error).__name__)
        finally:
            del self._waking[variant]

    async def _refused(self, answer: Answer) -> AsyncGenerator[Event, None]:
        """What a rule says instead of a language model."""
        assert answer.rule
        for choice in range(len(answer.replies)):
            yield Delta(answer.rule.message, choice=choice)
            yield Finished("content_filter", 0, 1.0, 0.0, choice)

    async def _events(self, answer: Answer, language_model: "DeploymentHandle[Any]") -> AsyncGenerator[Event, None]:
        """The language model's events. An answer that breaks off is cancelled and recorded."""
        source: Any = language_model.options(stream=True, session_id=answer.session).generate.remote(
            answer.request.generation(answer.scope, answer.variant.adapter)
        )
        has_begun = False
        try:
            async for event in source:
                self.heard_s[answer.variant.deployment] = time.monotonic()
                if isinstance(event, Refused):
                    answer.settled = not (answer.is_trial or has_begun)  # else there is nothing to record
                    raise RequestError(event.status, event.what, event.code, event.param)
                if isinstance(event, Started) and answer.is_outdated(event):
                    source.cancel()
                    answer.settled = True
                    raise version_gone(answer.request.model)
                has_begun = True
                yield event
            if not answer.is_finished:
                raise RequestError(503, "the language model stopped in mid-reply; try again", "service_unavailable")
        except Exception:  # over gRPC what a model raises arrives as it is
            self._record_broken(answer, "error")
            raise
        except (asyncio.CancelledError, GeneratorExit):
            source.cancel()
            self._record_broken(answer, "cancelled")
            raise

    async def _stream(self, answer: Answer, events: AsyncGenerator[Event, None]) -> AsyncGenerator[bytes, None]:
        frame = answer.frame
        try:
            for index in range(len(answer.replies)):
                if begun := frame.begin(index):
                    yield openai_format.event(begun)
            async for event in events:
                pieces = answer.take(event)
                if isinstance(event, Delta | Finished):
                    logprobs = event.logprobs if isinstance(event, Delta) else ()
                    for chunk in frame.chunks(event.choice, pieces, logprobs):
                        yield openai_format.event(chunk)
            conclusion = await self._conclude(answer)
            ours = answer.ours(conclusion)
            for index, reply in enumerate(answer.replies):
                for chunk in frame.chunks(index, [conclusion.added] if conclusion.added else [], ()):
                    yield openai_format.event(chunk)
                yield openai_format.event(frame.end(index, reply.choice.finish_reason, ours))
            if answer.request.include_usage:
                yield openai_format.event(frame.usage(answer.usage, ours))
            yield openai_format.DONE
        except RequestError as error:
            yield openai_format.event(openai_format.error(error.status, str(error), error.code, error.param))
        except (RayError, RayServeException):
            what = "a part of the service was restarted in mid-reply; try again"
            yield openai_format.event(openai_format.error(503, what, "service_unavailable"))
        except Exception:  # the gate logs where; it can tell the client nothing any more
            yield openai_format.event(openai_format.error(500, openai_format.UNEXPECTED, "server_error"))
            raise
        finally:
            await events.aclose()

    async def _conclude(self, answer: Answer) -> Conclusion:
        """Have the answer settled and logged. A client that leaves meanwhile does not stop that."""
        answer.settled = True
        limits.spend(answer.prompt_tokens + answer.completion_tokens)
        settling = self._in_background(self._settle(answer, "ok"))
        conclusion: Conclusion | Refused = await asyncio.shield(settling)
        if isinstance(conclusion, Refused):
            raise RequestError(conclusion.status, conclusion.what, conclusion.code, conclusion.param)
        tags = {"variant": answer.variant.name}
        self._time_to_first_token.observe(answer.first_token_s or 0.0, tags)
        self._latency.observe(time.monotonic() - answer.begun_s, tags)
        if answer.prompt_tokens:
            self._prompt_tokens.inc(answer.prompt_tokens, tags)
        if answer.completion_tokens:
            self._completion_tokens.inc(answer.completion_tokens, tags)
        return conclusion

    def _record_broken(self, answer: Answer, status: Literal["cancelled", "error"]) -> None:
        if answer.insight and not answer.is_trial:
            answer.insight.cancel()
        if not answer.settled and not answer.is_trial:
            answer.settled = True
            if status == "error" or answer.request.stream:  # else nobody knows how much was written
                limits.spend(0 if status == "error" else answer.prompt_tokens + answer.completion_tokens)
            self._in_background(self._settle(answer, status))

    async def _settle(self, answer: Answer, status: Literal["ok", "cancelled", "error"]) -> Conclusion | Refused:
        if answer.insight and status == "ok":
            answer.known = await answer.insight
        settled: Conclusion | Refused = await self._response.conclude.remote(answer.draft(status))
        return settled

    def _in_background(self, work: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
        # An empty context: Serve cancels the calls that a cancelled request made, which it knows by the context.
        task = asyncio.get_running_loop().create_task(work, context=contextvars.Context())
        self._background.add(task)
        task.add_done_callback(self._forget)
        return task

    def _forget(self, task: "asyncio.Task[Any]") -> None:
        self._background.discard(task)
        if not task.cancelled() and (error := task.exception()):
            logger.error("an answer was not recorded: %s", type(error).__name__)


class _EventStream(StreamingResponse):
    """Server-sent events whose source is closed at once when the client leaves."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            if isinstance(self.body_iterator, AsyncGenerator):
                await self.body_iterator.aclose()
