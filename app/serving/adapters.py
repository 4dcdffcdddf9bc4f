"""Low-rank adapters of several variants beside one copy of their base: each reply is written with its own.

A forward hook adds to a layer's output what the adapters do, so the base stays as it is: packed, int8, on a CPU or a
GPU. All adapters of a layer are one pair of matrices, and between the two each token keeps the columns of its own: two
products and a mask, however many adapters there are. A product for each of them takes longer to start than to do:
16 replies of a 7M model with 8 adapters of rank 8 were 471 tokens/s that way, 818 this way, 1,259 without. Its
cost grows with all adapters' ranks together. Shapes depend on no token, so passes can be recorded.

Axis: X all adapters' ranks, one after another.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from app import adapter
from app.serving.packed_linear import Product, product


class Adapters:
    """A model's.

    Args:
        model: Gets a hook on each layer that any of them adapts.
        folders: By the variant's name, what peft wrote.

    Raises:
        ModelError: One does not fit the model.
    """

    def __init__(self, model: PreTrainedModel, folders: Mapping[str, Path]) -> None:
        self._numbers = {name: number for number, name in enumerate(folders, start=1)}
        self._mask: torch.Tensor | None = None
        read = [adapter.read(folder) for folder in folders.values()]
        ranks = [max(len(pair.down) for pair in layers.values()) for layers in read]
        owners = torch.arange(1, len(read) + 1).repeat_interleave(torch.tensor(ranks, dtype=torch.long))
        self._owners_X = owners.to(model.device)
        """Whose each column is."""
        for path in sorted({path for layers in read for path in layers}):
            pairs = [layers.get(path) for layers in read]
            (layer,) = {adapter.adapted_layer(model, path, pair) for pair in pairs if pair}
            down, up = (part.to(model.device, model.dtype) for part in _joined(pairs, layer, ranks))
            layer.register_forward_hook(partial(self._add, product(down), product(up)))

    def number(self, name: str) -> int:
        """By which a pass knows a variant's adapter; 0 for the base itself."""
        return self._numbers[name] if name else 0

    @property
    def last(self) -> int:
        """The largest number."""
        return len(self._numbers)

    @contextmanager
    def of(self, numbers: torch.Tensor) -> Iterator[None]:
        """Within, the model's tokens get these adapters.

        Args:
            numbers: (rows, tokens), or 1 in place of either where all of them get the same; on the model's device.
        """
        # On a GPU nothing is looked at: it would have to be waited for.
        if self._numbers and (numbers.device.type != "cpu" or bool(numbers.any())):
            self._mask = numbers.unsqueeze(-1) == self._owners_X
        try:
            yield
        finally:
            self._mask = None

    def _add(self, down: Product, up: Product, layer: nn.Module, given: tuple[Any, ...], output: Any) -> Any:
        if self._mask is None:
            return None
        inner, mask = down(given[0]), self._mask
        if inner.dim() == 2:  # rows and tokens as one: experts that all tokens share
            mask = mask.expand(-1, len(inner) // mask.shape[0], -1).reshape(len(inner), -1)
        # Not a product with 0 and 1: what another's adapter makes of this token may not be a number.
        return output + up(torch.where(mask, inner, 0))


def _joined(
    pairs: Sequence[adapter.LowRank | None], layer: nn.Linear, ranks: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """All adapters of a layer, (X, inputs) and (outputs, X): zeros where one has no rank so high, or is not here."""
    down, up = torch.zeros(sum(ranks), layer.in_features), torch.zeros(layer.out_features, sum(ranks))
    begin = 0
    for pair, rank in zip(pairs, ranks, strict=True):
        if pair:
            down[begin : begin + len(pair.down)] = pair.down
            up[:, begin : begin + len(pair.down)] = pair.up
        begin += rank
    return down, up
