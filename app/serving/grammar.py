"""Holding a reply to a grammar: after every token, which may come next.

A grammar is a text in llguidance's variant of Lark, made and checked by output_format.py before any work is done.

Axis: V vocabulary.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterable
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
        self._read: OrderedDict[str, LLMatcher] = OrderedDict()
        """Those that were read lately, at their beginning: the choices of a request share one, and many requests do."""
        self._lock = threading.Lock()

    def grammar(self, lark: str) -> "Grammar":
        """A new reply's, at its beginning.

        Raises:
            ModelError: The model's tokenizer is a slow one.
            GrammarFailed: llguidance does not take it.
        """
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
        with self._lock:
            matcher = self._read.pop(lark, None)
        matcher = matcher or LLMatcher(self._tokens, lark, log_level=0)
        if matcher.is_error():
            raise GrammarFailed(matcher.get_error())
        with self._lock:
            self._read[lark] = matcher
            while len(self._read) > KEPT:
                self._read.popitem(last=False)
        return Grammar(matcher.deep_copy(), self._vocabulary)


class Grammar:
    """What one reply may go on with."""

    def __init__(self, matcher: LLMatcher, vocabulary: int) -> None:
        self._matcher, self._vocabulary = matcher, vocabulary

    @property
    def failure(self) -> str:
        """Why llguidance can say no more, such as a limit of its own that was reached; empty while it can."""
        return self._matcher.get_error() if self._matcher.is_error() else ""

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
