"""Attention within packed conversations, each at its own length: no mask, and nothing computed that a mask would hide.

A block of T tokens costs T x T products with a mask; its conversations of lengths L cost half of their L x L. Those of
about the same length are computed together.

Source: Krell et al. 2021, Efficient Sequence Packing without Cross-contamination, section 3.2; Dao 2023,
FlashAttention-2, section 3 (what lies above the diagonal is not computed).
"""

import math
from dataclasses import dataclass
from typing import Any

import torch

from app.errors import ModelError
from app.settings.training import TrainingConfig

NAME = "rayloop_varlen"
"""As transformers knows it; it makes no mask for a name that it has no mask for."""
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
"""Whose layers are known to be told the position ids, and to add nothing of their own to the scores."""
FEWEST_OF_LONGEST = 0.8
"""Conversations are computed together whose lengths are at least this share of the longest of them."""

MOST_DIRECT_TOKENS = 512
"""Of a conversation whose scores are held in memory on a CPU, until the backward pass."""
CHECKED_TOKENS, CHECK_TOLERANCE = 8, 1e-2
CHUNK_BYTES = 2**20
"""Of scores that are computed at a time: what a core's cache holds."""

# Axes: b blocks, t tokens of a block, h heads, d size of a head, n conversations of about the same length l,
# r = b x t rows of tokens, p places: rows of the conversations one after the other, padded to each other's lengths


@dataclass(frozen=True)
class Layout:
    """Where the tokens of a batch's conversations are."""

    position_ids: torch.Tensor
    """(b, t), which this was made from"""
    rows_p: torch.Tensor
    """The row of each place; of a padded one, the row of the conversation's first token"""
    padded: torch.Tensor
    """Places that are padded"""
    places_r: torch.Tensor
    """The place of each row"""
    groups: tuple[tuple[int, int], ...]
    """(n, l) of the conversations that are computed together, in the order of places"""


def layout(position_ids_bt: torch.Tensor) -> Layout:
    """From position ids that begin anew at each conversation; a block's first token begins one in any case."""
    steps_bt = torch.diff(position_ids_bt.cpu(), prepend=position_ids_bt[:, :1].cpu() - 2)
    starts = (steps_bt.flatten() != 1).nonzero()[:, 0]
    rows = position_ids_bt.numel()
    lengths = torch.diff(starts, append=torch.tensor([rows]))
    order = lengths.argsort(descending=True, stable=True)
    starts, lengths = starts[order], lengths[order]
    groups, rows_of, real = [], [], []
    first = 0
    while first < len(lengths):
        longest = int(lengths[first])
        count = int((lengths[first:] >= FEWEST_OF_LONGEST * longest).sum())
        some_starts, some_lengths = starts[first : first + count, None], lengths[first : first + count, None]
        within = torch.arange(longest)[None]
        rows_of.append((some_starts + torch.where(within < some_lengths, within, 0)).flatten())
        real.append((within < some_lengths).flatten())
        groups.append((count, longest))
        first += count
    rows_p, real_p = torch.cat(rows_of), torch.cat(real)
    places_r = torch.empty(rows, dtype=torch.long)
    places_r[rows_p[real_p]] = real_p.nonzero()[:, 0]
    device = position_ids_bt.device
    padded = (~real_p).nonzero()[:, 0]
    return Layout(position_ids_bt, rows_p.to(device), padded.to(device), places_r.to(device), tuple(groups))


