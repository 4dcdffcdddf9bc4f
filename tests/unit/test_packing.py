import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from app import conversation
from app import model as models
from app.conversation import Encoded, Message
from app.errors import ConfigError
from app.training.packing import NOT_LEARNED, fill, pack, tokens_in

PAD = 0
lengths_of = st.lists(st.integers(1, 32), max_size=60)


def encoded(*lengths: int) -> list[Encoded]:
    """Conversations whose tokens are all different."""
    starts = np.cumsum([1, *lengths])
    return [
        Encoded(np.arange(start, start + length, dtype=np.int32), np.arange(length) % 3 != 1)
        for start, length in zip(starts, lengths, strict=False)
    ]


@given(lengths_of)
def test_no_block_is_too_full_and_none_is_left_out(lengths: list[int]) -> None:
    block_of = pack(np.array(lengths, dtype=np.int64), 32)
    sizes = np.bincount(block_of, weights=lengths) if lengths else np.zeros(0)
    assert (sizes <= 32).all()
    assert (sizes > 0).all()


@given(lengths_of)
def test_two_blocks_are_never_small_enough_to_be_one(lengths: list[int]) -> None:
    block_of = pack(np.array(lengths, dtype=np.int64), 32)
    sizes = sorted(np.bincount(block_of, weights=lengths)) if lengths else []
    assert len(sizes) < 2 or sizes[0] + sizes[1] > 32


def test_best_fit_takes_the_fullest_block_that_still_has_room() -> None:
    # 6 and 5 open blocks with 2 and 3 of 8 left: 2 goes to the first, 3 to the second.
    assert pack(np.array([6, 5, 3, 2]), 8).tolist() == [0, 1, 1, 0]


def test_equal_lengths_give_equal_blocks_every_time() -> None:
    lengths = np.random.default_rng(5).integers(1, 64, 500)
    assert (pack(lengths, 64) == pack(lengths, 64)).all()


def test_little_is_padding() -> None:
    lengths = np.random.default_rng(5).integers(10, 100, 2_000)
    blocks = pack(lengths, 256).max() + 1
    assert lengths.sum() / (blocks * 256) > 0.99


def test_a_sequence_longer_than_a_block_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"33 tokens does not fit into training\.block_tokens=32"):
        pack(np.array([3, 33]), 32)


@given(st.lists(st.integers(2, 100), max_size=30))
def test_every_token_is_in_exactly_one_block(lengths: list[int]) -> None:
    blocks = fill(encoded(*lengths), 32, PAD)
    assert sorted(blocks.input_ids[blocks.input_ids != PAD]) == list(range(1, sum(lengths) + 1))
    assert blocks.input_ids.shape[1] == 32


@given(st.lists(st.integers(2, 32), max_size=30))
def test_tokens_are_counted_without_padding(lengths: list[int]) -> None:
    assert tokens_in(fill(encoded(*lengths), 32, PAD).position_ids) == sum(lengths)


@given(st.lists(st.integers(2, 100), min_size=1, max_size=30))
def test_only_learned_tokens_are_labelled_and_never_the_first_of_a_conversation(lengths: list[int]) -> None:
    conversations = encoded(*lengths)
    blocks = fill(conversations, 32, PAD)
    labelled = set(blocks.labels[blocks.labels != NOT_LEARNED].tolist())
    expected = {
        int(token)
        for part in conversations
        for place, token in enumerate(part.ids)
        if part.learned[place] and place % 32
    }
    assert labelled == expected
    at = blocks.labels != NOT_LEARNED
    assert (blocks.labels[at] == blocks.input_ids[at]).all()
    assert (blocks.position_ids[at] > 0).all()


def test_nothing_gives_no_blocks() -> None:
    assert fill([], 32, PAD).input_ids.shape == (0, 32)


def test_packed_conversations_have_the_logits_that_they_have_alone() -> None:
    texts = ["where is my order 4512?", "it is on its way", "thanks a lot", "I want my money back", "of course"]
    tokenizer = conversation.train_tokenizer(texts, 300)
    talks: list[list[Message]] = [
        [{"role": "user", "content": texts[0]}, {"role": "assistant", "content": texts[1]}],
        [{"role": "user", "content": texts[2]}],
        [{"role": "user", "content": texts[3]}, {"role": "assistant", "content": texts[4]}],
    ]
    parts = [conversation.encode(tokenizer, talk, "assistant") for talk in talks]
    blocks = fill(parts, 128, tokenizer.convert_tokens_to_ids(conversation.PAD))
    assert len(blocks.input_ids) == 1, "all three share a block"
    model = models.new_model("preset:tiny", tokenizer, 128, seed=1).eval()
    with torch.no_grad():
        packed = model(
            input_ids=torch.from_numpy(blocks.input_ids).long(),
            position_ids=torch.from_numpy(blocks.position_ids).long(),
            use_cache=False,
        ).logits[0]
        for part in parts:
            row = blocks.input_ids[0]
            start = next(at for at in range(len(row)) if (row[at : at + len(part.ids)] == part.ids).all())
            alone = model(input_ids=torch.from_numpy(part.ids).long()[None], use_cache=False).logits[0]
            torch.testing.assert_close(packed[start : start + len(part.ids)], alone, atol=1e-5, rtol=1e-5)
