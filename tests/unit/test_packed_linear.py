import torch
from transformers import LlamaConfig, LlamaForCausalLM

from app.serving.packed_linear import pack


def net(dtype: torch.dtype, tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=tied, attention_bias=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).train(False)


def test_a_packed_model_computes_the_same_bits_and_holds_its_weights_once() -> None:
    for tied in (True, False):
        model = net(torch.bfloat16, tied)
        ids = torch.arange(14).view(2, 7)
        with torch.inference_mode():
            expected = model(ids).logits
            parameters = model.num_parameters()
            pack(model)
            assert torch.equal(model(ids).logits, expected)
        assert model.num_parameters() == parameters
        assert model.lm_head.weight.is_meta is not tied
        assert model.model.layers[0].mlp.up_proj.weight.is_meta
        assert not model.get_input_embeddings().weight.is_meta


def test_a_model_in_float32_stays_as_it_is() -> None:
    model = net(torch.float32, tied=True)
    pack(model)
    assert not any(parameter.is_meta for parameter in model.parameters())