class _Rows(torch.autograd.Function):
    """Rows of a tensor by index; the gradient by the index that leads back, which is faster than adding up."""

    @staticmethod
    def forward(
        context: Any, rows: torch.Tensor, index: torch.Tensor, back: torch.Tensor, unused: torch.Tensor | None
    ) -> torch.Tensor:
        context.save_for_backward(back, unused)
        return rows.index_select(0, index)

    @staticmethod
    def backward(context: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        back, unused = context.saved_tensors
        found = grad.index_select(0, back)
        return (found if unused is None else found.index_fill_(0, unused, 0), None, None, None)


_latest: Layout | None = None
"""Of the batch that is being computed: its layers share one."""


def varlen(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    position_ids: torch.Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each conversation of packed blocks, as transformers calls it.

    Args:
        module: The layer.
        query: (b, h, t, d); `key` and `value` may have fewer heads.
        attention_mask: None.
        position_ids: (b, t), beginning anew at each conversation; (1, t) for all blocks alike.
        scaling: Of the scores; by default 1 / sqrt(d).
        dropout: Share of the weights that are dropped.

    Returns:
        (b, t, h, d) and None.

    Raises:
        ModelError: The layer is not told the position ids, or is given a mask.
    """
    global _latest
    if position_ids is None or attention_mask is not None:
        raise ModelError(f"{type(module).__name__} does not say where conversations end", "set training.attention=sdpa")
    blocks, _heads, tokens, _size = query.shape
    if len(position_ids) != blocks:
        position_ids = position_ids.expand(blocks, tokens)
    if _latest is None or _latest.position_ids is not position_ids:
        _latest = layout(position_ids)
    where = _latest
    query_phd, key_phd, value_phd = (
        _rows(part.transpose(1, 2).flatten(0, 1), where.rows_p, where.places_r) for part in (query, key, value)
    )
    shared = query_phd.shape[1] // key_phd.shape[1]
    directly = query.device.type == "cpu" and query.dtype == torch.bfloat16
    found, first = [], 0
    for count, length in where.groups:
        of_group = slice(first, first + count * length)
        first = of_group.stop
        query_nhld, key_nhld, value_nhld = (
            rows[of_group].unflatten(0, (count, length)).transpose(1, 2) for rows in (query_phd, key_phd, value_phd)
        )
        if directly and length <= MOST_DIRECT_TOKENS:
            key_nhld, value_nhld = (part.repeat_interleave(shared, 1) for part in (key_nhld, value_nhld))
            attended_nhld = _direct(query_nhld, key_nhld, value_nhld, scaling, dropout)
        else:
            attended_nhld = torch.nn.functional.scaled_dot_product_attention(
                query_nhld, key_nhld, value_nhld,
                dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=shared > 1,
            )  # fmt: skip
        found.append(attended_nhld.transpose(1, 2).flatten(0, 1))
    return _rows(torch.cat(found), where.places_r, where.rows_p, where.padded).unflatten(0, (blocks, tokens)), None


def _rows(
    rows: torch.Tensor, index: torch.Tensor, back: torch.Tensor, unused: torch.Tensor | None = None
) -> torch.Tensor:
    apply: Any = _Rows.apply
    found: torch.Tensor = apply(rows, index, back, unused)
    return found


def _direct(
    query_nhld: torch.Tensor, key_nhld: torch.Tensor, value_nhld: torch.Tensor, scaling: float | None, dropout: float
) -> torch.Tensor:
    """Causal attention by matrix products: torch's flash kernel (2.13) takes 2 to 8 times as long in bf16 on a CPU."""
    count, heads, length, size = query_nhld.shape
    above = torch.full((length, length), -math.inf, dtype=query_nhld.dtype).triu_(1)
    at_once = max(1, CHUNK_BYTES // (length * length * query_nhld.element_size()))
    found = []
    parts = (part.reshape(-1, length, size).split(at_once) for part in (query_nhld, key_nhld, value_nhld))
    for query, key, value in zip(*parts, strict=True):
        scores = torch.baddbmm(above, query, key.transpose(1, 2), alpha=scaling or size**-0.5)
        weights = torch.nn.functional.dropout(scores.softmax(-1), dropout)
        found.append(torch.bmm(weights, value))
    return torch.cat(found).view(count, heads, length, size)


def knows(model: Any) -> bool:
    """Whether a model's attention is no more than this."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None)
    return config.model_type in MODEL_TYPES and kinds == {"full_attention"} and window is None


def check(model: Any, training: TrainingConfig) -> None:
    """Refuse a model in which conversations of one block would see each other.

    Where attention is computed with a mask, transformers makes it from the position ids; some models (OPT, Falcon)
    take these and make none.

    Raises:
        ModelError: What follows in a block is not what it would be alone.
    """
    if training.attention in ("varlen", "flash", "flex") or (training.attention == "auto" and knows(model)):
        return  # they are given where conversations begin
    ids_t = torch.arange(2 * CHECKED_TOKENS).remainder(model.get_input_embeddings().num_embeddings)
    positions_t = torch.arange(2 * CHECKED_TOKENS).remainder(CHECKED_TOKENS)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            packed, alone = (
                model(
                    input_ids=ids[None].to(model.device), position_ids=positions[None].to(model.device), use_cache=False
                ).logits[0, -CHECKED_TOKENS:]
                for ids, positions in (
                    (ids_t, positions_t), (ids_t[CHECKED_TOKENS:], positions_t[CHECKED_TOKENS:]),
                )
            )  # fmt: skip
    except TypeError as error:
        raise ModelError(
            f"{training.base_model} ({model.config.model_type}) takes no position ids ({error}), so conversations "
            "cannot be packed for it",
            f"train one of {', '.join(MODEL_TYPES)}",
        ) from None
    finally:
        model.train(was_training)
    apart = float((packed.float() - alone.float()).abs().max())
    if not apart <= CHECK_TOLERANCE * max(1.0, float(alone.float().abs().max())):
        raise ModelError(
            f"in {training.base_model} ({model.config.model_type}) conversations that are packed into one block see "
            f"each other: a logit differs by {apart:.3g} from the conversation alone",
            f"train one of {', '.join(MODEL_TYPES)}",
        )


def use(model: Any, training: TrainingConfig) -> None:
    """Have a model attend as `training.attention` says, varlen or auto.

    Raises:
        ModelError: Its attention is more than this.
    """
    from transformers import AttentionInterface

    if not knows(model):
        if training.attention == "auto":
            return  # with a mask, as transformers does by default
        raise ModelError(
            f"training.attention=varlen is for {', '.join(MODEL_TYPES)} without sliding windows, and "
            f"{training.base_model} is {model.config.model_type}",
            "set training.attention=sdpa",
        )
    disable: Any = torch.compiler.disable  # its shapes follow the conversations: another graph for each batch
    AttentionInterface.register(NAME, disable(varlen))
    model.set_attn_implementation(NAME)
