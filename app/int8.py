"""bitsandbytes' int8 linear layers on a CPU, quick for small layers.

LLM.int8() quantises the activations of every call, which on a CPU is a dozen small operations: up to about half a
million weights they take longer than the product itself. Small layers therefore multiply with the int8 weights
as they are, turned into the activations' number format for the moment, and scale the result. Large layers keep
LLM.int8(), whose int8 product is faster than one in floating point.

A base model that adapters are trained on computes so in all its layers (`prepare_for_adapters`): LLM.int8() would
quantise the activations in evaluation and not in training, and the adapters fit what they were trained beside.

torch's own kernel for the purpose, `torch._weight_int8pack_mm`, was faster still and is not used: in torch 2.13 it
ends the process where a weight does not begin at a multiple of 16 bytes, and is wrong for odd shapes.
"""

from typing import Any

import bitsandbytes
import torch
from bitsandbytes.nn.modules import Linear8bitLt
from transformers import PreTrainedModel

SMALL_LAYER = 2**19
"""Weights. Measured on one core with AVX-512, microseconds a call for 1 and 256 rows: 192 x 512 in float32, LLM.int8()
124 and 548, this module 21 and 558; 1,024 x 1,024 in bfloat16, LLM.int8() 144 and 3,547, this module 248 and 3,364."""


def hasten(model: PreTrainedModel) -> None:
    """Let the small int8 layers of a model on a CPU work without LLM.int8().

    A model of small layers alone computes in float32 from then on: its products are too short for bfloat16 to pay.
    """
    if model.device.type != "cpu":
        return
    layers = [module for module in model.modules() if type(module) is Linear8bitLt]
    small = [layer for layer in layers if layer.weight.numel() <= SMALL_LAYER]
    for layer in small:
        layer.__class__ = DequantisingLinear8bit
    if len(small) == len(layers):
        torch.nn.Module.float(model)


def prepare_for_adapters(model: PreTrainedModel) -> None:
    """Let all int8 layers of a model on a CPU multiply with their dequantised weights, in training and evaluation."""
    if model.device.type == "cpu":
        for module in model.modules():
            if isinstance(module, Linear8bitLt):
                module.__class__ = DequantisingLinear8bit


class DequantisingLinear8bit(Linear8bitLt):
    """A Linear8bitLt whose activations are not quantised."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., inputs) -> (..., outputs), in the number format of `x`."""
        layer: Any = self  # its weight and state are not typed
        if layer.weight.CB is not None:
            layer.init_8bit_state()
        if x.requires_grad and torch.is_grad_enabled():
            # Keeps the int8 weight for the backward pass, where autograd would keep each layer's dequantised copy.
            layer.state.is_training = True
            through: torch.Tensor = bitsandbytes.matmul(  # type: ignore[attr-defined]
                x, layer.weight, bias=self.bias, state=layer.state
            )
            return through
        product = torch.nn.functional.linear(x, layer.state.CB.to(x.dtype)) * layer.state.SCB.div(127.0)
        if self.bias is not None:
            product = product + self.bias
        result: torch.Tensor = product.to(x.dtype)
        return result
