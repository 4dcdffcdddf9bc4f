"""What of a prompt was read before: blocks are known by everything that stands before them."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from app.serving.prefix_cache import BLOCK_TOKENS, PrefixCache, block_keys

TOKENS = st.lists(st.integers(0, 3), max_size=4 * BLOCK_TOKENS)


@given(TOKENS, TOKENS, st.text(max_size=3), st.text(max_size=3))
def test_two_prompts_share_the_blocks_that_they_begin_with_and_no_others(
    one: list[int], other: list[int], scope: str, another: str
) -> None:
    keys, others = block_keys(scope, one), block_keys(another, other)
    assert len(keys) == max(0, (len(one) - 1) // BLOCK_TOKENS)
    for place, (key, its) in enumerate(zip(keys, others, strict=False)):
        end = (place + 1) * BLOCK_TOKENS
        assert (key == its) == (scope == another and one[:end] == other[:end])


@given(st.integers(0, 3 * BLOCK_TOKENS), st.integers(0, BLOCK_TOKENS))
def test_a_prompt_that_goes_on_has_the_blocks_of_the_shorter_one(length: int, more: int) -> None:
    shorter = list(range(length))
    longer = block_keys("", [*shorter, *range(more)])
    assert longer[: len(block_keys("", shorter))] == block_keys("", shorter)


def test_blocks_that_were_not_wanted_for_longest_go_first() -> None:
    cache, block = PrefixCache(max_bytes=3 * 40), torch.zeros(10)
    for key in (b"a", b"b", b"c"):
        cache.put(key, block)
    assert cache.get(b"a") is block
    cache.put(b"d", block)
    assert [key for key in (b"a", b"b", b"c", b"d") if cache.get(key) is not None] == [b"a", b"c", b"d"]
    cache.put(b"large", torch.zeros(31))
    assert cache.get(b"large") is None
    assert PrefixCache(0).get(b"a") is None
