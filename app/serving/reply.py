"""One reply in the making: an engine puts tokens in, deltas and the end come out. The same for every engine."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from app.serving.grammar import Grammars
from app.serving.reply_text import ReplyText
from app.serving.sampling import Draw
from app.serving.schema import Delta, Event, Finished, Refused, Sampling, TokenLogprob


def give_draws(replies: Sequence["Reply"], grammars: Grammars) -> None:
    """Read the replies' grammars and say how their tokens are chosen; safe to call from any thread.

    Raises:
        GrammarFailed: A grammar is broken or too large.
    """
    for reply in replies:
        lark = reply.sampling.grammar
        reply.draw = Draw(reply.sampling, grammars.grammar(lark) if lark else None, reply.choice)


@dataclass(eq=False)
class Reply:
    """What is written after a prompt of at least one token.

    `deliver` gets Deltas and then one Finished or Refused, in the engine's thread; nothing once it is cancelled.
    """

    prompt: Sequence[int]
    sampling: Sampling
    max_tokens: int
    deliver: Callable[[Event], None]
    decode: Callable[[Sequence[int]], str]
    choice: int = 0
    """Its number among the answer's replies."""
    scope: str = ""
    """Whose it is: only replies of one scope share what was read of their prompts."""
    adapter: str = ""
    """Variant whose adapter it is written with; empty: the base as it is."""
    cached_tokens: int = 0
    """Of the prompt, that did not have to be read."""
    draw: Draw | None = None
    """How its tokens are chosen, where our own engine does that."""
    submitted_s: float = field(default_factory=time.monotonic)
    first_token_s: float = 0.0
    tokens: list[int] = field(default_factory=list)
    cancelled: bool = False
    _probability: float = 0.0
    """Sum over the tokens."""
    _logprobs: list[tuple[int, TokenLogprob]] = field(default_factory=list)
    """Of tokens whose text is not delivered yet, and where in the reply it begins; bytes."""
    _text_bytes: int = 0
    """Of all tokens so far."""
    _delivered_bytes: int = 0
    _delivered_tokens: int = 0

    def __post_init__(self) -> None:
        self._text = ReplyText(self.decode, self.sampling.stop)

    @property
    def length(self) -> int:
        """Positions that are in the cache once the last token has been read."""
        return len(self.prompt) + len(self.tokens)

    @property
    def tells_logprobs(self) -> bool:
        """Whether `add` wants to know what the model thought of each token."""
        return self.sampling.top_logprobs is not None

    def add(self, token: int, probability: float, is_end: bool, logprob: TokenLogprob | None = None) -> bool:
        """Take the next token and deliver what it adds; returns whether the reply is complete.

        Args:
            probability: That the model gave it.
            is_end: Whether it is one that ends a turn.
            logprob: What the model thought of it, where `tells_logprobs`; that of an end is not told.
        """
        if not self.tokens:
            self.first_token_s = time.monotonic()
        self.tokens.append(token)
        self._probability += probability
        if logprob and not is_end:
            self._logprobs.append((self._text_bytes, logprob))
            self._text_bytes += len(logprob.text)
        text = "" if is_end else self._text.push(token)
        complete = is_end or self._text.stopped or len(self.tokens) >= self.max_tokens
        if complete:
            text += self._text.finish()
        if self.cancelled:
            return True
        self._deliver(text, complete)
        if complete:
            finish_reason = "stop" if is_end or self._text.stopped else "length"
            self.deliver(
                Finished(
                    finish_reason=finish_reason,
                    completion_tokens=len(self.tokens),
                    confidence=self._probability / len(self.tokens),
                    time_to_first_token_s=self.first_token_s - self.submitted_s,
                    choice=self.choice,
                    cached_tokens=self.cached_tokens,
                )
            )
        return complete

    def fail(self, why: Refused) -> None:
        """End it without an end of its own."""
        if not self.cancelled:
            self.deliver(why)

    def _deliver(self, text: str, complete: bool) -> None:
        if self.tells_logprobs:
            self._delivered_bytes += len(text.encode())
        if text or (complete and self._logprobs):
            # Tokens whose text is held back wait with it. A stop string is not part of the reply, nor are its tokens.
            is_whole = complete and not self._text.stopped
            cut = self._text_bytes + 1 if is_whole else self._delivered_bytes
            told = [begin < cut or (begin == cut and not logprob.text) for begin, logprob in self._logprobs]
            now = tuple(logprob for (_, logprob), is_told in zip(self._logprobs, told, strict=True) if is_told)
            self._logprobs = [entry for entry, is_told in zip(self._logprobs, told, strict=True) if not is_told]
            self.deliver(Delta(text, now, self.choice, len(self.tokens) - self._delivered_tokens))
            self._delivered_tokens = len(self.tokens)
