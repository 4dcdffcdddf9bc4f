"""The messages that the deployments hand each other: frozen, typed, cheap to pickle."""

from dataclasses import dataclass, field
from typing import Any, Literal

from app.conversation import Message
from app.serving.conversations import Turn
from app.settings.serving import VariantConfig


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
    grammar: str = ""
    """What a reply must look like, in llguidance's Lark; empty: anything. See grammar.py."""
    top_logprobs: int | None = None
    """For how many tokens at each place log-probabilities are told, beside the chosen one; none: for none at all."""


Prompt = tuple[Message, ...] | tuple[int, ...] | str
"""A conversation whose next turn is wanted; or tokens, or text, to go on from as they are."""


def characters(prompt: Prompt) -> int:
    """Of its texts."""
    if isinstance(prompt, str):
        return len(prompt)
    return sum(len(part["content"]) for part in prompt if isinstance(part, dict))


@dataclass(frozen=True)
class GenerationRequest:
    """Input handling to language model: go on from each of the prompts."""

    prompts: tuple[Prompt, ...]
    sampling: Sampling
    stream: bool
    """Whether to send text as it is written; else it comes as one delta."""
    n: int = 1
    """Replies to each prompt. Reply i to prompt p is choice p * n + i."""
    tools: tuple[str, ...] = ()
    """What the model may call, each as JSON in OpenAI's form; for conversations."""
    echo: bool = False
    """Whether a reply begins with its prompt's text."""
    trims: bool = False
    """Whether a conversation that is too long loses its oldest turns, rather than be refused."""
    scope: str = ""
    """Name of the API key: only its own requests share what was read of their prompts."""
    adapter: str = ""
    """Variant whose adapter is to write; empty: the model itself."""

    @property
    def characters(self) -> int:
        """Of all prompts' texts."""
        return sum(map(characters, self.prompts))

    @property
    def choices(self) -> int:
        """Replies in all."""
        return len(self.prompts) * self.n


@dataclass(frozen=True)
class Started:
    """The request was accepted and its prompts have this many tokens together."""

    prompt_tokens: int
    dropped_messages: int = 0
    """Of the conversation's beginning, for which the context has no room."""
    variant: VariantConfig | None = None
    """Whose model writes: while versions change, not always the one that input handling knows by that name."""


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
    choice: int = 0
    tokens: int = 0
    """That were written since the reply's last Delta."""


@dataclass(frozen=True)
class Finished:
    """A reply is complete."""

    finish_reason: str
    """stop or length; in an answer also tool_calls"""
    completion_tokens: int
    """Including the end token, as OpenAI counts."""
    confidence: float
    """Mean probability the model gave the tokens it chose, 0 to 1."""
    time_to_first_token_s: float
    """From acceptance by the language model to the first token."""
    choice: int = 0
    cached_tokens: int = 0
    """Of its prompt, what did not have to be read because an earlier one began alike."""


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
class Embedded:
    """The vectors of some texts."""

    vectors: tuple[tuple[float, ...], ...]
    """(texts, hidden size), each of length 1"""
    prompt_tokens: int
    variant: VariantConfig | None = None
    """Whose vectors they are, as in `Started`."""


@dataclass(frozen=True)
class Tokens:
    """A text as the model reads it."""

    ids: tuple[int, ...]
    texts: tuple[str, ...]
    """Of each token; a part of a character is the replacement character."""
    context_tokens: int
    """Prompt and reply together take at most so many."""


@dataclass(frozen=True)
class Intent:
    """What the customer's last message is about."""

    label: str
    confidence: float


@dataclass(frozen=True)
class Insight:
    """What small functions said about a question; none where they did not in time."""

    intent: Intent | None = None
    sentiment: float | None = None
    """From -1 (furious) to 1 (delighted)"""


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
    """The first choice's."""
    insight: Insight
    status: Literal["ok", "cancelled", "error"]
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    confidence: float | None
    """Of the reply that the model is least sure of."""
    time_to_first_token_s: float | None
    end_to_end_s: float
    stream: bool
    user_hash: str | None
    metadata: dict[str, str] = field(default_factory=dict)
    endpoint: Literal["chat", "completions"] = "chat"
    other_replies: tuple[str, ...] = ()
    """Of the other choices."""
    tools: tuple[str, ...] = ()
    """Names of what the model might call."""
    takes_text: bool = True
    """Whether words may follow the reply; not so where it is JSON or a call."""
    rule: str | None = None
    """By which the question was refused."""
    turn: Turn | None = None
    """What it adds to a conversation that is remembered."""
    message: dict[str, Any] = field(default_factory=dict)
    """The reply in OpenAI's form, for that conversation."""


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
class AnswerRequest:
    """A checked request for replies."""

    endpoint: Literal["chat", "completions"]
    model: str
    prompts: tuple[Prompt, ...]
    messages: tuple[Message, ...]
    """The conversation as it is logged."""
    question: str
    """What the customer wrote last."""
    sampling: Sampling
    n: int
    stream: bool
    include_usage: bool
    user: str | None
    metadata: dict[str, str] = field(default_factory=dict)
    tools: tuple[str, ...] = ()
    """What the model may call, each as JSON in OpenAI's form."""
    tool_choice: Literal["none", "auto", "required", "named"] = "none"
    is_json: bool = False
    """Whether the replies are JSON."""
    echo: bool = False
    trims: bool = False
    """Whether a conversation that is too long loses its oldest turns."""

    def generation(self, scope: str, adapter: str) -> GenerationRequest:
        """What the language model is asked for the API key of that name."""
        return GenerationRequest(
            self.prompts, self.sampling, self.stream, self.n, self.tools, self.echo, self.trims, scope, adapter
        )


@dataclass(frozen=True)
class TextRequest:
    """A checked request for embeddings, tokens or the text of tokens."""

    model: str
    prompts: tuple[Prompt, ...]
    tools: tuple[str, ...] = ()


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
    adapted: dict[str, str] | None = None
    """Model versions of the adapters beside it, by variant; none: of a replica that knows of none."""

    @property
    def versions(self) -> dict[str, str]:
        """Of all variants that it writes for, its own first."""
        return {self.variant: self.model_version, **(self.adapted or {})}
