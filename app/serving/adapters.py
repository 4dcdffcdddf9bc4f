"""Low-rank adapters of several variants beside one copy of their base: each reply is written with its own.

What a variant's adapter adds to a layer comes from a forward hook, so the base stays as it is: packed, int8, on a CPU
or a GPU. A pass says which adapter each of its tokens gets; number 0 is none.

Axes: K adapters and none, R rank, I inputs, O outputs, N tokens, B rows.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from app import adapter
from app.errors import ModelError


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
        self._chosen: _Chosen | None = None
        read = [adapter.read(folder) for folder in folders.values()]
        for path in sorted({path for layers in read for path in layers}):
            layer = _layer(model, path)
            pairs = [layers.get(path) for layers in read]
            for pair in pairs:
                if pair:
                    _check(path, pair, layer)
            down, up = _stacked(pairs, layer, model)
            layer.register_forward_hook(partial(self._add, down, up))

    def number(self, name: str) -> int:
        """By which a pass knows a variant's adapter; 0 for the base itself."""
        return self._numbers[name] if name else 0

    @property
    def last(self) -> int:
        """The largest number."""
        return len(self._numbers)

    @contextmanager
    def of_tokens(self, pieces: Sequence[tuple[int, int]]) -> Iterator[None]:
        """Within, the model is given these pieces' tokens one after another.

        Args:
            pieces: Of each, its number of tokens and its adapter.
        """
        with self._choose(_of_tokens(pieces) if self._numbers else None):
            yield

    @contextmanager
    def of_rows(self, numbers_B: torch.Tensor) -> Iterator[None]:
        """Within, the model is given rows with an adapter each. Shapes do not depend on which: this can be recorded."""
        with self._choose(_OfRows(numbers_B) if self._numbers else None):
            yield

    @contextmanager
    def _choose(self, chosen: "_Chosen | None") -> Iterator[None]:
        self._chosen = chosen
        try:
            yield
        finally:
            self._chosen = None

    def _add(
        self, down_KRI: torch.Tensor, up_KOR: torch.Tensor, layer: nn.Module, given: tuple[Any, ...], output: Any
    ) -> Any:
        return self._chosen.added(down_KRI, up_KOR, given[0], output) if self._chosen else None


class _Chosen(Protocol):
    """Which tokens of a pass get which adapter."""

    def added(
        self, down_KRI: torch.Tensor, up_KOR: torch.Tensor, given: torch.Tensor, output: torch.Tensor
    ) -> torch.Tensor:
        """A layer's output with what the adapters add."""


class _OfRows:
    def __init__(self, numbers_B: torch.Tensor) -> None:
        self._numbers_B = numbers_B

    def added(
        self, down_KRI: torch.Tensor, up_KOR: torch.Tensor, given: torch.Tensor, output: torch.Tensor
    ) -> torch.Tensor:
        inner = torch.bmm(given, down_KRI[self._numbers_B].transpose(1, 2))
        return torch.baddbmm(output, inner, up_KOR[self._numbers_B].transpose(1, 2))


class _OfTokens:
    """One product an adapter: small ones cost more to start than to do.

    Args:
        places: By adapter, the tokens that get it.
        tokens: In all.
    """

    def __init__(self, places: Mapping[int, slice | torch.Tensor], tokens: int) -> None:
        self._places, self._tokens = places, tokens

    def added(
        self, down_KRI: torch.Tensor, up_KOR: torch.Tensor, given: torch.Tensor, output: torch.Tensor
    ) -> torch.Tensor:
        given_NI = given.reshape(-1, given.shape[-1])
        if len(given_NI) != self._tokens:
            raise ValueError(f"an adapted layer was given {len(given_NI)} tokens of {self._tokens}")
        sum_NO = output.contiguous().view(-1, output.shape[-1])
        for number, places in self._places.items():
            inner = nn.functional.linear(given_NI[places], down_KRI[number])
            sum_NO[places] += nn.functional.linear(inner, up_KOR[number])
        return sum_NO.view_as(output)


def _of_tokens(pieces: Sequence[tuple[int, int]]) -> _OfTokens | None:
    """None where no piece has an adapter."""
    found: dict[int, list[int]] = {}
    tokens = 0
    for count, number in pieces:
        if number:
            found.setdefault(number, []).extend(range(tokens, tokens + count))
        tokens += count
    return _OfTokens({number: _places(some) for number, some in found.items()}, tokens) if found else None


def _places(ascending: Sequence[int]) -> slice | torch.Tensor:
    """A slice where they follow one another: it copies nothing."""
    first, last = ascending[0], ascending[-1]
    return slice(first, last + 1) if last - first + 1 == len(ascending) else torch.tensor(ascending)


def _layer(model: PreTrainedModel, path: str) -> nn.Linear:
    try:
        layer = model.get_submodule(path)
    except AttributeError:
        layer = None
    if not isinstance(layer, nn.Linear):
        names = ", ".join(sorted({name.rpartition(".")[2] for name, part in _linear_layers(model)}))
        raise ModelError(
            f"an adapter is for {path}, which is no linear layer of this base", f"its linear layers are {names}"
        )
    if layer is model.get_output_embeddings():
        raise ModelError(f"an adapter is for {path}, the output layer", "train it without that layer")
    return layer


def _linear_layers(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    return ((name, part) for name, part in model.named_modules() if isinstance(part, nn.Linear))


def _check(path: str, pair: adapter.LowRank, layer: nn.Linear) -> None:
    found, there = (pair.up.shape[0], pair.down.shape[1]), (layer.out_features, layer.in_features)
    if found != there:
        raise adapter.misfit(path, found, there)


def _stacked(
    pairs: Sequence[adapter.LowRank | None], layer: nn.Linear, model: PreTrainedModel
) -> tuple[torch.Tensor, torch.Tensor]:
    """All adapters of a layer, filled up to the largest rank; zeros for none, and for those that leave it alone."""
    rank = max(pair.down.shape[0] for pair in pairs if pair)
    down = torch.zeros(len(pairs) + 1, rank, layer.in_features)
    up = torch.zeros(len(pairs) + 1, layer.out_features, rank)
    for number, pair in enumerate(pairs, start=1):
        if pair:
            down[number, : len(pair.down)] = pair.down
            up[number, :, : len(pair.down)] = pair.up
    return down.to(model.device, model.dtype), up.to(model.device, model.dtype)
