"""Forward passes of unchanging shapes, recorded once as CUDA graphs and then replayed: for models on a GPU.

Starting the hundreds of kernels of a pass one by one takes longer than running them; a graph starts them at once.
Rows that are not needed are padded, so that a row meets the same kernels, and gets the same bits, in any company.
Passes come in lengths, each twice the one before: how many positions attention runs over.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from app.serving.adapters import Adapters
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

    prompt_tokens = 4 * PIECES * BLOCK_TOKENS
    reads_masked = True

    def __init__(self, model: PreTrainedModel, adapters: Adapters, slots: int, context_tokens: int) -> None:
        self.cache = SlotCache(model, slots + 1, context_tokens)
        self._spare = slots
        lengths = _lengths(rounded_up(context_tokens))
        make = partial(_Pass, model, adapters, self.cache, _recorder(model))
        self._reads = {length: make(PIECES, BLOCK_TOKENS, length) for length in lengths}
        self._steps = {length: make(slots, 1, length) for length in lengths}

    def run(self, pieces: Sequence[Piece]) -> torch.Tensor:
        """As the protocol has it. A prompt's pieces may share a pass: each layer writes all of them, and then each
        attends to those before it."""
        reads = [number for number, piece in enumerate(pieces) if len(piece.ids) > 1]
        steps = [number for number, piece in enumerate(pieces) if len(piece.ids) == 1]
        groups = [reads[begin : begin + PIECES] for begin in range(0, len(reads), PIECES)]
        found = [self._read([pieces[number] for number in group]) for group in groups]
        if steps:
            found.append(self._step([pieces[number] for number in steps]))
        logits_BV = torch.cat(found)
        if reads and steps:
            order = torch.tensor([*reads, *steps], device=logits_BV.device)
            logits_BV = torch.empty_like(logits_BV).index_copy_(0, order, logits_BV)
        return logits_BV

    def _read(self, pieces: Sequence[Piece]) -> torch.Tensor:
        padding = [Piece(self._spare, 0, [0])] * (PIECES - len(pieces))
        fitting = _fitting(self._reads, max(piece.begin for piece in pieces) + BLOCK_TOKENS)
        slots, begins, ids, adapters = zip(*pieces, *padding, strict=True)
        padded = [[*some, *[0] * (BLOCK_TOKENS - len(some))] for some in ids]
        return fitting(padded, begins, slots, [len(some) - 1 for some in ids], adapters)[: len(pieces)].clone()

    def _step(self, pieces: Sequence[Piece]) -> torch.Tensor:
        """Each slot has its row; what is padded is written to the spare one."""
        given = {piece.slot: piece for piece in pieces}
        rows = [given.get(slot, Piece(self._spare, 0, [0])) for slot in range(self._spare)]
        slots, begins, ids, adapters = zip(*rows, strict=True)
        fitting = _fitting(self._steps, max(begins) + 1)
        logits = fitting(ids, begins, slots, [0] * len(ids), adapters)
        wanted = torch.tensor([piece.slot for piece in pieces], device=logits.device)
        return logits[wanted]


class _FixedView(View):
    """Rows and positions that are looked up when the pass runs."""

    def __init__(self, rows: torch.Tensor, begins: torch.Tensor, new_tokens: int, length: int, dtype: torch.dtype):
        self.new_tokens, self.length, self.begin = new_tokens, length, length - new_tokens
        self._rows = rows
        self._read_rows = slice(0, len(rows)) if new_tokens == 1 else rows
        """A step reads each slot's row where it lies."""
        self._place(begins, dtype)


class _Pass:
    """One shape of pass.

    Args:
        record: Runs a function and returns what runs it again.
    """

    _logits: torch.Tensor

    def __init__(
        self,
        model: PreTrainedModel,
        adapters: Adapters,
        cache: SlotCache,
        record: Callable[[Callable[[], None]], Callable[[], None]],
        rows: int,
        new_tokens: int,
        length: int,
    ) -> None:
        self._model: Any = model
        self._adapters = adapters
        self._cache, self._new_tokens, self._length = cache, new_tokens, length
        self._given = torch.zeros(rows, new_tokens + 4, dtype=torch.long, device=model.device)
        """Each row's tokens, where they begin, its row in the cache, which is its last one, and its adapter: one copy
        to the GPU."""
        self._rows = torch.arange(rows, device=model.device)
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self._last_position = (positions or cache.get_max_length()) - 1
        self._run = record(self._forward)

    def __call__(self, ids: Sequence[Sequence[int]], *others: Sequence[int]) -> torch.Tensor:
        """Run it; returns (rows, vocabulary), after each row's last token, good until the next run.

        Args:
            others: Of each row where its tokens begin, its row in the cache, which is its last token, its adapter.
        """
        given = [[*some, *more] for some, *more in zip(ids, *others, strict=True)]
        self._given.copy_(torch.tensor(given))
        self._run()
        return self._logits

    def _forward(self) -> None:
        ids, others = self._given[:, : self._new_tokens], self._given[:, self._new_tokens :]
        begins, rows, last, adapters = others.unbind(1)
        view = _FixedView(rows, begins, self._new_tokens, self._length, self._model.dtype)
        self._cache.view = view
        is_step = self._new_tokens == 1
        with self._adapters.of(adapters.unsqueeze(1)):
            output = self._model(
                input_ids=ids,
                # What is padded may stand where a model with learned positions has none.
                position_ids=view.positions.clamp_max(self._last_position),
                attention_mask=view.mask,
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1 if is_step else last,
            )
        if is_step:
            self._logits = output.logits[:, -1].float()
        else:
            # For each row the model tells the logits of every row's last place; its own are wanted.
            self._logits = output.logits[self._rows, self._rows].float()


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
    """The longest first: what is recorded later fits into the memory that it has taken."""
    lengths = [longest]
    step = BLOCK_TOKENS
    while step < longest:
        lengths.append(step)
        step *= 2
    return sorted(lengths, reverse=True)


def _fitting(passes: dict[int, _Pass], length: int) -> _Pass:
    return passes[min(each for each in passes if each >= length)]
