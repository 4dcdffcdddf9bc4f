"""One answer from the first token to the log: collected or streamed, settled, and recorded whatever happens."""

import asyncio
import contextvars
import hashlib
import json
import logging
import time
from collections.abc import AsyncGenerator, Coroutine, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from app.errors import RequestError
from app.serving import limits, openai_format
from app.serving.conversations import Turn
from app.serving.schema import AnswerRequest, Conclusion, Delta, Draft, Event, Finished, Insight, Refused, Started
from app.serving.tools import CallReader, Piece
from app.settings.serving import RuleConfig, VariantConfig
from app.telemetry import (
    COMPLETION_TOKENS,
    END_TO_END_LATENCY,
    PROMPT_TOKENS,
    TIME_TO_FIRST_TOKEN,
    counter,
    histogram,
)

logger = logging.getLogger(__name__)

SESSION_TOKENS = 64
"""Of a plain prompt, or so many characters, that say where it goes."""
START_TIMEOUT_S = 60.0
"""How long a question waits for a language model to accept it before the client reads 503."""


class Writing:
    """One of an answer's replies in the making."""

    def __init__(self, request: AnswerRequest) -> None:
        self.reply = ""
        """As the model wrote it."""
        self.choice = openai_format.Choice()
        self.finished: Finished | None = None
        self._calls = CallReader() if request.tools else None
        self._is_named = request.tool_choice == "named"

    def take(self, delta: Delta) -> list[Piece]:
        """Note what the language model wrote; returns what the client may read now."""
        self.reply += delta.text
        self.choice.logprobs += delta.logprobs
        return self._noted(self._calls.push(delta.text) if self._calls else [delta.text] if delta.text else [])

    def finish(self, finished: Finished) -> list[Piece]:
        """Note its end; returns what was held back."""
        self.finished = finished
        is_whole = bool(self.choice.calls) and self._calls is not None and not self._calls.is_open
        called = is_whole and finished.finish_reason == "stop" and not self._is_named
        self.choice.finish_reason = "tool_calls" if called else finished.finish_reason
        return self._noted(self._calls.finish() if self._calls else [])

    def _noted(self, pieces: list[Piece]) -> list[Piece]:
        for piece in pieces:
            self.choice.add(piece)
        return pieces


