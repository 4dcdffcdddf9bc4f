"""From logits to the next token of each reply, in OpenAI's terms, and what the model thought of it.

Axes: B running replies, V vocabulary.
"""

import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from app.serving.grammar import Grammar
from app.serving.schema import Sampling, TokenLogprob

LEAST_TEMPERATURE = 1e-30


class Draw:
    """How one reply's tokens are drawn, and those that were.

    Args:
        choice: Number of the reply; with a seed, each choice draws other numbers and the first one those of the seed.
    """

    def __init__(
        self,
        sampling: Sampling,
        grammar: Grammar | None = None,
        choice: int = 0,
        generator: random.Random | None = None,
    ) -> None:
        self.sampling, self.grammar = sampling, grammar
        self.random = generator or random.Random(
            sampling.seed if sampling.seed is None else (sampling.seed + choice) % 2**64
        )
        self._counts: Counter[int] = Counter()
        self._penalised = bool(sampling.frequency_penalty or sampling.presence_penalty)

    def add(self, token: int) -> None:
        """Take a token of the reply."""
        if self.grammar:
            self.grammar.add(token)
        if self._penalised:
            self._counts[token] += 1

    def changes(self) -> list[tuple[int, float]]:
        """Tokens and what is added to their logits now; one that is penalised and biased is there twice.

        Source: OpenAI, API reference, "Frequency and presence penalties"; prompts do not count.
        """
        frequency, presence = self.sampling.frequency_penalty, self.sampling.presence_penalty
        penalties = [(token, -count * frequency - presence) for token, count in self._counts.items()]
        return [*penalties, *self.sampling.logit_bias]


def choose(logits_BV: torch.Tensor, draws: Sequence[Draw]) -> tuple[list[int], list[float]]:
    """The next token of each reply, and the probability the model gave it among those that its grammar allows,
    whatever penalties and biases say.

    Temperature 0 takes the most probable token. Otherwise one number is drawn from the reply's own generator,
    whatever else is in the batch, and looked up in the cumulated probabilities of all tokens or, where `top_p` is
    below 1, of the most probable ones that together reach it.
    """
    logits_BV = _held_to_grammars(logits_BV, draws)
    probabilities_BV = torch.softmax(logits_BV, dim=-1)
    logits_BV = _changed(logits_BV, draws)
    tokens_B = logits_BV.argmax(dim=-1)
    rows = [row for row, draw in enumerate(draws) if draw.sampling.temperature > 0]
    if rows:
        # What is 0 as a float32 would divide by 0: it is the most probable token as well.
        settings = [
            (max(draw.sampling.temperature, LEAST_TEMPERATURE), draw.sampling.top_p, draw.random.random())
            for draw in (draws[row] for row in rows)
        ]
        temperatures, top_ps, drawn = torch.tensor(settings, device=logits_BV.device).unsqueeze(-1).unbind(1)
        # Dividing by a tiny temperature must not overflow: the largest logit becomes 0 first.
        scaled = logits_BV[rows] - logits_BV[rows].max(dim=-1, keepdim=True).values
        drawable = torch.softmax(scaled / temperatures, dim=-1)
        of_all = [place for place, row in enumerate(rows) if draws[row].sampling.top_p == 1]
        of_some = [place for place, row in enumerate(rows) if draws[row].sampling.top_p < 1]
        if of_all:
            tokens_B[[rows[place] for place in of_all]] = _of_all(drawable[of_all], drawn[of_all])
        if of_some:
            found = _of_most_probable(drawable[of_some], drawn[of_some], top_ps[of_some])
            tokens_B[[rows[place] for place in of_some]] = found
    chosen_B = probabilities_BV.gather(1, tokens_B.unsqueeze(1)).squeeze(1)
    return tokens_B.tolist(), chosen_B.tolist()


def _of_all(probabilities_BV: torch.Tensor, drawn_B1: torch.Tensor) -> torch.Tensor:
    """The tokens at which cumulated probabilities pass what was drawn; sorting a real vocabulary takes far longer."""
    cumulated = _cumulated(probabilities_BV)
    mass = cumulated[:, -1:]
    below = torch.minimum(drawn_B1 * mass, mass.nextafter(torch.zeros_like(mass)))
    # Beyond the last one: a model that gave no numbers.
    return torch.searchsorted(cumulated, below, right=True).squeeze(1).clamp_max(probabilities_BV.shape[1] - 1)


