"""Keys and values of prompts' beginnings, kept for prompts that begin alike: system texts, tools, earlier turns.

A prompt is read in blocks of BLOCK_TOKENS. Each full block is known by all tokens up to its end and by its scope, so
that a block is reused only where the same tokens stand before it, for the same API key. A block is always computed by
a pass of its own over the same positions: whether it was computed now or earlier changes no bit of a reply.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

import torch

BLOCK_TOKENS = 64


def block_keys(scope: str, prompt: Sequence[int]) -> list[bytes]:
    """What each full block of a prompt is known by, but for the one that its last token is in: that is always read."""
    keys = []
    digest = hashlib.blake2b(scope.encode(), digest_size=16)
    for begin in range(0, len(prompt) - BLOCK_TOKENS, BLOCK_TOKENS):
        digest.update(array("q", prompt[begin : begin + BLOCK_TOKENS]).tobytes())
        keys.append(digest.digest())
    return keys


class PrefixCache:
    """Blocks, the ones that were not wanted for longest going first.

    Args:
        max_bytes: Of all blocks; 0 keeps none.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self._bytes = max_bytes, 0
        self._blocks: OrderedDict[bytes, torch.Tensor] = OrderedDict()

    def get(self, key: bytes) -> torch.Tensor | None:
        """A block, (layers, keys and values, heads, BLOCK_TOKENS, head size)."""
        block = self._blocks.get(key)
        if block is not None:
            self._blocks.move_to_end(key)
        return block

    def put(self, key: bytes, block: torch.Tensor) -> None:
        """Keep a block, and let others go for it."""
        if block.nbytes > self.max_bytes or key in self._blocks:
            return
        self._blocks[key] = block
        self._bytes += block.nbytes
        while self._bytes > self.max_bytes:
            _, oldest = self._blocks.popitem(last=False)
            self._bytes -= oldest.nbytes
