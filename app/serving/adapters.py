"""Low-rank adapters of several variants beside one copy of their base: each reply is written with its own.

A forward hook adds to a layer's output what the adapters do, so the base stays as it is: packed, int8, on a CPU or a
GPU. All adapters of a layer are one pair of matrices, and between the two each token keeps the columns of its own: two
products and a mask, however many adapters there are. A product for each of them takes longer to start than to do:
16 replies of a 7M model with 8 adapters of rank 8 were 471 tokens/s that way, are 785 this way, and 1,132 without. Its
cost grows with all adapters' ranks together. Shapes depend on no token, so passes can be recorded.

Axes: K adapters, R the largest rank, X = K * R.
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
from app.errors import ModelError
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
        rank = max((len(pair.down) for layers in read for pair in layers.values()), default=0)
        self._owners_X = torch.arange(1, len(read) + 1, device=model.device).repeat_interleave(rank)
        """Whose each column is."""
        for path in sorted({path for layers in read for path in layers}):
            layer = _layer(model, path)
            down, up = _joined([layers.get(path) for layers in read], path, layer, rank)
            down, up = down.to(model.device, model.dtype), up.to(model.device, model.dtype)
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
        # Not a product with 0 and 1: what another's adapter makes of this token may not be a number.
        return None if self._mask is None else output + up(torch.where(self._mask, down(given[0]), 0))


def _layer(model: PreTrainedModel, path: str) -> nn.Linear:
    try:
        layer = model.get_submodule(path)
    except AttributeError:
        layer = None
    if not isinstance(layer, nn.Linear):
        linear = {name.rpartition(".")[2] for name, part in model.named_modules() if isinstance(part, nn.Linear)}
        raise ModelError(
            f"an adapter is for {path}, which is no linear layer of this base",
            f"its linear layers are {', '.join(sorted(linear))}",
        )
    if layer is model.get_output_embeddings():
        raise ModelError(f"an adapter is for {path}, the output layer", "train it without that layer")
    return layer


def _joined(
    pairs: Sequence[adapter.LowRank | None], path: str, layer: nn.Linear, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """All adapters of a layer, (X, inputs) and (outputs, X): zeros up to `rank`, and for those that leave it alone."""
    down, up = torch.zeros(len(pairs), rank, layer.in_features), torch.zeros(layer.out_features, len(pairs), rank)
    for number, pair in enumerate(pairs):
        if pair:
            found, there = (pair.up.shape[0], pair.down.shape[1]), (layer.out_features, layer.in_features)
            if found != there:
                raise adapter.misfit(path, found, there)
            down[number, : len(pair.down)] = pair.down
            up[:, number, : len(pair.down)] = pair.up
    return down.flatten(0, 1), up.flatten(1, 2)