def _of_most_probable(probabilities_BV: torch.Tensor, drawn_B1: torch.Tensor, top_ps_B1: torch.Tensor) -> torch.Tensor:
    sorted_probabilities, order = probabilities_BV.sort(dim=-1, descending=True, stable=True)
    cumulated = _cumulated(sorted_probabilities)
    kept = (cumulated - sorted_probabilities < top_ps_B1).sum(dim=-1, keepdim=True).clamp_min(1)
    mass = cumulated.gather(1, kept - 1)
    place = torch.searchsorted(cumulated, drawn_B1 * mass, right=True).clamp_max(kept - 1)
    return order.gather(1, place).squeeze(1)


def _cumulated(probabilities_BV: torch.Tensor) -> torch.Tensor:
    """In float64: on a GPU, how many rows there are decides in which order they are summed, and in float32 the rounding
    then changed which of 128,256 about equally probable tokens was drawn (13 of 24 seeded replies)."""
    return probabilities_BV.cumsum(dim=-1, dtype=torch.float64)


def _held_to_grammars(logits_BV: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    allowed = {row: draw.grammar.allowed() for row, draw in enumerate(draws) if draw.grammar}
    if allowed:
        logits_BV = logits_BV.clone()
    for row, allowed_V in allowed.items():
        logits_BV[row].masked_fill_(~allowed_V.to(logits_BV.device), -torch.inf)
    return logits_BV


def _changed(logits_BV: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    changes = {row: change for row, draw in enumerate(draws) if (change := draw.changes())}
    if changes:
        logits_BV = logits_BV.clone()
    for row, change in changes.items():
        tokens, amounts = zip(*change, strict=True)
        device = logits_BV.device
        logits_BV[row].index_add_(0, torch.tensor(tokens, device=device), torch.tensor(amounts, device=device))
    return logits_BV


def end_tokens(configured: Any, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that end a reply: the tokenizer's and those of the model's generation settings.

    Args:
        configured: `eos_token_id` there: one, several or none.
    """
    several = configured if isinstance(configured, list) else [configured]
    return frozenset(token for token in (*several, tokenizer.eos_token_id) if token is not None)


class TokenTexts:
    """Tokens as bytes of text, of which a character may take several."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._backend: Any = tokenizer.backend_tokenizer
        self._special = frozenset(tokenizer.all_special_ids)
        self._is_byte_level = "ByteLevel" in repr(self._backend.decoder)

    def text_bytes(self, token: int) -> bytes:
        """The bytes that a token adds to a text; none for a special one."""
        piece = self._backend.id_to_token(token)
        if token in self._special or piece is None:  # None: the model has more rows than the tokenizer has tokens
            return b""
        if self._is_byte_level and all(character in _BYTES for character in piece):
            return bytes(_BYTES[character] for character in piece)
        if byte := re.fullmatch(r"<0x([0-9A-F]{2})>", piece):
            return bytes.fromhex(byte[1])
        text: str = piece.replace("\u2581", " ")  # a space in SentencePiece's vocabularies
        return text.encode()

    def likely(self, logits_V: torch.Tensor, token: int, count: int) -> TokenLogprob:
        """A chosen token's log-probability, and so many of the most probable ones."""
        logprobs_V = torch.log_softmax(logits_V, dim=-1)
        top = torch.topk(logprobs_V, count) if count else None
        others = zip(top.indices.tolist(), top.values.tolist(), strict=True) if top else ()
        return self._one(token, float(logprobs_V[token]), [self._one(other, logprob) for other, logprob in others])

    def _one(self, token: int, logprob: float, top: Iterable[TokenLogprob] = ()) -> TokenLogprob:
        return TokenLogprob(self.text_bytes(token), logprob, tuple(top))


def _byte_characters() -> dict[str, int]:
    """By the character that stands for it in byte-level vocabularies, each byte.

    Source: Radford et al. 2019, Language Models are Unsupervised Multitask Learners, section 2.2: printable ones stand
    for themselves, the others for characters from 256 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTES = _byte_characters()
