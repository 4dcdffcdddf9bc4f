"""Continuous batching: many replies written at once by one model, each joining and leaving at its own time.

Every pass adds one token to each reply that is being written and reads more of the prompts of others, see passes.py.
The keys and values of reply i are row i of one cache, see slot_cache.py. Any causal language model that attends
to cached keys and values through `transformers.Cache` works; one that does not is found out and refused when it
is loaded.

Axes: B running replies, T positions, V vocabulary.
"""

import logging
import math
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from app.errors import ModelError
from app.serving.adapters import Adapters
from app.serving.engines import EngineFull
from app.serving.fixed_passes import FixedPasses
from app.serving.flat_passes import FlatPasses
from app.serving.grammar import Grammars
from app.serving.passes import FittingPasses, Passes, Piece
from app.serving.prefix_cache import BLOCK_TOKENS, PrefixCache, block_keys
from app.serving.reply import Reply, give_draws
from app.serving.sampling import Draw, TokenTexts, choose, end_tokens
from app.serving.schema import Refused

logger = logging.getLogger(__name__)
Kind = Callable[[PreTrainedModel, Adapters, int, int], Passes]
Planned = tuple[Piece, bytes | None]
"""Of the coming pass, and what it is known by where it is a block: where not, a token is chosen after it."""


