"""One answer in the making: what the language model has sent of it so far, and how it is told."""

import asyncio
import hashlib
import json
import time
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from app.serving import openai_format
from app.serving.conversations import Turn
from app.serving.schema import AnswerRequest, Conclusion, Delta, Draft, Event, Finished, Insight, Started
from app.serving.tools import CallReader, Piece
from app.settings.serving import RuleConfig, VariantConfig

SESSION_TOKENS = 64
"""Of a plain prompt, or so many characters, that say where it goes."""


class Writing:
    """One of an answer's replies in the making."""

    def __init__(self, request: AnswerRequest) -> None:
        self.reply = ""
        """As the model wrote it."""
        self.choice = openai_format.Choice()
        self.finished: Finished | None = None
        self.tokens = 0
        """That were written so far."""
        self._calls = CallReader() if request.tools else None
        self._is_named = request.tool_choice == "named"

    def take(self, delta: Delta) -> list[Piece]:
        """Note what the language model wrote; returns what the client may read now."""
        self.reply += delta.text
        self.tokens += delta.tokens
        self.choice.logprobs += delta.logprobs
        return self._noted(self._calls.push(delta.text) if self._calls else [delta.text] if delta.text else [])

    def finish(self, finished: Finished) -> list[Piece]:
        """Note its end; returns what was held back."""
        self.finished = finished
        self.tokens = finished.completion_tokens
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
        """That were written so far."""
        return sum(reply.tokens for reply in self.replies)

    def take(self, event: Event) -> list[Piece]:
        """Note what the language model sent; returns what the client may read now."""
        if isinstance(event, Started):
            self.prompt_tokens = event.prompt_tokens
            self.dropped_messages = event.dropped_messages
            self.variant = event.variant or self.variant
        elif isinstance(event, Delta):
            if self.first_token_s is None:
                self.first_token_s = time.monotonic() - self.begun_s
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
