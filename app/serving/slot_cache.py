"""Keys and values of many replies in one preallocated cache, as transformers' models take it.

Reply i is row i. The rows in use are always the first ones, so a forward pass takes a view of them and copies
nothing.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

LENGTH_STEP = 64
"""Passes attend to a multiple of so many positions. Sums over other lengths round differently, and then a reply
in bfloat16 depended on the others in its batch: 15 of 30 seeded replies came out differently, now none."""


@dataclass(frozen=True)
class View:
    """The part of the cache that one forward pass reads and writes."""

    rows: slice
    positions: torch.Tensor
    """(B, new tokens), where the new tokens stand"""
    length: int
    """Positions that attention runs over, a multiple of LENGTH_STEP"""

    def mask(self, dtype: torch.dtype) -> torch.Tensor:
        """Additive, (B, 1, new tokens, length): a token sees its own row up to itself."""
        visible = torch.arange(self.length) <= self.positions.unsqueeze(-1)
        return torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min).unsqueeze(1)


class SlotCache(Cache):
    """Keys and values of every slot, allocated once; `view` says what the coming pass works on."""

    def __init__(self, layers: int, slots: int, context_tokens: int) -> None:
        self._slot_layers = [SlotLayer(self, slots, _rounded_up(context_tokens)) for _ in range(layers)]
        super().__init__(layers=list(self._slot_layers))
        self.view = self.step_view([0])

    def prompt_view(self, slot: int, tokens: int) -> View:
        """One row from its beginning."""
        return View(slice(slot, slot + 1), torch.arange(tokens).unsqueeze(0), _rounded_up(tokens))

    def step_view(self, positions: list[int]) -> View:
        """The first rows, one token each."""
        return View(slice(0, len(positions)), torch.tensor(positions).unsqueeze(1), _rounded_up(max(positions) + 1))

    def move(self, source: int, target: int, length: int) -> None:
        """Copy a row's first positions over another row."""
        for layer in self._slot_layers:
            for states in (layer.keys, layer.values):
                states[target, :, :length] = states[source, :, :length]


class SlotLayer(CacheLayerMixin):
    """One layer's keys and values: (slots, heads, context, head size)."""

    is_sliding = False
    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, cache: SlotCache, slots: int, context_tokens: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._cache, self._slots, self._context_tokens = cache, slots, context_tokens

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate with the heads, sizes and types that the model turns out to have."""
        self.keys, self.values = (
            states.new_zeros(self._slots, states.shape[1], self._context_tokens, states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new tokens where they stand; return all that the pass may attend to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        view = self._cache.view
        rows = torch.arange(view.rows.start, view.rows.stop).unsqueeze(1)
        self.keys[rows, :, view.positions] = key_states.transpose(1, 2)
        self.values[rows, :, view.positions] = value_states.transpose(1, 2)
        return self.keys[view.rows, :, : view.length], self.values[view.rows, :, : view.length]

    def get_seq_length(self) -> int:
        """Positions before the coming pass, of the longest row."""
        return int(self._cache.view.positions[:, 0].max())

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys a pass attends to."""
        return self._cache.view.length, 0

    def get_max_length(self) -> int:
        """Positions a row can hold."""
        return self._context_tokens


def _rounded_up(tokens: int) -> int:
    return -(-tokens // LENGTH_STEP) * LENGTH_STEP
