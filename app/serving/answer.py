"""One answer from the first token to the log: collected or streamed, settled, and recorded whatever happens."""

import asyncio
import contextvars
import logging
import time
from collections.abc import AsyncGenerator, Coroutine
from dataclasses import dataclass, field
from typing import Any, Literal

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from app.errors import RequestError
from app.serving import limits, openai_format
from app.serving.schema import (
    ChatRequest,
    Conclusion,
    Delta,
    Draft,
    Event,
    Finished,
    GenerationRequest,
    Intent,
    Refused,
    Started,
    TokenLogprob,
)
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


@dataclass
class Answer:
    """An answer in the making."""

    response_id: str
    received_at: str
    begun_s: float
    """time.monotonic() when the request came in"""
    request: ChatRequest
    variant: VariantConfig
    intent: Intent | None
    user_hash: str | None
    pieces: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_tokens: int = 0
    first_token_s: float | None = None
    finished: Finished | None = None
    settled: bool = False
    """Whether it has been handed to response management."""

    @property
    def reply(self) -> str:
        """What the model has written so far."""
        return "".join(self.pieces)

    @property
    def tells_logprobs(self) -> bool:
        """Whether the client asked what the model thought of its tokens."""
        return self.request.sampling.top_logprobs is not None

    @property
    def format(self) -> openai_format.Reply:
        """The frame of everything sent to the client."""
        created = int(time.time() - (time.monotonic() - self.begun_s))
        version = f"{self.variant.model}/{self.variant.version}"
        return openai_format.Reply(self.response_id, created, version, self.variant.name)

    def take(self, event: Event) -> None:
        """Note what the language model sent."""
        if isinstance(event, Started):
            self.prompt_tokens = event.prompt_tokens
        elif isinstance(event, Delta):
            if self.first_token_s is None:
                self.first_token_s = time.monotonic() - self.begun_s
            self.pieces.append(event.text)
            self.logprobs += event.logprobs
        elif isinstance(event, Finished):
            self.finished = event
            if not self.request.stream or self.first_token_s is None:
                self.first_token_s = event.time_to_first_token_s

    def draft(self, status: Literal["ok", "cancelled", "error"]) -> Draft:
        """All there is to know of it now."""
        return Draft(
            response_id=self.response_id,
            received_at=self.received_at,
            variant=self.variant.name,
            model_version=f"{self.variant.model}/{self.variant.version}",
            model_uri=self.variant.uri,
            messages=self.request.messages,
            reply=self.reply,
            intent=self.intent,
            status=status,
            finish_reason=self.finished.finish_reason if self.finished else status,
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.finished.completion_tokens if self.finished else 0,
            confidence=self.finished.confidence if self.finished else None,
            time_to_first_token_s=self.first_token_s,
            end_to_end_s=time.monotonic() - self.begun_s,
            stream=self.request.stream,
            user_hash=self.user_hash,
            metadata=self.request.metadata,
        )