class Engine:
    """Runs a model in a thread of its own.

    Where another thread that still runs has computed with torch, OpenMP's helpers of the two are more than the cores,
    and then they sleep between operations, which take twice as long. So load the model in a thread that ends.

    Args:
        model: On a CPU or a GPU. The engine changes it: attention, and on a CPU how weights are laid out.
        slots: Replies written at once.
        context_tokens: Prompt and reply together.
        max_waiting: Replies that may wait for a slot.
        prefix_cache_bytes: Of keys and values that are kept of prompts' beginnings, where the model is.
        passes: None: those that the model takes.
        adapters: That replies may be written with.

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
        prefix_cache_bytes: int = 0,
        passes: Kind | None = None,
        adapters: Adapters | None = None,
    ) -> None:
        _check_attention(model, context_tokens)
        self._kinds = [passes] if passes else _kinds(model)
        self._passes: Passes
        self._adapters = adapters or Adapters(model, {})
        self._model: Any = model
        self._texts = TokenTexts(tokenizer)
        self._ends = end_tokens(getattr(model.generation_config, "eos_token_id", None), tokenizer)
        self._grammars = Grammars(tokenizer, model.config.get_text_config().vocab_size, self._ends)
        self._slots, self._max_waiting = slots, max_waiting
        self.context_tokens = context_tokens
        self._prefixes = PrefixCache(prefix_cache_bytes)
        self._admitted = 0
        """Replies, since the start."""
        self._running: list[_Running] = []
        """By slot."""
        self._waiting: deque[Reply] = deque()
        self._tasks: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        """To be done in the engine's thread between two passes."""
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

    @property
    def parameters(self) -> int:
        """Weights of the model."""
        return int(self._model.num_parameters())

    def prepare(self, replies: Sequence[Reply]) -> None:
        """Read their grammars; safe to call from any thread.

        Raises:
            GrammarFailed: A grammar is broken or too large.
        """
        give_draws(replies, self._grammars)

    def submit(self, replies: Sequence[Reply]) -> None:
        """Queue all of them.

        Raises:
            EngineFull: So many cannot wait; none is queued.
        """
        assert all(0 < len(reply.prompt) <= self.context_tokens - reply.max_tokens for reply in replies)
        with self._wake:
            if self.failure:
                raise EngineFull
            if len(self._running) + len(self._waiting) + len(replies) > self._slots + self._max_waiting:
                raise EngineFull
            self._waiting.extend(replies)
            self._wake.notify()

    def cancel(self, replies: Sequence[Reply]) -> None:
        """Free what they hold before the next pass; nothing more is delivered to them."""
        for reply in replies:
            reply.cancelled = True
        with self._wake:
            self._wake.notify()

    def embed(self, prompts: Sequence[Sequence[int]], adapter: str = "") -> list[Future[list[float]]]:
        """Of each prompt, the mean of its tokens' last hidden states, of length 1; each computed between two passes.

        Raises:
            EngineFull: The engine has ended.
        """
        vectors: list[Future[list[float]]] = [Future() for _ in prompts]
        with self._wake:
            if self.failure or self._stopping:
                raise EngineFull
            self._tasks += [
                (partial(self._embedded, ids, adapter), done) for ids, done in zip(prompts, vectors, strict=True)
            ]
            self._wake.notify()
        return vectors

    def _embedded(self, ids: Sequence[int], adapter: str) -> list[float]:
        body = self._model.base_model
        with self._adapters.of(torch.tensor([[self._adapters.number(adapter)]], device=self._model.device)):
            hidden_1TH = body(torch.tensor([ids], device=self._model.device), use_cache=False).last_hidden_state
        mean_H = hidden_1TH[0].float().mean(dim=0)
        if not mean_H.isfinite().all():
            raise _no_numbers()
        vector: list[float] = torch.nn.functional.normalize(mean_H, dim=0).tolist()
        return vector

    def _do_task(self) -> None:
        """One of them: replies do not wait for all."""
        while self._tasks:
            task, done = self._tasks.popleft()
            if not done.set_running_or_notify_cancel():
                continue  # nobody waits for it any more
            try:
                done.set_result(task())
            except Exception as error:
                done.set_exception(error)
            return

    def _drop_tasks(self) -> None:
        with self._wake:
            while self._tasks:
                done = self._tasks.popleft()[1]
                if done.set_running_or_notify_cancel():
                    done.set_exception(EngineFull())

    def stop(self) -> None:
        """End the thread after the pass it is in."""
        self._stopping = True
        with self._wake:
            self._wake.notify()
        self._thread.join()
        self._drop_tasks()

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
                self._do_task()
                self._admit()
                if self._running:
                    self._pass()
        except Exception as error:
            # The replica's health check reports it and Serve starts another replica.
            logger.exception("the engine ended")
            with self._wake:
                self.failure = error
            for reply in [*(one.reply for one in self._running), *self._waiting]:
                reply.fail(Refused(500, "the language model failed; try again", "server_error"))
            self._drop_tasks()

    def _drop_cancelled(self) -> None:
        with self._wake:
            self._waiting = deque(reply for reply in self._waiting if not reply.cancelled)
        for slot in reversed(range(len(self._running))):
            if self._running[slot].reply.cancelled:
                self._free(slot)

    def _admit(self) -> None:
        """Give free slots to waiting replies; sleep while there is nothing to do."""
        with self._wake:
            while not (self._running or self._waiting or self._tasks or self._stopping):
                self._wake.wait()
                self._waiting = deque(reply for reply in self._waiting if not reply.cancelled)
            while self._waiting and len(self._running) < self._slots:
                self._admitted += 1
                reply = self._waiting.popleft()
                self._running.append(_Running(reply, self._admitted, self._adapters.number(reply.adapter)))

    def _pass(self) -> None:
        """One more token for each reply that is being written, and more of the prompts of those that are not yet."""
        planned: list[Planned] = [one.newest(slot) for slot, one in enumerate(self._running) if one.is_read]
        left, known = self._passes.prompt_tokens, set[bytes]()
        # Who came first is read first: slots change hands.
        for slot, one in sorted(enumerate(self._running), key=lambda its: its[1].number):
            if not one.is_read:
                pieces = self._prompt_pieces(slot, one, known, left)
                left -= sum(len(piece.ids) for piece, _ in pieces)
                planned += pieces
        logits_BV = self._passes.run([piece for piece, _ in planned])
        ends = []
        for number, (piece, known_by) in enumerate(planned):
            if known_by is not None:
                self._keep(known_by, piece)
            else:
                ends.append((piece.slot, number))
        if ends:
            # By slot: whoever is drawn for first, last or in the middle draws from a generator of its own.
            slots, numbers = zip(*sorted(ends), strict=True)
            self._advance(slots, logits_BV[list(numbers)])

    def _keep(self, known_by: bytes, piece: Piece) -> None:
        if self._prefixes.max_bytes:
            self._prefixes.put(known_by, self._passes.cache.block(piece.slot, piece.begin, BLOCK_TOKENS))

    def _prompt_pieces(self, slot: int, one: "_Running", known: set[bytes], tokens: int) -> list[Planned]:
        """What is read of a prompt in the coming pass, with what blocks are known by; what was read earlier is copied.

        Args:
            known: Blocks that the coming pass reads. Another prompt that wants one waits for it, if it will be kept.
            tokens: That may be read at most.
        """
        pieces: list[Planned] = []
        prompt = one.reply.prompt
        while not one.is_read:
            number = one.read_tokens // BLOCK_TOKENS
            known_by = one.keys[number] if number < len(one.keys) else None
            block = self._prefixes.get(known_by) if known_by else None
            if block is not None:
                self._passes.cache.put_block(slot, one.read_tokens, block)
                one.reply.cached_tokens += BLOCK_TOKENS
                one.read_tokens += BLOCK_TOKENS
                continue
            ids = prompt[one.read_tokens : one.read_tokens + BLOCK_TOKENS]
            tokens -= len(ids)
            if tokens < 0 or (known_by in known and self._prefixes.max_bytes):
                break
            pieces.append((Piece(slot, one.read_tokens, ids, one.adapter), known_by))
            one.read_tokens += len(ids)
        known.update(known_by for _, known_by in pieces if known_by)
        return pieces

    def _advance(self, slots: Sequence[int], logits_BV: torch.Tensor) -> None:
        """Choose the next token of the replies in these slots, which ascend; finished ones leave."""
        replies = [self._running[slot].reply for slot in slots]
        draws = [reply.draw for reply in replies if reply.draw]
        assert len(draws) == len(replies), "prepare comes before submit"
        tokens, probabilities = choose(logits_BV, draws)
        for row in reversed(range(len(replies))):
            if self._add(replies[row], draws[row], tokens[row], probabilities[row], logits_BV[row]):
                self._free(slots[row])

    def _add(self, reply: Reply, draw: Draw, token: int, probability: float, logits_V: torch.Tensor) -> bool:
        """Whether the reply is complete, or cannot go on."""
        if math.isnan(probability) and not (draw.grammar and draw.grammar.failure):
            reply.fail(Refused(500, str(_no_numbers()), "server_error"))
            return True
        draw.add(token)
        if draw.grammar and (failure := draw.grammar.failure):
            reply.fail(Refused(400, f"the reply could not be held to its format: {failure}", "invalid_json_schema"))
            return True
        noted = self._texts.likely(logits_V, token, reply.sampling.top_logprobs or 0) if reply.tells_logprobs else None
        return reply.add(token, probability, token in self._ends, noted)

    def _free(self, slot: int) -> None:
        """Take a reply out; the last one moves into its row, so that the rows in use stay the first ones."""
        cache, left = self._passes.cache, self._running[slot]
        moved = self._running.pop()
        if self._passes.reads_masked:
            cache.clear(slot, left.reply.length)
        if slot < len(self._running):
            cache.move(len(self._running), slot, moved.reply.length)
            self._running[slot] = moved
            if self._passes.reads_masked:
                cache.clear(len(self._running), moved.reply.length)

    def _check(self) -> None:
        """Make the passes: the first kind that computes what the model does."""
        *others, last = self._kinds
        for kind in others:
            try:
                return self._try(kind)
            except ModelError as error:
                logger.info("another kind of passes is tried: %s", error)
        return self._try(last)

    def _try(self, kind: Kind) -> None:
        """Make passes of a kind. Two replies of different lengths must have the logits of plain forward passes."""
        size = self._model.get_input_embeddings().weight.shape[0]
        prompts = [[token % size for token in range(1, length)] for length in (12, 6)][: self._slots]
        # One as the base writes it, one with an adapter where there is one.
        adapters = [0, self._adapters.last]
        try:
            expected_BV = torch.cat(
                [self._plain(ids, adapter) for ids, adapter in zip(prompts, adapters, strict=False)]
            )
            self._passes = kind(self._model, self._adapters, self._slots, self.context_tokens)
            for slot, ids in enumerate(prompts):
                self._passes.run([Piece(slot, 0, ids[:-1], adapters[slot])])
            last = [Piece(slot, len(ids) - 1, ids[-1:], adapters[slot]) for slot, ids in enumerate(prompts)]
            found_BV = self._passes.run(last)
        except (TypeError, ValueError, RuntimeError, AttributeError, NotImplementedError) as error:
            raise ModelError(
                f"{type(self._model).__name__} cannot be served ({type(error).__name__}: {error})",
                "use a causal language model with an ordinary key-value cache",
            ) from error
        # Rounding of int8 and bf16 stays far below this; a wrong position or a leak between rows does not.
        difference = float((expected_BV - found_BV).abs().max() / expected_BV.std().clamp_min(1e-6))
        if not difference <= 0.25:  # also where it is no number
            raise ModelError(
                f"{type(self._model).__name__} writes something else when it is batched (logits differ by "
                f"{difference:.2f} standard deviations)",
                "use a causal language model with an ordinary key-value cache",
            )

    def _plain(self, ids: Sequence[int], adapter: int) -> torch.Tensor:
        """(1, V) after the last token, by the model's own forward pass."""
        with self._adapters.of(torch.tensor([[adapter]], device=self._model.device)):
            logits: torch.Tensor = self._model(torch.tensor([ids], device=self._model.device)).logits[:, -1].float()
        return logits


