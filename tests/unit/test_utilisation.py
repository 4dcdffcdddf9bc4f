"""What a training worker does with the machine: counted operations against PyTorch's own count."""

import resource
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from app.training.utilisation import flops_per_token, matmul_peak_flops, memory_bytes

TOKENS = 64


def small(tied: bool) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=TOKENS, tie_word_embeddings=tied, attn_implementation="eager",
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("frozen", [False, True])
def test_operations_are_those_that_torch_counts(tied: bool, frozen: bool) -> None:
    model = small(tied)
    if frozen:  # as adapters are trained: gradients flow through all layers, to the weights of none
        model.requires_grad_(False)
    ids = torch.zeros((1, TOKENS), dtype=torch.long)
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    with FlopCounterMode(display=False) as counter:
        model(inputs_embeds=embedded, use_cache=False).logits.sum().backward()
    assert flops_per_token(model, TOKENS) * TOKENS == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_a_weight_that_zero_has_spread_counts_as_the_whole_one() -> None:
    model = small(tied=False)
    whole = flops_per_token(model, TOKENS)
    for weight in model.parameters():  # what ZeRO-3 leaves of them between two steps
        weight.ds_shape, weight.ds_numel = weight.shape, weight.numel()
        weight.data = torch.empty(0)
    assert flops_per_token(model, TOKENS) == whole


def test_a_matrix_product_is_faster_than_one_operation_a_nanosecond() -> None:
    assert matmul_peak_flops(torch.device("cpu"), torch.float32) > 1e9


def test_memory_is_at_least_what_is_held_now() -> None:
    held = torch.ones(25_000_000)
    now = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    assert now > held.nbytes
    # Linux adds up what threads have touched only now and then.
    assert 0.95 * now <= memory_bytes(torch.device("cpu")) < 20 * now
