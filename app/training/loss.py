"""Cross-entropy of the learned tokens that never holds the logits of a whole batch.

The logits are the largest thing in a step: tokens x vocabulary, in fp32 for the loss, twice with their gradient. Here
they are made for some tokens at a time, only of tokens that are learned, and turned into the gradient at once.

Source: Hsu et al. 2024, Liger Kernel, section 3.2 (FusedLinearCrossEntropy).
"""

from typing import Any

import torch
from torch.nn.functional import cross_entropy, linear

from app.errors import ModelError
from app.training.packing import NOT_LEARNED

# Axes: B blocks, T tokens of a block, L learned tokens, C those of a chunk, D hidden size, V vocabulary
RESCALED = ("final_logit_softcapping", "logit_scale", "logits_scaling")
"""Settings of models whose logits are more than a product: Gemma, Cohere, Granite."""


class Head:
    """A model's output layer that gives the loss instead of the logits where that is asked for."""

    def __init__(self, model: Any, chunk_tokens: int) -> None:
        self._chunk_tokens = chunk_tokens
        self._targets_BT: torch.Tensor | None = None
        self._layer = model.get_output_embeddings()
        self._logits = self._layer.forward
        self._layer.forward = self._forward

    def loss(self, engine: Any, targets_BT: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        """Summed negative log-likelihood of the targets that are learned; (), fp32."""
        self._targets_BT = targets_BT
        try:
            total: torch.Tensor = engine(**inputs, use_cache=False).logits
        finally:
            self._targets_BT = None
        return total

    def _forward(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        if self._targets_BT is None:
            logits: torch.Tensor = self._logits(hidden_BTD)
            return logits
        learned_BT = self._targets_BT != NOT_LEARNED
        hidden_LD, targets_L = hidden_BTD[learned_BT], self._targets_BT[learned_BT]
        if type(self._layer) is not torch.nn.Linear:
            # Its weight is not all here (tensor parallel), or not all of it (an adapter).
            return cross_entropy(self._logits(hidden_LD).float(), targets_L, reduction="sum")
        apply: Any = _ChunkedLoss.apply
        settings = self._chunk_tokens, torch.is_grad_enabled()
        total: torch.Tensor = apply(hidden_LD, self._layer.weight, self._layer.bias, targets_L, *settings)
        return total


def check(model: Any) -> None:
    """Refuse a model whose logits are rescaled, which the loss here does not know of.

    Raises:
        ModelError: Naming the setting.
    """
    config = model.config.get_text_config()
    for name in RESCALED:
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise ModelError(
                f"{type(model).__name__} changes its logits ({name}={getattr(config, name)}), which the loss does not",
                "train a model without it",
            )


class _ChunkedLoss(torch.autograd.Function):
    """The sum of the losses; its gradient is computed with it, so that no chunk's logits are made twice."""

    @staticmethod
    def forward(
        context: Any,
        hidden_LD: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        targets_L: torch.Tensor,
        chunk_tokens: int,
        is_grad_enabled: bool,
    ) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden_LD.device)
        # Within a function it is off, and a weight asks for a gradient whether or not it is on.
        needed = [is_grad_enabled and asked for asked in context.needs_input_grad]
        grad_hidden_LD = torch.empty_like(hidden_LD) if any(needed) else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if needed[1] else None
        grad_bias_V = None if bias_V is None else torch.zeros_like(bias_V, dtype=torch.float32)
        for start in range(0, len(hidden_LD), chunk_tokens):
            hidden_CD = hidden_LD[start : start + chunk_tokens]
            targets_C1 = targets_L[start : start + chunk_tokens, None]
            logits_CV = linear(hidden_CD, weight_VD, bias_V).float()
            norm_C1 = logits_CV.logsumexp(-1, keepdim=True)
            total += (norm_C1 - logits_CV.gather(1, targets_C1)).sum()
            if grad_hidden_LD is None:
                continue
            grad_CV = logits_CV.sub_(norm_C1).exp_()
            grad_CV.scatter_add_(1, targets_C1, torch.full_like(norm_C1, -1.0))
            if grad_bias_V is not None:
                grad_bias_V += grad_CV.sum(0)
            grad_CV = grad_CV.to(hidden_LD.dtype)
            torch.mm(grad_CV, weight_VD, out=grad_hidden_LD[start : start + chunk_tokens])
            if grad_weight_VD is not None:
                grad_weight_VD += grad_CV.T @ hidden_CD
        context.gradients = (grad_hidden_LD, grad_weight_VD, grad_bias_V)
        context.dtype = weight_VD.dtype
        return total

    @staticmethod
    def backward(context: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        found, context.gradients = context.gradients, None  # the loss may be held for longer than them
        return (*(None if part is None else part.mul_(grad).to(context.dtype) for part in found), None, None, None)
