"""The messages that the deployments hand each other: frozen, typed, cheap to pickle."""

from dataclasses import dataclass, field
from typing import Literal

from app.conversation import Message


@dataclass(frozen=True)
class Sampling:
    """How a reply is drawn, in OpenAI's terms."""

    max_tokens: int | None
    """Tokens at most; none: the configured length, or what the context leaves."""
    temperature: float
    top_p: float
    seed: int | None
    stop: tuple[str, ...]
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Tokens, and what is added to their logits."""
    top_logprobs: int | None = None
    """For how many tokens at each place log-probabilities are told, beside the chosen one; none: for none at all."""


@dataclass(frozen=True)
class GenerationRequest:
    """Input handling to language model: write the next turn."""

    messages: tuple[Message, ...]
    sampling: Sampling
    stream: bool
    """Whether to send text as it is written; else it comes as one delta."""


@dataclass(frozen=True)
class Started:
    """The request was accepted and its prompt has this many tokens."""

    prompt_tokens: int


@dataclass(frozen=True)
class TokenLogprob:
    """What the model thought of a token."""

    text: bytes
    """That it adds to the reply; may be part of a character."""
    logprob: float
    """Natural logarithm of its probability, before temperature, penalties and biases."""
    top: tuple["TokenLogprob", ...] = ()
    """The most probable ones at its place."""


@dataclass(frozen=True)
class Delta:
    """The reply's next characters; never half of one."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    """Of the tokens that they are made of, if those are asked for."""


@dataclass(frozen=True)
class Finished:
    """The reply is complete."""

    finish_reason: str
    """stop or length"""
    completion_tokens: int
    """Including the end token, as OpenAI counts."""
    confidence: float
    """Mean probability the model gave the tokens it chose, 0 to 1."""
    time_to_first_token_s: float
    """From acceptance by the language model to the first token."""


@dataclass(frozen=True)
class Refused:
    """The request cannot be served; what the customer is told. It takes the place of an exception, because
    Ray wraps exceptions that cross a process in classes of its own.
    """

    status: int
    what: str
    code: str | None = None
    param: str | None = None


Event = Started | Delta | Finished | Refused


@dataclass(frozen=True)
class Intent:
    """What the customer's last message is about."""

    label: str
    confidence: float


@dataclass(frozen=True)
class Draft:
    """Input handling to response management: all there is to know of an answer before it is given."""

    response_id: str
    received_at: str
    variant: str
    model_version: str
    model_uri: str
    messages: tuple[Message, ...]
    reply: str
    intent: Intent | None
    status: Literal["ok", "cancelled", "error"]
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    confidence: float | None
    time_to_first_token_s: float | None
    end_to_end_s: float
    stream: bool
    user_hash: str | None
    metadata: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Conclusion:
    """Response management to input handling: the answer is on disk, and may be given."""

    added: str
    """Text that follows the reply; empty most of the time."""
    handover: str | None
    """Why a person takes over, or none."""


@dataclass(frozen=True)
class FeedbackRequest:
    """A customer's or agent's judgement of an answer."""

    response_id: str
    rating: int | None
    intent: str | None
    comment: str | None


@dataclass(frozen=True)
class ChatRequest:
    """A checked chat completion request."""

    model: str
    messages: tuple[Message, ...]
    sampling: Sampling
    stream: bool
    include_usage: bool
    user: str | None
    metadata: dict[str, str]


@dataclass(frozen=True)
class Readiness:
    """A language model replica that can answer."""

    variant: str
    model_version: str
    parameters: int
    slots: int
    slots_in_use: int
    code: str
    """Folder of the code it runs"""
