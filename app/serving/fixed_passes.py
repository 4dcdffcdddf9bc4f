"""Forward passes of unchanging shapes, recorded once as CUDA graphs and then replayed: for models on a GPU.

Starting the hundreds of kernels of a pass one by one takes longer than running them; a graph starts them at once.
Rows that are not needed are padded, so that a row meets the same kernels, and gets the same bits, in any company.
Passes come in lengths, each twice the one before: how many positions attention runs over.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from app.serving.passes import Piece
from app.serving.prefix_cache import BLOCK_TOKENS
from app.serving.slot_cache import SlotCache, View, rounded_up

PIECES = 8
"""Rows of a pass that reads prompts."""
WARM_UPS = 2
"""Runs before a pass is recorded: libraries choose their kernels and allocate."""


class FixedPasses:
    """Passes over `slots` rows, and one more that what is padded is written to.

    Args:
        model: Changed: its attention.
    """

    pieces, prompts, prompt_tokens = PIECES, PIECES, 4 * PIECES * BLOCK_TOKENS

    def __init__(self, model: PreTrainedModel, slots: int, context_tokens: int) -> None:
        self.cache = SlotCache(model, slots + 1, context_tokens)
        self._spare = slots
        lengths = _lengths(rounded_up(context_tokens))
        # The longest first: the others then fit into the memory that it has taken.
        record = _recorder(model)
        self._reads = {length: _Pass(model, self.cache, PIECES, BLOCK_TOKENS, length, record) for length in lengths}
        self._steps = {length: _Pass(model, self.cache, slots, 1, length, record) for length in lengths}

    def read(self, pieces: Sequence[Piece]) -> torch.Tensor:
        """As the protocol has it. A prompt's pieces may share a pass: each layer writes all of them, and then each
        attends to those before it."""
        padding = [Piece(self._spare, 0, [0])] * (PIECES - len(pieces))
        fitting = _fitting(self._reads, max(piece.begin for piece in pieces) + BLOCK_TOKENS)
        slots, begins, ids = zip(*pieces, *padding, strict=True)
        padded = [[*some, *[0] * (BLOCK_TOKENS - len(some))] for some in ids]
        fitting(padded, begins, slots, [len(some) - 1 for some in ids])
        self._written = fitting.states
        return fitting.logits[: len(pieces)]

    def block(self, number: int) -> torch.Tensor:
        """As the protocol has it."""
        return self._written[:, :, number].clone()

    def step(self, tokens: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        """As the protocol has it."""
        rows = range(self._spare)
        padding = self._spare - len(tokens)
        fitting = _fitting(self._steps, max(positions) + 1)
        fitting([[token] for token in tokens] + [[0]] * padding, [*positions, *[0] * padding], rows)
        return fitting.logits[: len(tokens)]


class _FixedView(View):
    """Rows and positions that are looked up when the pass runs."""

    def __init__(self, rows: torch.Tensor, begins: torch.Tensor, new_tokens: int, length: int, dtype: torch.dtype):
        self.new_tokens, self.length = new_tokens, length
        self.row_indices = rows
        self.positions = begins.unsqueeze(1) + torch.arange(new_tokens, device=rows.device)
        self.lengths = self.positions[:, -1] + 1
        self.mask = self._mask(dtype)
        self._first_rows = new_tokens == 1
        """A step takes the first rows as they lie; prompts are read into any."""

    @property
    def begin(self) -> int:
        return self.length - self.new_tokens

    def write(self, states: torch.Tensor, new: torch.Tensor) -> None:
        states[self.row_indices.unsqueeze(1), :, self.positions] = new.transpose(1, 2)

    def read(self, states: torch.Tensor) -> torch.Tensor:
        rows = slice(0, len(self.row_indices)) if self._first_rows else self.row_indices
        return states[rows, :, : self.length]


class _Pass:
    """One shape of pass.

    Args:
        record: Runs a function and returns what runs it again.
    """

    logits: torch.Tensor
    """(rows, vocabulary), after each row's last token; until the next run."""
    states: torch.Tensor
    """(layers, keys and values, rows, heads, new tokens, head size), what was written; until the next run."""

    def __init__(
        self,
        model: PreTrainedModel,
        cache: SlotCache,
        rows: int,
        new_tokens: int,
        length: int,
        record: Callable[[Callable[[], None]], Callable[[], None]],
    ) -> None:
        self._model: Any = model
        self._cache, self._new_tokens, self._length = cache, new_tokens, length
        self._given = torch.zeros(rows, new_tokens + 3, dtype=torch.long, device=model.device)
        """Each row's tokens, where they begin, its row in the cache, and which is its last one: one copy to the GPU."""
        self._rows = torch.arange(rows, device=model.device)
        self._run = record(self._forward)

    def __call__(
        self, ids: list[list[int]], begins: Sequence[int], rows: Sequence[int], last: Sequence[int] | None = None
    ) -> None:
        """Run it; `logits` and `states` are what comes of it."""
        last = last or [0] * len(ids)
        given = [[*some, *more] for some, *more in zip(ids, begins, rows, last, strict=True)]
        self._given.copy_(torch.tensor(given))
        self._run()

    def _forward(self) -> None:
        ids, (begins, rows, last) = self._given[:, : self._new_tokens], self._given[:, self._new_tokens :].unbind(1)
        view = _FixedView(rows, begins, self._new_tokens, self._length, self._model.dtype)
        self._cache.view = view
        is_step = self._new_tokens == 1
        output = self._model(
            input_ids=ids,
            position_ids=view.positions,
            attention_mask=view.mask,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1 if is_step else last,
        )
        if is_step:
            self.logits = output.logits[:, -1].float()
        else:
            # For each row the model tells the logits of every row's last place; its own are wanted.
            self.logits = output.logits[self._rows, self._rows].float()
            self.states = self._cache.written(view)


def _recorder(model: PreTrainedModel) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """What records passes of a model: nothing on a CPU, nor where LLM.int8() looks for outliers in each pass."""
    thresholds = (getattr(getattr(module, "state", None), "threshold", 0.0) for module in model.modules())
    if model.device.type != "cuda" or any(thresholds):
        return lambda run: run
    pool = torch.cuda.graph_pool_handle()

    def record(run: Callable[[], None]) -> Callable[[], None]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            run()
        replay: Callable[[], None] = graph.replay
        return replay

    return record


def _lengths(longest: int) -> list[int]:
    lengths = [longest]
    step = BLOCK_TOKENS
    while step < longest:
        lengths.append(step)
        step *= 2
    return sorted(lengths, reverse=True)


def _fitting(passes: dict[int, _Pass], length: int) -> _Pass:
    return passes[min(each for each in passes if each >= length)]