class Answering:
    """Makes answers with a language model and response management."""

    def __init__(self, response: "DeploymentHandle[Any]") -> None:
        self._response = response
        self._background: set[asyncio.Task[Any]] = set()
        self._time_to_first_token, self._latency = histogram(TIME_TO_FIRST_TOKEN), histogram(END_TO_END_LATENCY)
        self._prompt_tokens, self._completion_tokens = counter(PROMPT_TOKENS), counter(COMPLETION_TOKENS)

    async def answer(self, answer: Answer, language_model: "DeploymentHandle[Any]") -> Response:
        """The HTTP response: JSON, or a stream of events once the language model has accepted the question.

        Raises:
            RequestError: The language model or response management refused.
            RayError, TimeoutError: A replica is gone.
        """
        events = self._events(answer, language_model)
        async with asyncio.timeout(START_TIMEOUT_S):
            await anext(events)
        headers = {"x-rayloop-variant": answer.variant.name}
        if answer.request.stream:
            return _EventStream(self._stream(answer, events), headers=headers, media_type="text/event-stream")
        async for _ in events:
            pass
        conclusion = await self._conclude(answer)
        assert answer.finished
        text = answer.reply + conclusion.added
        return JSONResponse(
            answer.format.completion(
                text,
                answer.prompt_tokens,
                answer.finished,
                conclusion,
                answer.intent,
                openai_format.logprobs(answer.logprobs) if answer.tells_logprobs else None,
            ),
            headers=headers,
        )

    async def _events(self, answer: Answer, language_model: "DeploymentHandle[Any]") -> AsyncGenerator[Event, None]:
        """The language model's events, noted in `answer`. An answer that breaks off is cancelled and recorded."""
        question = GenerationRequest(answer.request.messages, answer.request.sampling, answer.request.stream)
        source: Any = language_model.options(stream=True).generate.remote(question)
        try:
            async for event in source:
                if isinstance(event, Refused):
                    answer.settled = True  # never begun, so nothing to record
                    raise RequestError(event.status, event.what, event.code, event.param)
                answer.take(event)
                yield event
            if answer.finished is None:
                raise RequestError(503, "the language model stopped in mid-reply; try again", "service_unavailable")
        except (RayError, RayServeException, RequestError):
            self._record_broken(answer, "error")
            raise
        except (asyncio.CancelledError, GeneratorExit):
            source.cancel()
            self._record_broken(answer, "cancelled")
            raise

    async def _stream(self, answer: Answer, events: AsyncGenerator[Event, None]) -> AsyncGenerator[bytes, None]:
        frame = answer.format
        try:
            yield openai_format.event(frame.chunk({"role": "assistant", "content": ""}))
            async for event in events:
                if isinstance(event, Delta):
                    told = openai_format.logprobs(event.logprobs) if answer.tells_logprobs else None
                    yield openai_format.event(frame.chunk({"content": event.text}, logprobs=told))
            conclusion = await self._conclude(answer)
            assert answer.finished
            if conclusion.added:
                yield openai_format.event(frame.chunk({"content": conclusion.added}))
            ours = frame.ours(conclusion, answer.intent)
            yield openai_format.event(frame.chunk({}, answer.finished.finish_reason, rayloop=ours))
            if answer.request.include_usage:
                tokens = answer.prompt_tokens, answer.finished.completion_tokens
                yield openai_format.event(frame.usage_chunk(*tokens, rayloop=ours))
            yield openai_format.DONE
        except RequestError as error:
            yield openai_format.event(openai_format.error(error.status, str(error), error.code, error.param))
        except (RayError, RayServeException):
            what = "a part of the service was restarted in mid-reply; try again"
            yield openai_format.event(openai_format.error(503, what, "service_unavailable"))
        finally:
            await events.aclose()

    async def _conclude(self, answer: Answer) -> Conclusion:
        """Have the answer settled and logged. A client that leaves meanwhile does not stop that."""
        answer.settled = True
        settling = self._in_background(self._settle(answer.draft("ok")))
        conclusion: Conclusion | Refused = await asyncio.shield(settling)
        if isinstance(conclusion, Refused):
            raise RequestError(conclusion.status, conclusion.what, conclusion.code, conclusion.param)
        tags = {"variant": answer.variant.name}
        self._time_to_first_token.observe(answer.first_token_s or 0.0, tags)
        self._latency.observe(time.monotonic() - answer.begun_s, tags)
        self._prompt_tokens.inc(answer.prompt_tokens, tags)
        if answer.finished and answer.finished.completion_tokens:
            self._completion_tokens.inc(answer.finished.completion_tokens, tags)
            limits.spend(answer.prompt_tokens + answer.finished.completion_tokens)
        return conclusion

    def _record_broken(self, answer: Answer, status: Literal["cancelled", "error"]) -> None:
        if not answer.settled:
            answer.settled = True
            if status == "error" or answer.request.stream:  # else nobody knows how much was written
                limits.spend(0 if status == "error" else answer.prompt_tokens + len(answer.pieces))
            self._in_background(self._settle(answer.draft(status)))

    async def _settle(self, draft: Draft) -> Conclusion | Refused:
        settled: Conclusion | Refused = await self._response.conclude.remote(draft)
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
