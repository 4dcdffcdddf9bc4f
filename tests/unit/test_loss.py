import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from app.errors import ModelError
from app.training import loss
from app.training.packing import NOT_LEARNED

SHAPE = {"vocab_size": 97, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def llama(**settings: object) -> LlamaForCausalLM:
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, **settings))


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(2)
    ids = torch.randint(0, 97, (3, 20), generator=draw)
    learned = torch.rand(3, 20, generator=draw) < 0.6
    return ids, torch.arange(20).expand(3, -1), torch.where(learned, ids.roll(-1, 1), NOT_LEARNED)


@pytest.mark.parametrize("chunk_tokens", [1, 7, 1_000])
@pytest.mark.parametrize("tied", [False, True])
def test_chunked_loss_and_its_gradient_are_the_plain_ones(chunk_tokens: int, tied: bool) -> None:
    ids, positions, targets = batch()
    plain = llama(tie_word_embeddings=tied)
    logits = plain(input_ids=ids, position_ids=positions, use_cache=False).logits
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=NOT_LEARNED, reduction="sum"
    )
    (expected / 8).backward()
    model = llama(tie_word_embeddings=tied)
    head = loss.Head(model, chunk_tokens)
    found = head.loss(model, targets, input_ids=ids, position_ids=positions)
    (found / 8).backward()
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(float(expected), rel=1e-6)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, plain.get_parameter(name).grad, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        assert float(head.loss(model, targets, input_ids=ids, position_ids=positions)) == pytest.approx(float(found))
        assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits), "logits are given to others"


def test_no_gradient_is_computed_where_none_is_asked_for() -> None:
    ids, positions, targets = batch()
    model = llama()
    with torch.no_grad(), FlopCounterMode(display=False) as layers:
        model.model(input_ids=ids, position_ids=positions, use_cache=False)
    head = loss.Head(model, 7)
    with torch.no_grad(), FlopCounterMode(display=False) as all_of_it:
        head.loss(model, targets, input_ids=ids, position_ids=positions)
    learned = int((targets != NOT_LEARNED).sum())
    assert all_of_it.get_total_flops() - layers.get_total_flops() == 2 * learned * 16 * 97


def test_head_with_a_bias_and_one_that_is_no_plain_layer_have_the_plain_loss() -> None:
    ids, positions, targets = batch()
    for wrap in (False, True):
        torch.manual_seed(1)
        model = GPTNeoXForCausalLM(GPTNeoXConfig(**SHAPE))
        layer = torch.nn.Linear(16, 97, bias=True)
        torch.nn.init.normal_(layer.bias)
        if wrap:
            layer.__class__ = type("Adapted", (torch.nn.Linear,), {})
        model.set_output_embeddings(layer)
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits.flatten(0, 1)
        expected = torch.nn.functional.cross_entropy(logits, targets.flatten(), reduction="sum")
        expected.backward()
        grad, layer.bias.grad = layer.bias.grad, None
        found = loss.Head(model, 7).loss(model, targets, input_ids=ids, position_ids=positions)
        found.backward()
        assert float(found) == pytest.approx(float(expected), rel=1e-6)
        torch.testing.assert_close(layer.bias.grad, grad, rtol=1e-4, atol=1e-6)


def test_batch_without_a_learned_token_has_no_loss_and_a_gradient_of_zero() -> None:
    ids, positions, targets = batch()
    model = llama()
    found = loss.Head(model, 7).loss(
        model, torch.full_like(targets, NOT_LEARNED), input_ids=ids, position_ids=positions
    )
    found.backward()
    assert float(found) == 0.0
    assert all(float(weight.grad.abs().max()) == 0.0 for weight in model.parameters() if weight.grad is not None)


def test_model_that_rescales_its_logits_is_refused() -> None:
    model = llama()
    loss.check(model)
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(ModelError, match=r"changes its logits \(final_logit_softcapping=30.0\)"):
        loss.check(model)