@dataclass
class _Running:
    """A reply in a slot."""

    reply: Reply
    number: int
    """In the order in which slots were given."""
    adapter: int
    read_tokens: int = 0
    """Of its prompt, that are in the cache."""

    def __post_init__(self) -> None:
        self.keys = block_keys(f"{self.reply.adapter}\0{self.reply.scope}", self.reply.prompt)

    @property
    def is_read(self) -> bool:
        return self.read_tokens == len(self.reply.prompt)

    def newest(self, slot: int) -> Planned:
        """Its last token, which is not in the cache yet."""
        return Piece(slot, self.reply.length - 1, self.reply.tokens[-1:], self.adapter), None


def _no_numbers() -> ModelError:
    """Where a token's weights are damaged, only texts that have it are to suffer."""
    return ModelError(
        "the language model computes what is no number for this text", "ask with another text, or another version"
    )


def _kinds(model: PreTrainedModel) -> list[Kind]:
    """Kinds of passes to try, the best first."""
    if model.device.type == "cuda":
        return [FixedPasses]
    return [FlatPasses, FittingPasses] if FlatPasses.takes(model) else [FittingPasses]


def _check_attention(model: PreTrainedModel, context_tokens: int) -> None:
    """Refuse what this engine does not do, and the short texts of `_check` would not show."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    softcap = getattr(config, "attn_logit_softcapping", None)
    longest = getattr(config, "max_position_embeddings", None)
    if (window and window < context_tokens) or softcap:
        what = f"a sliding window of {window} positions" if window else f"attention scores capped at {softcap}"
        raise ModelError(
            f"{type(model).__name__} has {what}, which this engine does not apply",
            "serve it with engine: vllm, or with serving.context_tokens within the window",
        )
    if longest and longest < context_tokens:
        raise ModelError(
            f"{type(model).__name__} knows {longest} positions, serving.context_tokens is {context_tokens}",
            f"set serving.context_tokens={longest} at most",
        )
