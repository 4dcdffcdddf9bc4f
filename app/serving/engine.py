"""Continuous batching: many replies written at once by one model, each joining and leaving at its own time.

Every forward pass adds one token to each running reply; a new request's prompt is read between two passes.
The keys and values of reply i are row i of one cache, see slot_cache.py. Any causal language model that attends
to cached keys and values through `transformers.Cache` works; one that does not is found out and refused when it
is loaded.

Axes: B running replies, T positions, V vocabulary.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from app.errors import ModelError
from app.serving.packed_linear import pack
from app.serving.reply_text import ReplyText
from app.serving.sampling import Draw, TokenTexts, choose
from app.serving.schema import Delta, Event, Finished, Refused, Sampling, TokenLogprob
from app.serving.slot_cache import SlotCache, View

logger = logging.getLogger(__name__)

PROMPT_TOKENS_PER_PASS = 512
"""Prompt tokens read between two passes at most, beyond the first prompt: running replies do not stall."""


@dataclass(eq=False)
class Request:
    """One reply in the making. `deliver` is called from the engine's thread."""

    prompt: Sequence[int]
    sampling: Sampling
    max_tokens: int
    deliver: Callable[[Event], None]
    text: ReplyText
    submitted_s: float = field(default_factory=time.monotonic)
    first_token_s: float = 0.0
    tokens: list[int] = field(default_factory=list)
    probability: float = 0.0
    """Sum over the tokens."""
    cancelled: bool = False
    logprobs: list[tuple[int, TokenLogprob]] = field(default_factory=list)
    """Of tokens whose text is not delivered yet, and where in the reply it begins; bytes."""
    text_bytes: int = 0
    """Of all tokens so far."""
    delivered_bytes: int = 0

    def __post_init__(self) -> None:
        self.draw = Draw(self.sampling)

    @property
    def length(self) -> int:
        """Positions that are in the cache once the last token has been read."""
        return len(self.prompt) + len(self.tokens)


class EngineFull(Exception):
    """As many requests wait as may."""