@dataclass
class Answer:
    """An answer in the making."""

    response_id: str
    received_at: str
    begun_s: float
    """time.monotonic() when the request came in"""
    request: AnswerRequest
    variant: VariantConfig
    insight: "asyncio.Task[Insight] | None"
    """What the small functions find out about the question."""
    user_hash: str | None
    scope: str = ""
    """Name of the API key."""
    rule: RuleConfig | None = None
    """That refuses the question."""
    turn: Turn | None = None
    """What it adds to a conversation that is remembered."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    first_token_s: float | None = None
    deltas: int = 0
    """Parts of replies that came so far, about as many as tokens."""
    settled: bool = False
    """Whether it has been handed to response management."""
    known: Insight = field(default_factory=Insight)
    """What they found out in time."""
    is_trial: bool = False
    """Whether another variant will be asked if this one does not begin."""
    dropped_messages: int = 0

    def __post_init__(self) -> None:
        self.replies = [Writing(self.request) for _ in range(len(self.request.prompts) * self.request.n)]

    @cached_property
    def frame(self) -> openai_format.ChatFrame | openai_format.CompletionFrame:
        """Of everything sent to the client, once it is known which version writes."""
        return openai_format.FRAMES[self.request.endpoint](
            self.response_id,
            int(time.time() - (time.monotonic() - self.begun_s)),
            f"{self.variant.model}/{self.variant.version}",
            self.variant.name,
            self.request.sampling.top_logprobs is not None,
            self.request.include_usage,
        )

    @property
    def session(self) -> str:
        """The same for all turns of a conversation, by how it begins; where routing goes by that."""
        begin: list[Any] = [self.scope]
        for prompt in self.request.prompts[:1]:
            messages = [part for part in prompt if isinstance(part, dict)]
            first = next((place for place, one in enumerate(messages) if one["role"] == "user"), 0)
            begin.append([one["content"] for one in messages[: first + 1]] or prompt[:SESSION_TOKENS])
        return hashlib.blake2b(json.dumps(begin).encode(), digest_size=16).hexdigest()

    def ours(self, conclusion: Conclusion) -> dict[str, Any]:
        """What we tell beyond OpenAI's fields."""
        told = {
            "handover": conclusion.handover is not None,
            "reason": conclusion.handover,
            "intent": self.known.intent.label if self.known.intent else None,
            "sentiment": self.known.sentiment,
            "variant": self.variant.name,
        }
        if self.rule:
            told["rule"] = self.rule.name
        if self.turn:
            told["conversation_id"] = self.turn.conversation_id
            told["dropped_messages"] = self.dropped_messages
        return told

    @property
    def is_finished(self) -> bool:
        """Whether every reply is complete."""
        return all(reply.finished for reply in self.replies)

    @property
    def usage(self) -> dict[str, Any]:
        """Tokens, in OpenAI's terms."""
        return openai_format.usage(self.prompt_tokens, self.completion_tokens, self.cached_tokens)

    @property
    def completion_tokens(self) -> int:
        """Of the replies that are complete."""
        return sum(reply.finished.completion_tokens for reply in self.replies if reply.finished)

    def take(self, event: Event) -> list[Piece]:
        """Note what the language model sent; returns what the client may read now."""
        if isinstance(event, Started):
            self.prompt_tokens = event.prompt_tokens
            self.dropped_messages = event.dropped_messages
            self.variant = event.variant or self.variant
        elif isinstance(event, Delta):
            if self.first_token_s is None:
                self.first_token_s = time.monotonic() - self.begun_s
            self.deltas += 1
            return self.replies[event.choice].take(event)
        elif isinstance(event, Finished):
            if not self.request.stream or self.first_token_s is None:
                self.first_token_s = event.time_to_first_token_s
            if event.choice % self.request.n == 0:  # each prompt counts once
                self.cached_tokens += event.cached_tokens
            return self.replies[event.choice].finish(event)
        return []

    def is_outdated(self, started: Started) -> bool:
        """Whether the request names one version, and another one would write."""
        named, found = self.variant, started.variant or self.variant
        is_pinned = self.request.model == f"{named.model}/{named.version}"
        return is_pinned and (found.model, found.version) != (named.model, named.version)

    def draft(self, status: Literal["ok", "cancelled", "error"]) -> Draft:
        """All there is to know of it now."""
        first, *others = self.replies
        confidences = [reply.finished.confidence for reply in self.replies if reply.finished]
        return Draft(
            response_id=self.response_id,
            received_at=self.received_at,
            variant=self.variant.name,
            model_version=f"{self.variant.model}/{self.variant.version}",
            model_uri=self.variant.uri,
            messages=self.request.messages,
            reply=first.reply,
            insight=self.known,
            status=status,
            finish_reason=first.choice.finish_reason or status,
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            confidence=min(confidences, default=None),
            time_to_first_token_s=self.first_token_s,
            end_to_end_s=time.monotonic() - self.begun_s,
            stream=self.request.stream,
            user_hash=self.user_hash,
            metadata=self.request.metadata,
            endpoint=self.request.endpoint,
            other_replies=tuple(other.reply for other in others),
            tools=tuple(json.loads(tool)["function"]["name"] for tool in self.request.tools),
            takes_text=not self.request.is_json and not any(reply.choice.calls for reply in self.replies),
            rule=self.rule.name if self.rule else None,
            turn=self.turn,
            message=first.choice.message,
        )


class Answering:
    """Makes answers with a language model and response management."""

    def __init__(self, response: "DeploymentHandle[Any]", fallback_after_s: float) -> None:
        self._response, self._fallback_after_s = response, fallback_after_s
        self.heard_s: dict[str, float] = {}
        """By variant, when its model last wrote something."""
        self._background: set[asyncio.Task[Any]] = set()
        self._waking: dict[str, asyncio.Task[Any]] = {}
        """By variant, what ends once a replica of it is there."""
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
            if answer.is_trial and variant.name in self._waking:
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
                self._wake(variant.name, handle)
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
            answer.request.generation(answer.scope)
        )
        try:
            async for event in source:
                self.heard_s[answer.variant.name] = time.monotonic()
                if isinstance(event, Refused):
                    answer.settled = not answer.is_trial  # never begun, so nothing to record
                    raise RequestError(event.status, event.what, event.code, event.param)
                if isinstance(event, Started) and answer.is_outdated(event):
                    source.cancel()
                    answer.settled = True
                    what = f"model {answer.request.model!r} is no longer here: another version took over"
                    raise RequestError(404, what, "model_not_found", "model")
                yield event
            if not answer.is_finished:
                raise RequestError(503, "the language model stopped in mid-reply; try again", "service_unavailable")
        except (RayError, RayServeException, RequestError):
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
                limits.spend(0 if status == "error" else answer.prompt_tokens + answer.deltas)
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
