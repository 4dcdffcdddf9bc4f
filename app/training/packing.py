"""Conversations laid end to end in blocks of one length, so that little of a batch is padding.

Within a block `position_ids` start again at each conversation. transformers takes that as the border of what
a token may attend to, so packed conversations give the logits that they give alone: as long as the model is
called with `position_ids`, without an attention mask, and with `use_cache=False` (with a cache it does not look).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from app.conversation import Encoded
from app.errors import ConfigError

NOT_LEARNED = -100


@dataclass(frozen=True)
class Blocks:
    """Packed conversations; each array is (blocks, block_tokens)."""

    input_ids: np.ndarray
    """int32"""
    position_ids: np.ndarray
    """int32, from 0 in each conversation; 0 in padding, so that each token of it stands alone"""
    labels: np.ndarray
    """int32, `input_ids` where a token is learned from the one before it, else NOT_LEARNED"""

    def columns(self) -> dict[str, np.ndarray]:
        """The arrays by name, as batches travel."""
        return {"input_ids": self.input_ids, "position_ids": self.position_ids, "labels": self.labels}


def pack(lengths: np.ndarray, block_tokens: int) -> np.ndarray:
    """Assign each sequence to a block so that few tokens are padding.

    Args:
        lengths: (sequences,), tokens in each, all from 1 to `block_tokens`.

    Returns:
        (sequences,), the block of each; blocks are numbered from 0 without gaps and
        none holds more than `block_tokens`.

    Raises:
        ConfigError: A sequence is longer than a block.

    Source: best-fit decreasing, Ding et al. 2024, Fewer Truncations Improve Language Modeling, section 3.
    """
    if len(lengths) and lengths.max() > block_tokens:
        raise ConfigError(
            f"a sequence of {lengths.max()} tokens does not fit into training.block_tokens={block_tokens}"
        )
    block_of = np.zeros(len(lengths), dtype=np.int64)
    with_room: list[list[int]] = [[] for _ in range(block_tokens + 1)]  # blocks by tokens still free
    has_room = np.zeros(block_tokens + 1, dtype=bool)
    blocks = 0
    # Stable, so that the same lengths in the same order always give the same blocks.
    for sequence in np.argsort(-lengths, kind="stable"):
        length = int(lengths[sequence])
        tightest = length + int(np.argmax(has_room[length:]))
        if has_room[tightest]:
            block = with_room[tightest].pop()
            has_room[tightest] = bool(with_room[tightest])
        else:
            block, tightest = blocks, block_tokens
            blocks += 1
        block_of[sequence] = block
        with_room[tightest - length].append(block)
        has_room[tightest - length] = True
    return block_of


def fill(conversations: Sequence[Encoded], block_tokens: int, pad_id: int) -> Blocks:
    """Pack conversations into blocks. One that is longer than a block is cut into pieces that stand alone."""
    ids = np.concatenate([np.empty(0, np.int32), *(part.ids for part in conversations)])
    learned = np.concatenate([np.empty(0, bool), *(part.learned for part in conversations)])
    lengths = _cut(np.array([len(part.ids) for part in conversations], dtype=np.int64), block_tokens)
    block_of = pack(lengths, block_tokens)
    shape = (int(block_of.max()) + 1 if len(lengths) else 0, block_tokens)
    input_ids = np.full(shape, pad_id, dtype=np.int32)
    position_ids = np.zeros(shape, dtype=np.int32)
    labels = np.full(shape, NOT_LEARNED, dtype=np.int32)
    positions = np.arange(len(ids)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    places = positions + np.repeat(block_of * block_tokens + _offsets(lengths, block_of), lengths)
    input_ids.ravel()[places] = ids
    position_ids.ravel()[places] = positions
    # The first token has nothing before it but another conversation's end.
    labels.ravel()[places] = np.where(learned & (positions > 0), ids, NOT_LEARNED)
    return Blocks(input_ids, position_ids, labels)


def _cut(lengths: np.ndarray, block_tokens: int) -> np.ndarray:
    """The lengths of pieces of at most `block_tokens` that sequences are cut into, in order."""
    whole, rest = np.divmod(lengths, block_tokens)
    counts = whole + (rest > 0)
    pieces = np.full(counts.sum(), block_tokens, np.int64)
    last = np.cumsum(counts)[rest > 0] - 1
    pieces[last] = rest[rest > 0]
    return pieces


def _offsets(lengths: np.ndarray, block_of: np.ndarray) -> np.ndarray:
    """Where in its block each sequence begins, if those of a block follow one another in order."""
    order = np.argsort(block_of, kind="stable")
    before = np.cumsum(lengths[order]) - lengths[order]
    first = np.searchsorted(block_of[order], block_of[order])
    offsets = np.empty(len(lengths), np.int64)
    offsets[order] = before - before[first]
    return offsets


def tokens_in(position_ids: np.ndarray) -> int:
    """Tokens that are not padding. A conversation has one position 1, and padding none (see `Blocks`)."""
    return int((position_ids > 0).sum() + (position_ids == 1).sum())
