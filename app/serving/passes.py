"""Forward passes over the slots' cache, in shapes that fit what there is to do: for models on a CPU.

Those of models on a GPU have unchanging shapes, see fixed_passes.py.

Axes: B rows, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from transformers import PreTrainedModel

from app.serving.packed_linear import pack
from app.serving.prefix_cache import BLOCK_TOKENS
from app.serving.slot_cache import SlotCache, View


class Piece(NamedTuple):
    """Of a prompt, BLOCK_TOKENS at most."""

    slot: int
    begin: int
    """Where in the prompt; a multiple of BLOCK_TOKENS."""
    ids: Sequence[int]


class Passes(Protocol):
    """What the engine asks of a model. The numbers of a row depend on nothing but its own tokens."""

    cache: SlotCache
    pieces: int
    """Read together at most."""
    prompts: int
    """Begun together at most."""
    prompt_tokens: int
    """Of prompts, read between two steps at most, beyond the first prompt: running replies do not stall."""

    def read(self, pieces: Sequence[Piece]) -> torch.Tensor:
        """Read them into their slots, those of a slot in their order; returns logits_BV after each."""

    def block(self, number: int) -> torch.Tensor:
        """Keys and values of a whole piece of the last read, as `SlotCache.block` gives them; a copy."""

    def step(self, tokens: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        """One more token in each of the first slots; returns logits_BV."""


class FittingPasses:
    """One prompt at a time, and as many rows as replies are running.

    Args:
        model: Changed: attention, and how weights are laid out.
    """

    pieces, prompts, prompt_tokens = 1, 1, 512

    def __init__(self, model: PreTrainedModel, slots: int, context_tokens: int) -> None:
        pack(model)
        self._model: Any = model
        self.cache = SlotCache(model, slots, context_tokens)

    def read(self, pieces: Sequence[Piece]) -> torch.Tensor:
        """As the protocol has it."""
        (piece,) = pieces
        self._read = piece
        return self._forward([piece.ids], self.cache.prompt_view(piece.slot, piece.begin, len(piece.ids)))

    def block(self, number: int) -> torch.Tensor:
        """As the protocol has it."""
        return self.cache.block(self._read.slot, self._read.begin, BLOCK_TOKENS)

    def step(self, tokens: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        """As the protocol has it."""
        return self._forward([[token] for token in tokens], self.cache.step_view(list(positions)))

    def _forward(self, ids: Sequence[Sequence[int]], view: View) -> torch.Tensor:
        self.cache.view = view
        output = self._model(
            input_ids=torch.tensor(ids),
            position_ids=view.positions,
            attention_mask=view.mask,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: torch.Tensor = output.logits[:, -1].float()
        return logits