class Engine:
    """Runs a model in a thread of its own.

    Where another thread that still runs has computed with torch, OpenMP's helpers of the two are more than the cores,
    and then they sleep between operations, which take twice as long. So load the model in a thread that ends.

    Args:
        model: The engine changes it: attention on a CPU, and how weights are laid out there.
        slots: Replies written at once.
        context_tokens: Prompt and reply together.
        max_waiting: Requests that may wait for a slot.

    Raises:
        ModelError: The model does not attend to cached keys and values the way this engine keeps them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        slots: int,
        context_tokens: int,
        max_waiting: int,
    ) -> None:
        self._device = model.device
        pack(model)
        self._model: Any = model
        self._backend: Any = tokenizer.backend_tokenizer
        self._texts = TokenTexts(tokenizer)
        self._ends = _end_tokens(model, tokenizer)
        self._slots, self._max_waiting = slots, max_waiting
        self.context_tokens = context_tokens
        self._cache = SlotCache(model, slots, context_tokens)
        self._running: list[Request] = []
        self._waiting: deque[Request] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self.failure: Exception | None = None
        checked: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(checked,), name="engine", daemon=True)
        self._thread.start()
        checked.result()

    @property
    def slots_in_use(self) -> int:
        """Replies being written now."""
        return len(self._running)

    def submit(
        self, prompt: Sequence[int], sampling: Sampling, max_tokens: int, deliver: Callable[[Event], None]
    ) -> Request:
        """Queue a prompt of at least one token; `deliver` gets Deltas and then one Finished or Refused.

        Raises:
            EngineFull: Too many wait already.
        """
        assert 0 < len(prompt) <= self.context_tokens - max_tokens
        request = Request(prompt, sampling, max_tokens, deliver, ReplyText(self._decode, sampling.stop))
        with self._wake:
            if self.failure:
                raise EngineFull
            if len(self._running) + len(self._waiting) >= self._slots + self._max_waiting:
                raise EngineFull
            self._waiting.append(request)
            self._wake.notify()
        return request

    def cancel(self, request: Request) -> None:
        """Free what the request holds before the next pass; nothing more is delivered to it."""
        request.cancelled = True
        with self._wake:
            self._wake.notify()

    def stop(self) -> None:
        """End the thread after the pass it is in."""
        self._stopping = True
        with self._wake:
            self._wake.notify()
        self._thread.join()

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._backend.decode(ids, skip_special_tokens=True)
        return text

    @torch.inference_mode()
    def _run(self, checked: "Future[None]") -> None:
        try:
            self._check()
        except Exception as error:
            checked.set_exception(error)
            return
        checked.set_result(None)
        try:
            while not self._stopping:
                self._drop_cancelled()
                self._admit()
                if self._running:
                    self._advance(self._pass())
        except Exception as error:
            # The replica's health check reports it and Serve starts another replica.
            logger.exception("the engine ended")
            with self._wake:
                self.failure = error
            for request in [*self._running, *self._waiting]:
                request.deliver(Refused(500, "the language model failed; try again", "server_error"))

    def _drop_cancelled(self) -> None:
        with self._wake:
            self._waiting = deque(request for request in self._waiting if not request.cancelled)
        for slot in reversed(range(len(self._running))):
            if self._running[slot].cancelled:
                self._free(slot)

    def _admit(self) -> None:
        """Read the prompts of waiting requests into free slots; sleep while there is nothing to do."""
        read_tokens = 0
        while True:
            with self._wake:
                while not (self._running or self._waiting or self._stopping):
                    self._wake.wait()
                    self._waiting = deque(request for request in self._waiting if not request.cancelled)
                if not self._waiting or len(self._running) == self._slots or self._stopping:
                    return
                read_tokens += len(self._waiting[0].prompt)
                if self._running and read_tokens > PROMPT_TOKENS_PER_PASS:
                    return
                request = self._waiting.popleft()
                self._running.append(request)
            slot = len(self._running) - 1
            logits_1V = self._forward([request.prompt], self._cache.prompt_view(slot, len(request.prompt)))
            self._advance(logits_1V, first=slot)

    def _pass(self) -> torch.Tensor:
        """One more position for every running reply; returns its logits_BV."""
        last = [[request.tokens[-1]] for request in self._running]
        return self._forward(last, self._cache.step_view([request.length - 1 for request in self._running]))

    def _forward(self, ids: Sequence[Sequence[int]], view: View) -> torch.Tensor:
        self._cache.view = view
        output = self._model(
            input_ids=torch.tensor(ids, device=self._device),
            position_ids=view.positions,
            attention_mask=view.mask,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: torch.Tensor = output.logits[:, -1].float()
        return logits

    def _advance(self, logits_BV: torch.Tensor, first: int = 0) -> None:
        """Choose the next token of the replies from slot `first` on; finished ones leave."""
        requests = self._running[first:]
        tokens, probabilities = choose(logits_BV, [request.draw for request in requests])
        now_s = time.monotonic()
        for slot in reversed(range(first, len(self._running))):
            request = self._running[slot]
            if not request.tokens:
                request.first_token_s = now_s
            request.tokens.append(tokens[slot - first])
            request.draw.add(tokens[slot - first])
            if request.sampling.top_logprobs is not None:
                self._note(request, logits_BV[slot - first])
            request.probability += probabilities[slot - first]
            if self._write(request):
                self._free(slot)

    def _note(self, request: Request, logits_V: torch.Tensor) -> None:
        """Keep what the model thought of the newest token, unless that ends the reply."""
        token = request.tokens[-1]
        if token not in self._ends:
            noted = self._texts.likely(logits_V, token, request.sampling.top_logprobs or 0)
            request.logprobs.append((request.text_bytes, noted))
            request.text_bytes += len(noted.text)

    def _write(self, request: Request) -> bool:
        """Deliver what the newest token adds; returns whether the reply is complete."""
        token = request.tokens[-1]
        ended = token in self._ends
        text = "" if ended else request.text.push(token)
        complete = ended or request.text.stopped or len(request.tokens) >= request.max_tokens
        if complete:
            text += request.text.finish()
        if request.cancelled:
            return True
        if request.sampling.top_logprobs is not None:
            request.delivered_bytes += len(text.encode())
        if text or (complete and request.logprobs):
            # A stop string is not part of the reply, nor are its tokens.
            cut = request.delivered_bytes if request.text.stopped else request.text_bytes
            noted = tuple(logprob for begin, logprob in request.logprobs if begin < cut or not logprob.text)
            request.logprobs = []
            request.deliver(Delta(text, noted))
        if complete:
            request.deliver(
                Finished(
                    finish_reason="stop" if ended or request.text.stopped else "length",
                    completion_tokens=len(request.tokens),
                    confidence=request.probability / len(request.tokens),
                    time_to_first_token_s=request.first_token_s - request.submitted_s,
                )
            )
        return complete

    def _free(self, slot: int) -> None:
        """Take a reply out; the last one moves into its row, so that the rows in use stay the first ones."""
        moved = self._running.pop()
        if slot < len(self._running):
            self._cache.move(len(self._running), slot, moved.length)
            self._running[slot] = moved

    def _check(self) -> None:
        """Two replies of different lengths, batched, must have the logits of plain forward passes."""
        size = self._model.get_input_embeddings().weight.shape[0]
        prompts = [[token % size for token in range(1, length)] for length in (12, 6)][: self._slots]
        expected_BV = torch.cat([self._model(torch.tensor([ids])).logits[:, -1].float() for ids in prompts])
        try:
            for slot, ids in enumerate(prompts):
                self._forward([ids[:-1]], self._cache.prompt_view(slot, len(ids) - 1))
            view = self._cache.step_view([len(ids) - 1 for ids in prompts])
            found_BV = self._forward([ids[-1:] for ids in prompts], view)
        except (TypeError, ValueError, RuntimeError, AttributeError, NotImplementedError) as error:
            raise ModelError(
                f"{type(self._model).__name__} cannot be served ({type(error).__name__}: {error})",
                "use a causal language model with an ordinary key-value cache",
            ) from error
        # Rounding of int8 and bf16 stays far below this; a wrong position or a leak between rows does not.
        difference = float((expected_BV - found_BV).abs().max() / expected_BV.std().clamp_min(1e-6))
        if difference > 0.25:
            raise ModelError(
                f"{type(self._model).__name__} writes something else when it is batched (logits differ by "
                f"{difference:.2f} standard deviations)",
                "use a causal language model with an ordinary key-value cache",
            )


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that end a reply: the tokenizer's and those of the model's generation settings."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    several = configured if isinstance(configured, list) else [configured]
    return frozenset(token for token in (*several, tokenizer.eos_token_id) if token is not None)
