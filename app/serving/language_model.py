"""The language model deployment: one variant's model folder behind an engine.

Torch and transformers are imported where a replica is made, so that the process that builds the application and
the other deployments start without them.
"""

import asyncio
import contextlib
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from app.errors import ModelError
from app.serving.autoscaling import LATENCY, LOOK_BACK_S
from app.serving.engines import Engine, EngineFull, Unsupported
from app.serving.output_format import GrammarFailed
from app.serving.schema import (
    Delta,
    Embedded,
    Event,
    Finished,
    GenerationRequest,
    Prompt,
    Readiness,
    Refused,
    Started,
    Tokens,
    characters,
)
from app.settings.serving import ServingConfig, VariantConfig
from app.storage import local_folder
from app.telemetry import SLOTS_IN_USE, gauge, set_up_logging
from app.versions import APP

if TYPE_CHECKING:
    from app.serving.prompts import Prompts
    from app.serving.vllm_engine import VllmEngine

THREAD_CHARS = 20_000
"""Longer prompts are read in a thread of their own: health checks do not wait for them."""
DELTA_INTERVAL_S = 0.03
"""Text of a streamed reply is sent on at most this often after the first token: each message costs two hops through
Ray (some ms of CPU), and nobody reads faster."""
DELTA_INTERVAL_PER_REPLY_S, MAX_DELTA_INTERVAL_S = 0.005, 0.12
"""And so much less often for each reply that is written at the same time: sixteen get text nine times a second."""


