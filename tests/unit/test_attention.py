"""Attention of packed conversations, against transformers' own with a mask."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from app.config import Config
from app.errors import ModelError
from app.training import attention

SHAPE: dict[str, Any] = {
    "vocab_size": 53, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48,
}  # fmt: skip
KINDS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SHAPE)),
    "mistral": (MistralForCausalLM, MistralConfig(**SHAPE, sliding_window=None)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SHAPE)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SHAPE, head_dim=8)),
}
AUTO = Config().training
VARLEN = Config().with_overrides({"training.attention": "varlen"}).training


def positions(lengths: list[list[int]]) -> torch.Tensor:
    """(B, T) of conversations of these lengths in each block."""
    return torch.stack([torch.cat([torch.arange(length) for length in block]) for block in lengths])


def computed(model: Any, ids: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    model.zero_grad()
    logits = model(input_ids=ids, position_ids=position_ids, use_cache=False).logits
    logits.logsumexp(-1).square().sum().backward()
    return logits.detach(), [weight.grad.clone() for weight in model.parameters()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "lengths", [[[24]], [[9, 15], [24]], [[1, 1, 1, 21], [10, 12, 1, 1], [8, 8, 8]]], ids=["whole", "two", "many"]
)
def test_losses_and_gradients_are_those_with_a_mask(kind: str, lengths: list[list[int]]) -> None:
    build, config = KINDS[kind]
    torch.manual_seed(3)
    model = build(config)
    position_ids = positions(lengths)
    ids = torch.randint(0, 53, position_ids.shape)
    logits, gradients = computed(model, ids, position_ids)
    assert attention.knows(model)
    attention.use(model, AUTO)
    found, found_gradients = computed(model, ids, position_ids)
    torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-5)
    for one, other in zip(found_gradients, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_in_bf16_it_is_as_near_to_fp32_as_transformers_own(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    build, config = KINDS["llama"]
    exact = build(config)
    position_ids = positions([[9, 15], [24], [1, 1, 10, 12]])
    ids = torch.randint(0, 53, position_ids.shape)
    _, gradients = computed(exact, ids, position_ids)
    rounded = build(config)
    rounded.load_state_dict(exact.state_dict())
    rounded = rounded.bfloat16()

    def error() -> float:
        _, found = computed(rounded, ids, position_ids)
        off = sum(float((one.float() - other).square().sum()) for one, other in zip(found, gradients, strict=True))
        return (off / sum(float(other.square().sum()) for other in gradients)) ** 0.5

    theirs = error()
    attention.use(rounded, AUTO)
    ours = error()
    monkeypatch.setattr(attention, "CHUNK_BYTES", 1)
    assert error() == pytest.approx(ours, rel=0.2)
    monkeypatch.setattr(attention, "MOST_DIRECT_TOKENS", 0)
    assert max(ours, error()) < 1.5 * theirs < 0.1


def test_activation_checkpointing_computes_the_same_again() -> None:
    torch.manual_seed(3)
    build, config = KINDS["llama"]
    model = build(config).train()
    attention.use(model, AUTO)
    position_ids = positions([[9, 15], [24]])
    ids = torch.randint(0, 53, position_ids.shape)
    _, gradients = computed(model, ids, position_ids)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    _, again = computed(model, ids, position_ids)
    for one, other in zip(again, gradients, strict=True):
        torch.testing.assert_close(one, other)


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), min_size=1, max_size=4))
def test_layout_has_each_token_once_and_conversations_in_order(blocks: list[list[int]]) -> None:
    tokens = max(sum(block) for block in blocks)
    filled = [block + [1] * (tokens - sum(block)) for block in blocks]  # padding stands alone
    position_ids = positions(filled)
    where = attention.layout(position_ids)
    assert sum(count * length for count, length in where.groups) == len(where.rows_p)
    assert torch.equal(where.rows_p[where.places_r], torch.arange(position_ids.numel()))
    assert len(where.rows_p) == position_ids.numel() + len(where.padded)
    assert sum(count for count, _ in where.groups) == sum(len(block) for block in filled)
    first = 0
    for count, length in where.groups:
        rows = where.rows_p[first : first + count * length].view(count, length)
        first += count * length
        for conversation in rows:
            own = conversation[: int((conversation != conversation[0]).sum()) + 1]
            assert torch.equal(own, own[0] + torch.arange(len(own)))
            assert torch.equal(position_ids.flatten()[own], torch.arange(len(own)))
            assert len(own) >= attention.FEWEST_OF_LONGEST * length


def test_models_whose_attention_is_more_keep_their_own_or_are_refused() -> None:
    windowed = MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=8))
    other = GPT2LMHeadModel(GPT2Config(vocab_size=53, n_embd=32, n_layer=1, n_head=2))
    for model in (windowed, other):
        before = model.config._attn_implementation
        attention.use(model, AUTO)
        assert model.config._attn_implementation == before
        with pytest.raises(ModelError, match=r"attention=varlen is for llama, .* without sliding windows"):
            attention.use(model, VARLEN)


def test_a_saved_model_attends_as_others_do(tmp_path: Any) -> None:
    build, config = KINDS["llama"]
    model = build(config)
    attention.use(model, AUTO)
    model.save_pretrained(tmp_path)
    assert attention.NAME not in (tmp_path / "config.json").read_text()
    assert LlamaForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def test_layers_that_are_told_no_positions_are_not_mistaken() -> None:
    part = torch.zeros(1, 2, 4, 8)
    with pytest.raises(ModelError, match="does not say where conversations end"):
        attention.varlen(torch.nn.Identity(), part, part, part, None)


SMALL: dict[str, Any] = {"vocab_size": 53, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
MASKLESS = {
    "opt": (OPTForCausalLM, OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64)),
    "falcon": (FalconForCausalLM, FalconConfig(**SMALL, new_decoder_architecture=False, multi_query=True)),
}


@pytest.mark.parametrize("kind", MASKLESS)
def test_a_model_whose_packed_conversations_would_see_each_other_is_refused(kind: str) -> None:
    build, config = MASKLESS[kind]
    with pytest.raises(ModelError, match="see each other"):
        attention.check(build(config), AUTO)


def test_models_that_make_a_mask_from_positions_are_not_refused() -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=53, n_embd=32, n_layer=2, n_head=4, n_positions=64))
    attention.check(gpt2, AUTO)
    build, config = KINDS["llama"]
    attention.check(build(config), Config().with_overrides({"training.attention": "sdpa"}).training)
