"""Keys and values of many replies in one preallocated cache, as transformers' models take it.

Reply i is row i. The rows in use are always the first ones, so a forward pass takes a view of them and copies
nothing.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from app.serving.decode_attention import decode_attention

LENGTH_STEP = 64
"""Passes attend to a multiple of so many positions. Sums over other lengths round differently, and then a reply
in bfloat16 depended on the others in its batch: 15 of 30 seeded replies came out differently, now none."""


class PassView(ABC):
    """What one forward pass reads and writes of the cache; made once a pass, for all layers."""

    begin: int
    """Positions before the new tokens, of the longest row."""
    length: int
    """Positions that attention runs over."""
    mask: torch.Tensor
    """What the model is given as its attention mask, with four axes; by it a pass is told from others' of the model."""

    @abstractmethod
    def write(self, states: torch.Tensor, new: torch.Tensor) -> None:
        """Put the new tokens' keys or values, as the model has them, where they stand."""

    @abstractmethod
    def read(self, states: torch.Tensor) -> torch.Tensor:
        """All that the new tokens may attend to."""

    @abstractmethod
    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
    ) -> torch.Tensor | None:
        """(rows, new tokens, heads, size) where the pass has attention of its own for these; else none."""


class View(PassView):
    """A new token or several in each of some rows.

    Args:
        rows: In the cache.
        begins: Of each row, where its new tokens begin.
        new_tokens: In each row.
        dtype: The model's.
    """

    def __init__(self, rows: Sequence[int], begins: Sequence[int], new_tokens: int, dtype: torch.dtype) -> None:
        self.new_tokens = new_tokens
        self.begin, self.length = max(begins), rounded_up(max(begins) + new_tokens)
        self._rows = torch.tensor(rows)
        follow = list(rows) == list(range(rows[0], rows[0] + len(rows)))
        self._read_rows = slice(rows[0], rows[0] + len(rows)) if follow else self._rows
        """Rows that follow one another are read where they lie."""
        self._place(torch.tensor(begins), dtype)

    def _place(self, begins: torch.Tensor, dtype: torch.dtype) -> None:
        new = torch.arange(self.new_tokens, device=begins.device)
        self.positions = begins.unsqueeze(1) + new
        """(B, new tokens), where the new tokens stand."""
        self.lengths = self.positions[:, -1] + 1
        """(B,), positions that the last new token of each row attends to."""
        visible = torch.arange(self.length, device=begins.device) <= self.positions.unsqueeze(-1)
        mask = torch.zeros(visible.shape, dtype=dtype, device=begins.device)
        self.mask = mask.masked_fill_(~visible, torch.finfo(dtype).min).unsqueeze(1)
        """Additive, (B, 1, new tokens, length): a token sees its own row up to itself."""

    def write(self, states: torch.Tensor, new: torch.Tensor) -> None:
        """Of (B, heads, new tokens, size)."""
        states[self._rows.unsqueeze(1), :, self.positions] = new.transpose(1, 2)

    def read(self, states: torch.Tensor) -> torch.Tensor:
        """(B, heads, length, size)."""
        return states[self._read_rows, :, : self.length]

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
    ) -> torch.Tensor | None:
        """Of single tokens."""
        if self.new_tokens > 1:
            return None
        kernel = decode_attention() if query.device.type == "cpu" else None
        asked = query.squeeze(2)
        if kernel and kernel.takes(asked, keys, values):
            return kernel(asked, keys, values, torch.arange(len(asked)), self.lengths, scale).unsqueeze(1)
        return grouped_attention(query, keys, values, self.mask, scale)


class SlotCache(Cache):
    """Keys and values of every slot, allocated once; `view` says what the coming pass works on."""

    def __init__(self, model: PreTrainedModel, slots: int, context_tokens: int) -> None:
        layers: int = model.config.get_text_config().num_hidden_layers
        self._slot_layers = [SlotLayer(self, slots, rounded_up(context_tokens)) for _ in range(layers)]
        super().__init__(layers=list(self._slot_layers))
        self.view: PassView = View([0], [0], 1, model.dtype)
        """What the coming pass works on."""
        implementation = model.config._attn_implementation
        # The latter where passes of another kind were tried before.
        if implementation == "sdpa" or implementation.startswith("rayloop_slots_"):
            name = f"rayloop_slots_{id(self)}"
            AttentionInterface.register(name, self.attention)
            AttentionMaskInterface.register(name, sdpa_mask)
            model.config._attn_implementation = name

    def move(self, source: int, target: int, length: int) -> None:
        """Copy a row's first positions over another row."""
        for layer in self._slot_layers:
            for states in (layer.keys, layer.values):
                states[target, :, :length] = states[source, :, :length]

    def clear(self, row: int, length: int) -> None:
        """Zeros at a row's first positions, up to a whole LENGTH_STEP."""
        for layer in self._slot_layers:
            for states in (layer.keys, layer.values):
                states[row, :, : rounded_up(length)] = 0

    def block(self, slot: int, begin: int, tokens: int) -> torch.Tensor:
        """A copy of some positions of a row: (layers, keys and values, heads, tokens, head size)."""
        return torch.stack(
            [
                torch.stack([states[slot, :, begin : begin + tokens] for states in (layer.keys, layer.values)])
                for layer in self._slot_layers
            ]
        )

    def put_block(self, slot: int, begin: int, block: torch.Tensor) -> None:
        """Write what `block` gave."""
        for layer, (keys, values) in zip(self._slot_layers, block, strict=True):
            layer.keys[slot, :, begin : begin + keys.shape[1]] = keys
            layer.values[slot, :, begin : begin + values.shape[1]] = values

    def attention(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        """The model's attention as transformers calls it: torch's own where the pass has none."""
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        attended = self.view.attend(query, key, value, scale) if attention_mask is self.view.mask else None
        if attended is not None:
            return attended, None
        plain: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **options
        )
        return plain


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
        view.write(self.keys, key_states)
        view.write(self.values, value_states)
        return view.read(self.keys), view.read(self.values)

    def get_seq_length(self) -> int:
        """Positions before the coming pass, of the longest row."""
        return self._cache.view.begin

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys a pass attends to."""
        return self._cache.view.length, 0

    def get_max_length(self) -> int:
        """Positions a row can hold."""
        return self._context_tokens


def grouped_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attention of one new token a row, without a copy of keys and values for each head that shares them.

    Args:
        query: (rows, heads, 1, size); the heads that share keys and values follow one another.
        keys: (rows, heads or fewer, positions, size).
        values: As `keys`.
        mask: Additive, (rows, 1, 1, positions).

    Returns:
        (rows, 1, heads, size).
    """
    rows, heads, _, size = query.shape
    grouped = query.view(rows, keys.shape[1], heads // keys.shape[1], size)
    attended = torch.nn.functional.scaled_dot_product_attention(
        grouped, keys, values, mask.expand(-1, -1, grouped.shape[2], -1), scale=scale
    )
    return attended.reshape(rows, 1, heads, size)


def rounded_up(tokens: int) -> int:
    """To a multiple of LENGTH_STEP."""
    return -(-tokens // LENGTH_STEP) * LENGTH_STEP
