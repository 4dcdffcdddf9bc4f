"""Holding a reply to a grammar: after every token, which may come next.

A grammar is a text in llguidance's variant of Lark, made and checked by output_format.py before any work is done.

Axis: V vocabulary.
"""

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from transformers import PreTrainedTokenizerBase

from app.errors import ModelError
from app.serving.output_format import GrammarFailed

KEPT = 16
"""Grammars that are not read again."""


class Grammars:
    """Makes the grammars of one model's replies.

    Args:
        vocabulary: Rows of the model's output, which may be more than the tokenizer has tokens.
        ends: Tokens that end a reply.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int, ends: Iterable[int]) -> None:
        self._tokenizer, self._vocabulary, self._ends = tokenizer, vocabulary, sorted(ends)
        self._tokens: LLTokenizer | None = None
        self._beginning = lru_cache(KEPT)(self._read)
        """The choices of a request share a grammar, and so do many requests."""

    def grammar(self, lark: str) -> "Grammar":
        """A new reply's, at its beginning.

        Raises:
            ModelError: The model's tokenizer is a slow one.
            GrammarFailed: llguidance does not take it.
        """
        return Grammar(self._beginning(lark).deep_copy(), self._vocabulary)

    def _read(self, lark: str) -> LLMatcher:
        if self._tokens is None:  # takes a second with a large vocabulary, and most models never need it
            from llguidance.hf import from_tokenizer

            tokenizer: Any = self._tokenizer
            try:
                self._tokens = from_tokenizer(tokenizer, n_vocab=self._vocabulary, eos_token=self._ends)
            except (TypeError, ValueError) as error:
                raise ModelError(
                    f"replies of a {type(tokenizer).__name__} cannot be held to a grammar ({error})",
                    "use a model with a tokenizer.json",
                ) from error
        matcher = LLMatcher(self._tokens, lark, log_level=0)
        if matcher.is_error():
            raise GrammarFailed(_said(matcher))
        return matcher


class Grammar:
    """What one reply may go on with."""

    def __init__(self, matcher: LLMatcher, vocabulary: int) -> None:
        self._matcher, self._vocabulary = matcher, vocabulary

    @property
    def failure(self) -> str:
        """Why llguidance can say no more, such as a limit of its own that was reached; empty while it can."""
        return _said(self._matcher) if self._matcher.is_error() else ""

    def allowed(self) -> torch.Tensor:
        """(V,), true for each token that may come next, at least one; for all of them after a failure."""
        if self._matcher.is_error():
            return torch.ones(self._vocabulary, dtype=torch.bool)
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            return torch.ones(self._vocabulary, dtype=torch.bool)
        return torch.from_numpy(np.unpackbits(bits, count=self._vocabulary, bitorder="little").astype(bool))

    def add(self, token: int) -> None:
        """The reply goes on with a token that is allowed, or ends."""
        self._matcher.consume_token(token)


def _said(matcher: LLMatcher) -> str:
    """What llguidance says, without its state and the whole grammar, which it puts below that."""
    return (matcher.get_error().strip().splitlines() or ["it does not say why"])[0][:300]
