"""Forward passes over the slots' cache, and which kind a model gets.

    FlatPasses     on a CPU: whatever there is to do is one pass, without padding (flat_passes.py)
    FixedPasses    on a GPU: unchanging shapes, recorded once (fixed_passes.py)
    FittingPasses  for what FlatPasses does not take: a pass a piece of prompt, and one for all that is written

Axes: B pieces, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from transformers import PreTrainedModel

from app.serving.adapters import Adapters
from app.serving.packed_linear import pack
from app.serving.slot_cache import SlotCache, View


class Piece(NamedTuple):
    """Tokens that follow one another: a block of a prompt, what is left at its end, or a reply's newest token."""

    slot: int
    begin: int
    """Where they stand. BLOCK_TOKENS at most, and more than one begin at a multiple of that."""
    ids: Sequence[int]
    adapter: int = 0
    """Which one its tokens are read with, see adapters.py; 0: none."""


class Passes(Protocol):
    """What the engine asks of a model. What comes of a piece depends on nothing but its own slot's tokens, but for
    LLM.int8() with outliers, whose columns are those of all that a pass has."""

    cache: SlotCache
    prompt_tokens: int
    """Of prompts, that one run reads at most, BLOCK_TOKENS or more: running replies do not stall."""
    reads_masked: bool
    """Whether attention also runs over positions that it then weighs with nothing. What an earlier reply left there
    must be numbers: nothing times none is none."""

    def run(self, pieces: Sequence[Piece]) -> torch.Tensor:
        """Put them into their slots, those of a slot in their order; returns logits_BV, after each."""


class FittingPasses:
    """Pieces of prompts one by one, and single tokens together.

    Args:
        model: Changed: its attention, and how weights are laid out.
    """

    prompt_tokens = 512
    reads_masked = True

    def __init__(self, model: PreTrainedModel, adapters: Adapters, slots: int, context_tokens: int) -> None:
        pack(model)
        self._model: Any = model
        self._adapters = adapters
        self.cache = SlotCache(model, slots, context_tokens)

    def run(self, pieces: Sequence[Piece]) -> torch.Tensor:
        """As the protocol has it."""
        logits: dict[int, torch.Tensor] = {}
        single = [number for number, piece in enumerate(pieces) if len(piece.ids) == 1]
        for number in range(len(pieces)):
            if number not in single:
                logits[number] = self._forward([pieces[number]])[0]
        if single:
            logits |= zip(single, self._forward([pieces[number] for number in single]), strict=True)
        return torch.stack([logits[number] for number in range(len(pieces))])

    def _forward(self, pieces: Sequence[Piece]) -> torch.Tensor:
        slots, begins, ids, numbers = zip(*pieces, strict=True)
        view = self.cache.view = View(slots, begins, len(ids[0]), self._model.dtype)
        with self._adapters.of(torch.tensor(numbers).unsqueeze(1)):
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
