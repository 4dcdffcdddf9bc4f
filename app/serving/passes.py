"""Forward passes over the slots' cache, in shapes that fit what there is to do: for models on a CPU.

Those of models on a GPU have unchanging shapes, see fixed_passes.py.

Axes: B rows, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from app.serving.packed_linear import pack
from app.serving.prefix_cache import BLOCK_TOKENS
from app.serving.slot_cache import SlotCache, View


class Passes(Protocol):
    """What the engine asks of a model. The numbers of a row depend on nothing but its own tokens."""

    cache: SlotCache
    prompts: int
    """Prompts that are read together at most."""
    prompt_tokens: int
    """Of prompts, read between two steps at most, beyond the first prompt: running replies do not stall."""

    def read_blocks(self, slots: Sequence[int], begin: int, ids: Sequence[Sequence[int]]) -> Sequence[torch.Tensor]:
        """Read BLOCK_TOKENS of each prompt into its slot; returns their keys and values, as `SlotCache.block`."""

    def read_ends(self, slots: Sequence[int], begins: Sequence[int], ids: Sequence[Sequence[int]]) -> torch.Tensor:
        """Read the last tokens of each prompt, BLOCK_TOKENS at most; returns logits_BV after them."""

    def step(self, tokens: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        """One more token in each of the first slots; returns logits_BV."""


class FittingPasses:
    """One prompt at a time, and as many rows as replies are running.

    Args:
        model: Changed: attention, and how weights are laid out.
    """

    prompts, prompt_tokens = 1, 512

    def __init__(self, model: PreTrainedModel, slots: int, context_tokens: int) -> None:
        pack(model)
        self._model: Any = model
        self.cache = SlotCache(model, slots, context_tokens)

    def read_blocks(self, slots: Sequence[int], begin: int, ids: Sequence[Sequence[int]]) -> Sequence[torch.Tensor]:
        """As the protocol has it."""
        (slot,) = slots
        self._forward(ids, self.cache.prompt_view(slot, begin, BLOCK_TOKENS))
        return [self.cache.block(slot, begin, BLOCK_TOKENS)]

    def read_ends(self, slots: Sequence[int], begins: Sequence[int], ids: Sequence[Sequence[int]]) -> torch.Tensor:
        """As the protocol has it."""
        (slot,), (begin,) = slots, begins
        return self._forward(ids, self.cache.prompt_view(slot, begin, len(ids[0])))

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
