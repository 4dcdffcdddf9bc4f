"""Prompts as tokens, tokens as text: what the language model does before and after its engine."""

import copy
import json
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from app.conversation import CHAT_TEMPLATE, Message, normalised, prompt_ids
from app.serving import tools as tool_format
from app.serving.reply import Reply
from app.serving.schema import Event, GenerationRequest, Prompt, Refused, characters

MOST_CHARS_A_TOKEN = 128
"""More than a token of any common vocabulary has: what is longer cannot fit and is not tokenised."""


@dataclass(frozen=True)
class Accepted:
    """Prompts behind which a reply fits."""

    ids: list[list[int]]
    """Tokens of each"""
    dropped_messages: int
    """For which there was no room."""


class Prompts:
    """One model's.

    Args:
        vocabulary: Tokens that the model knows.
        context_tokens: Prompt and reply together.
        default_max_tokens: Length of a reply where the request names none.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, vocabulary: int, context_tokens: int, default_max_tokens: int
    ) -> None:
        self._tokenizer, self._vocabulary = tokenizer, vocabulary
        # Whether markers in a text are text is a setting that transformers changes in the tokenizer itself, which
        # several threads use: where a template needs another one than plain texts do, each has a tokenizer of its own.
        self._plain = tokenizer if tokenizer.chat_template == CHAT_TEMPLATE else copy.deepcopy(tokenizer)
        self.context_tokens, self._default_max_tokens = context_tokens, default_max_tokens
        template = str(tokenizer.chat_template)
        self._shows_tools = tool_format.OPEN in template and "tools" in template

    def token_ids(self, prompt: Prompt, tools: Sequence[str] = ()) -> list[int]:
        """A prompt's tokens. What looks like a special token in a text is text."""
        if isinstance(prompt, str):
            ids: list[int] = self._plain.encode(prompt, add_special_tokens=False, split_special_tokens=True)
            return ids
        messages: list[Message] = []
        tokens: list[int] = []
        for part in prompt:
            if isinstance(part, int):
                tokens.append(part)
            else:
                # Training reads normalised text, so the model is given what it learned from.
                messages.append({"role": part["role"], "content": normalised(part["content"])})
        if not messages:
            return tokens
        if tools and not self._shows_tools:
            return prompt_ids(self._tokenizer, tool_format.shown(messages, tools))
        return prompt_ids(self._tokenizer, messages, [json.loads(tool) for tool in tools])

    def accepted(self, request: GenerationRequest) -> Accepted | Refused:
        """The prompts' tokens, if a reply fits into the context behind each of them."""
        for token, _ in request.sampling.logit_bias:
            if token >= self._vocabulary:
                what = f"logit_bias names token {token}, the model has {self._vocabulary}"
                return Refused(400, what, "invalid_value", "logit_bias")
        accepted, dropped = [], 0
        for prompt in request.prompts:
            ids, left = self._fitting(prompt, request), prompt
            if isinstance(ids, Refused) and request.trims:
                ids, left = self._trimmed(prompt, request)
            if isinstance(ids, Refused):
                return ids
            dropped += len(prompt) - len(left)
            accepted.append(ids)
        return Accepted(accepted, dropped)

    def _trimmed(self, prompt: Prompt, request: GenerationRequest) -> tuple[list[int] | Refused, Prompt]:
        """A conversation without as few of its oldest turns as have to go; the last one alone may not fit either."""
        shorter = [prompt]
        while len(following := without_oldest_turn(shorter[-1])) < len(shorter[-1]):
            shorter.append(following)
        # Each has fewer tokens than the one before: a few are tokenised, not all.
        found: dict[int, list[int] | Refused] = {}

        def fits(place: int) -> bool:
            found[place] = self._fitting(shorter[place], request)
            return not isinstance(found[place], Refused)

        last = len(shorter) - 1
        place = bisect_left(range(last), True, lo=min(1, last), key=fits)
        if place not in found:
            fits(place)
        return found[place], shorter[place]

    def replies(
        self, request: GenerationRequest, prompts: Sequence[Sequence[int]], deliver: Callable[[Event], None]
    ) -> list[Reply]:
        """What is to be written, one a choice."""
        replies = []
        for choice in range(request.choices):
            prompt = prompts[choice // request.n]
            room = self.context_tokens - len(prompt)
            max_tokens = request.sampling.max_tokens or min(self._default_max_tokens, room)
            whose = request.scope, request.adapter
            replies.append(Reply(prompt, request.sampling, max_tokens, deliver, self.text, choice, *whose))
        return replies

    def text(self, ids: Sequence[int], special: bool = False) -> str:
        """Tokens as text, special ones left out or as they are written."""
        text: str = self._tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=not special)
        return text

    def read(self, prompt: Prompt, field: str) -> list[int] | Refused:
        """A prompt's tokens, if the context holds them. What is far too long is not tokenised."""
        return self._too_long(prompt, field) or self._checked(self.token_ids(prompt), None, field)

    def check(self, ids: Sequence[int], field: str) -> Refused | None:
        """Why tokens that a request names, or that its text has, cannot be read."""
        return self._refusal(ids, None, field)

    def _fitting(self, prompt: Prompt, request: GenerationRequest) -> list[int] | Refused:
        """A prompt's tokens, if a reply fits behind them."""
        field = field_of(prompt)
        if refusal := self._too_long(prompt, field):
            return refusal
        return self._checked(self.token_ids(prompt, request.tools), request.sampling.max_tokens, field)

    def _too_long(self, prompt: Prompt, field: str) -> Refused | None:
        if (size := characters(prompt)) <= MOST_CHARS_A_TOKEN * self.context_tokens:
            return None
        what = f"{field} has {size} characters, far more than the context of {self.context_tokens} tokens holds"
        return Refused(400, what, "context_length_exceeded", field)

    def _checked(self, ids: list[int], wanted: int | None, field: str) -> list[int] | Refused:
        return self._refusal(ids, wanted, field) or ids

    def _refusal(self, ids: Sequence[int], wanted: int | None, field: str) -> Refused | None:
        if not ids:
            return Refused(400, f"{field} has no tokens", "invalid_value", field)
        if max(ids) >= self._vocabulary:
            what = f"{field} names token {max(ids)}, the model has {self._vocabulary}"
            return Refused(400, what, "invalid_value", field)
        if len(ids) + (wanted or 1) <= self.context_tokens:
            return None
        reply = f", and the reply may take {wanted}" if wanted else ""
        return Refused(
            400,
            f"the context holds {self.context_tokens} tokens, but {field} takes {len(ids)}{reply}: "
            f"shorten {field} or ask for fewer tokens",
            "context_length_exceeded",
            "max_tokens" if wanted and len(ids) < self.context_tokens else field,
        )


def without_oldest_turn(prompt: Prompt) -> Prompt:
    """A conversation without its first question and what was said to it; unchanged if only one is left."""
    if isinstance(prompt, str):
        return prompt
    asked = [
        place
        for place, part in enumerate(prompt)
        if isinstance(part, dict) and part["role"] == "user" and not part["content"].startswith(tool_format.RESULT_OPEN)
    ]
    if len(asked) < 2:
        return prompt
    return (*prompt[: asked[0]], *prompt[asked[1] :])


def field_of(prompt: Prompt) -> str:
    """The field of the request that it came from."""
    return "messages" if isinstance(prompt, tuple) and prompt and isinstance(prompt[0], dict) else "prompt"