class LanguageModel:
    """Writes replies, several at once.

    Raises:
        ModelError: The folder does not hold a model that can be served safely.
    """

    def __init__(self, config: ServingConfig, variant: VariantConfig) -> None:
        set_up_logging(deployment="language_model", variant=variant.name)
        # The engine's thread and the event loop share the interpreter; the default 5 ms makes deltas late.
        sys.setswitchinterval(0.001)
        self._config, self._variant = config, variant
        self._variants = {"": variant, **{each.name: each for each in config.adapters(variant)}}
        """By what a request asks for."""
        self._engine, self._prompts = _load(config, variant)
        self._slots_in_use = gauge(SLOTS_IN_USE)
        self._waits: deque[tuple[float, float]] = deque(maxlen=256)
        """When a reply was complete, and its time to first token."""

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Event]:
        """Yield Started, Deltas, and a Finished a choice; or one Refused."""
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event] = asyncio.Queue()
        ended = asyncio.Event()

        def deliver(event: Event) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)
            if not isinstance(event, Delta):
                loop.call_soon_threadsafe(ended.set)

        variant = self._variants.get(request.adapter)
        if variant is None:
            yield _absent(request.adapter)
            return
        most = self._config.max_batch_slots + _max_waiting(self._config, self._variant)
        if request.choices > most:
            what = f"{len(request.prompts)} prompts with n={request.n} are {request.choices} replies: at most {most}"
            yield Refused(400, what, "invalid_value", "n" if request.n > 1 else "prompt")
            return
        try:
            if request.characters > THREAD_CHARS:
                prompts = await asyncio.to_thread(self._prompts.accepted, request)
            else:
                prompts = self._prompts.accepted(request)
        except ModelError as error:  # a chat template that does not take such turns
            yield Refused(400, str(error), "invalid_value", "messages")
            return
        if isinstance(prompts, Refused):
            yield prompts
            return
        replies = self._prompts.replies(request, prompts.ids, deliver)
        try:
            if request.sampling.grammar:
                await asyncio.to_thread(self._engine.prepare, replies)
            else:
                self._engine.prepare(replies)
            self._engine.submit(replies)
        except (GrammarFailed, ModelError) as error:
            yield Refused(400, f"the reply cannot be held to its format: {error}", "invalid_json_schema")
            return
        except EngineFull:
            yield Refused(429, "too many requests are waiting for the model; try again shortly", "overloaded")
            return
        self._show_slots()
        try:
            begun = Started(sum(len(ids) for ids in prompts.ids), prompts.dropped_messages, variant)
            yield begun
            for reply in replies if request.echo else ():
                yield Delta(self._prompts.text(reply.prompt), choice=reply.choice)
            async for event in _merged(events, ended, request.stream, request.choices, self._delta_interval_s):
                if isinstance(event, Finished):
                    self._waits.append((time.monotonic(), event.time_to_first_token_s))
                yield event
        finally:
            self._engine.cancel(replies)
            self._show_slots()

    def _delta_interval_s(self) -> float:
        return min(DELTA_INTERVAL_S + DELTA_INTERVAL_PER_REPLY_S * self._engine.slots_in_use, MAX_DELTA_INTERVAL_S)

    async def embed(self, inputs: tuple[Prompt, ...], adapter: str = "") -> Embedded | Refused:
        """One vector for each of the texts or token lists."""
        variant = self._variants.get(adapter)
        if variant is None:
            return _absent(adapter)
        is_long = sum(map(characters, inputs)) > THREAD_CHARS
        read = await asyncio.to_thread(self._read, inputs) if is_long else self._read(inputs)
        if isinstance(read, Refused):
            return read
        try:
            vectors = await asyncio.gather(*map(asyncio.wrap_future, self._engine.embed(read, adapter)))
        except EngineFull:
            return Refused(503, "the language model is being restarted; try again shortly", "service_unavailable")
        except Unsupported as error:
            return Refused(400, str(error), "unsupported")
        except ModelError as error:
            return Refused(500, str(error), "server_error")
        prompt_tokens = sum(map(len, read))
        return Embedded(tuple(tuple(vector) for vector in vectors), prompt_tokens, variant)

    def _read(self, inputs: Sequence[Prompt]) -> list[list[int]] | Refused:
        prompts = []
        for one in inputs:
            if isinstance(ids := self._prompts.read(one, "input"), Refused):
                return ids
            prompts.append(ids)
        return prompts

    async def tokenize(self, prompt: Prompt, tools: tuple[str, ...]) -> Tokens | Refused:
        """A text's or conversation's tokens."""
        try:
            return await asyncio.to_thread(self._tokens, prompt, tools)
        except ModelError as error:
            return Refused(400, str(error), "invalid_value", "messages")

    def _tokens(self, prompt: Prompt, tools: tuple[str, ...]) -> Tokens:
        ids = self._prompts.token_ids(prompt, tools)
        texts = (self._prompts.text([token], special=True) for token in ids)
        return Tokens(tuple(ids), tuple(texts), self._config.context_tokens)

    async def detokenize(self, tokens: tuple[int, ...]) -> str | Refused:
        """Tokens as text, special ones spelled out."""
        return self._prompts.check(tokens, "tokens") or self._prompts.text(tokens, special=True)

    async def ready(self) -> Readiness:
        """Answers once the model is loaded."""
        return Readiness(
            variant=self._variant.name,
            model_version=f"{self._variant.model}/{self._variant.version}",
            parameters=self._engine.parameters,
            slots=self._config.max_batch_slots,
            slots_in_use=self._engine.slots_in_use,
            code=str(APP),
            adapted={each.name: f"{each.model}/{each.version}" for name, each in self._variants.items() if name},
        )

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve: mean time to first token of the replies that were completed lately."""
        recent = [wait_s for when_s, wait_s in self._waits if when_s > time.monotonic() - LOOK_BACK_S]
        return {LATENCY: sum(recent) / len(recent) if recent else 0.0}

    def check_health(self) -> None:
        """Serve calls this every few seconds; raising makes it start another replica."""
        self._show_slots()  # Ray forgets a gauge that is not set for 20 s
        if self._engine.failure:
            raise RuntimeError(f"the engine ended: {type(self._engine.failure).__name__}")

    def _show_slots(self) -> None:
        self._slots_in_use.set(self._engine.slots_in_use, {"variant": self._variant.name})


def _absent(adapter: str) -> Refused:
    """Input handling knows a variant that this replica does not have yet, or not any more."""
    return Refused(503, f"variant {adapter} is not there while versions change; try again shortly", "not_ready")


def _max_waiting(config: ServingConfig, variant: VariantConfig) -> int:
    return max(config.max_batch_slots, config.size(variant).max_ongoing_requests)


def _load(config: ServingConfig, variant: VariantConfig) -> "tuple[Engine, Prompts]":
    """The variant's engine, and what comes before and after it.

    Raises:
        ModelError: The engine cannot serve the folder or an adapter, or is not installed.
    """
    from app import adapter
    from app import model as models
    from app.serving.prompts import Prompts

    limits: dict[str, Any] = {
        "slots": config.max_batch_slots,
        "context_tokens": config.context_tokens,
        "max_waiting": _max_waiting(config, variant),
    }
    engine: Engine
    with contextlib.ExitStack() as folders:
        folder = folders.enter_context(local_folder(variant.uri))
        adapters = {
            each.name: folders.enter_context(local_folder(adapter.located(each.uri)))
            for each in config.adapters(variant)
        }
        if variant.engine == "vllm":
            make = _vllm_engine(variant)
            tokenizer, vocabulary = models.load_tokenizer(folder), models.vocabulary(folder)
            engine = make(folder, tokenizer, vocabulary, config.vllm, adapters=adapters, **limits)
        else:
            from app.serving.adapters import Adapters
            from app.serving.engine import Engine as TransformersEngine

            device = _device(config, variant)
            with ThreadPoolExecutor(1) as loader:  # a thread that ends: see the engine
                model, tokenizer = loader.submit(models.load, folder, device_map={"": device}).result()
                beside = loader.submit(Adapters, model, adapters).result()
            vocabulary = model.config.get_text_config().vocab_size
            engine = TransformersEngine(
                model, tokenizer, prefix_cache_bytes=config.prefix_cache_bytes, adapters=beside, **limits
            )
    return engine, Prompts(tokenizer, vocabulary, config.context_tokens, config.default_max_tokens)


def _device(config: ServingConfig, variant: VariantConfig) -> str:
    """Where transformers runs the variant: the GPU that Ray gave this replica, or a CPU.

    Raises:
        ModelError: It reserves a GPU that torch does not see.
    """
    if not config.size(variant).gpus:
        return "cpu"
    import torch

    if not torch.cuda.is_available():
        raise ModelError(
            f"variant {variant.name} reserves a GPU, and torch sees none where its replica starts",
            "install torch for the node's CUDA, or set language_model.gpus=0",
        )
    return "cuda:0"


def _vllm_engine(variant: VariantConfig) -> "type[VllmEngine]":
    try:
        from app.serving.vllm_engine import VllmEngine
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "vllm":
            raise
        raise ModelError(
            f"variant {variant.name} has engine: vllm, and vLLM is not installed where its replica starts",
            "pip install 'rayloop[vllm]'",
        ) from error
    return VllmEngine


async def _merged(
    events: "asyncio.Queue[Event]",
    ended: asyncio.Event,
    stream: bool,
    choices: int,
    interval_s: Callable[[], float],
) -> AsyncIterator[Event]:
    """The events, with the deltas of an interval as one a choice; without `stream`, all of a choice's as one.

    Args:
        ended: Set at the end of a choice, which is told at once.
    """
    deltas: dict[int, list[Delta]] = {}
    going_on = choices
    while going_on:
        arrived = [await events.get()]
        while not events.empty():
            arrived.append(events.get_nowait())
        for event in arrived:
            if isinstance(event, Delta):
                deltas.setdefault(event.choice, []).append(event)
            elif isinstance(event, Finished):
                if event.choice in deltas:
                    yield _joined(deltas.pop(event.choice))
                yield event
                going_on -= 1
            else:
                yield event
                return
        if stream and going_on:
            for some in deltas.values():
                yield _joined(some)
            deltas.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(interval_s()):
                    await ended.wait()
            ended.clear()


def _joined(deltas: list[Delta]) -> Delta:
    text = "".join(delta.text for delta in deltas)
    logprobs = tuple(logprob for delta in deltas for logprob in delta.logprobs)
    return Delta(text, logprobs, deltas[0].choice, sum(delta.tokens for delta in deltas))
