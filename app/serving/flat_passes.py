"""Forward passes on a CPU that put everything there is to do one after another, as one long row without padding.

What a pass costs beside its products, thousands of small operations, is then paid once for the tokens of all replies
and of the prompts that begin. Each token attends to its own slot alone. Blocks of prompts do so with torch's kernel,
one by one; single tokens and the ends of prompts, all at once, with decode_attention.c.

Axes: N tokens, B pieces, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from bitsandbytes.nn.modules import Linear8bitLt
from transformers import PreTrainedModel

from app.serving.adapters import Adapters
from app.serving.decode_attention import NAMES, DecodeAttention, decode_attention
from app.serving.packed_linear import pack
from app.serving.passes import Piece
from app.serving.prefix_cache import BLOCK_TOKENS
from app.serving.slot_cache import PassView, SlotCache, rounded_up


class FlatPasses:
    """One pass for all pieces.

    Args:
        model: Changed: its attention, and how weights are laid out. `takes` says whether it can be.
    """

    prompt_tokens = 512
    reads_masked = False

    def __init__(self, model: PreTrainedModel, adapters: Adapters, slots: int, context_tokens: int) -> None:
        pack(model)
        self._model: Any = model
        self._adapters = adapters
        self.cache = SlotCache(model, slots, context_tokens)
        longest = rounded_up(context_tokens)
        least = torch.finfo(model.dtype).min
        mask = torch.full((BLOCK_TOKENS, longest), least, dtype=model.dtype).triu(longest - BLOCK_TOKENS + 1)
        self._mask = mask[None, None]
        """Additive, (1, 1, BLOCK_TOKENS, context), of the last block; that of an earlier one is its right part."""

    @staticmethod
    def takes(model: PreTrainedModel) -> bool:
        """Whether it is on a CPU, with attention that can be replaced, and layers that treat each token by itself.

        LLM.int8() does not: which columns are outliers depends on all tokens of a pass.
        """
        return (
            model.device.type == "cpu"
            and model.dtype in NAMES
            and model.config._attn_implementation == "sdpa"
            and not any(type(module) is Linear8bitLt for module in model.modules())
            and decode_attention() is not None
        )

    def run(self, pieces: Sequence[Piece]) -> torch.Tensor:
        """As the protocol has it."""
        blocks = [number for number, piece in enumerate(pieces) if len(piece.ids) == BLOCK_TOKENS]
        order = [*(number for number, piece in enumerate(pieces) if len(piece.ids) < BLOCK_TOKENS), *blocks]
        ordered = [pieces[number] for number in order]
        view = self.cache.view = _FlatView(ordered, len(blocks), self._mask)
        with self._adapters.of(view.adapters.unsqueeze(0)):
            output = self._model(
                input_ids=view.ids.unsqueeze(0),
                position_ids=view.positions.unsqueeze(0),
                attention_mask=view.mask,
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=view.ends,
            )
        logits_BV = torch.empty_like(output.logits[0], dtype=torch.float32)
        logits_BV[order] = output.logits[0].float()
        return logits_BV


class _FlatView(PassView):
    """Pieces that are no blocks come first."""

    def __init__(self, pieces: Sequence[Piece], blocks: int, mask: torch.Tensor) -> None:
        counts = torch.tensor([len(piece.ids) for piece in pieces])
        self.ids = torch.tensor([token for piece in pieces for token in piece.ids])
        """(N,)"""
        self.ends = counts.cumsum(0) - 1
        """(B,), which token is the last of each piece."""
        slots = torch.tensor([piece.slot for piece in pieces])
        begins = torch.tensor([piece.begin for piece in pieces])
        self._rows = slots.repeat_interleave(counts)
        self.adapters = torch.tensor([piece.adapter for piece in pieces]).repeat_interleave(counts)
        """(N,)"""
        self.positions = torch.arange(len(self.ids)) + (begins - self.ends + counts - 1).repeat_interleave(counts)
        """(N,)"""
        self._lengths = self.positions + 1
        self._single = len(self.ids) - blocks * BLOCK_TOKENS
        self._blocks = [(piece.slot, piece.begin + BLOCK_TOKENS) for piece in pieces[len(pieces) - blocks :]]
        self._block_mask = mask
        self.mask = torch.zeros(1, 1, 1, 1)
        """Not looked at: models make one of their own where there is none."""
        self.begin, self.length = 0, len(self.ids)

    def write(self, states: torch.Tensor, new: torch.Tensor) -> None:
        states[self._rows, :, self.positions] = new[0].transpose(0, 1)

    def read(self, states: torch.Tensor) -> torch.Tensor:
        return states

    def attend(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
        """(1, heads, N, size) over the whole cache: (1, N, heads, size)."""
        kernel: DecodeAttention | None = decode_attention()
        assert kernel, "FlatPasses.takes looked"
        single = query[0, :, : self._single].transpose(0, 1)
        count = self._single
        if not kernel.takes(single, keys, values):
            raise ValueError(f"keys of {keys.shape[-1]} and values of {values.shape[-1]} are not attended to here")
        found = kernel(single, keys, values, self._rows[:count], self._lengths[:count], scale)
        if not self._blocks:
            return found.unsqueeze(0)
        parts = [found]
        for number, (slot, length) in enumerate(self._blocks):
            begin = count + number * BLOCK_TOKENS
            attended = torch.nn.functional.scaled_dot_product_attention(
                query[:, :, begin : begin + BLOCK_TOKENS],
                keys[slot : slot + 1, :, :length],
                values[slot : slot + 1, :, :length],
                attn_mask=self._block_mask[..., -length:],
                scale=scale,
                enable_gqa=query.shape[1] != keys.shape[1],
            )
            parts.append(attended[0].transpose(0, 1))
        return torch.cat(parts).unsqueeze(0)
