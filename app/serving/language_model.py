"""The language model deployment: one variant's model folder behind the continuous batcher.

Torch and transformers are imported where a replica is made, so that the process that builds the application and
the other deployments start without them.
"""

import asyncio
import sys
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor

from app.serving.schema import (
    Delta,
    Event,
    Finished,
    GenerationRequest,
    Readiness,
    Refused,
    Started,
    TokenLogprob,
)
from app.settings.serving import ServingConfig, VariantConfig
from app.storage import local_folder
from app.telemetry import SLOTS_IN_USE, gauge, set_up_logging
from app.versions import APP

DELTA_INTERVAL_S = 0.03
"""Text of a streamed reply is sent on at most this often after the first token: each message costs a hop through
Ray (about 1 ms of CPU), and nobody reads faster."""


class LanguageModel:
    """Writes replies, several at once.

    Raises:
        ModelError: The folder does not hold a model that can be served safely.
    """

    def __init__(self, config: ServingConfig, variant: VariantConfig) -> None:
        from app import model as models
        from app.serving.engine import Engine

        set_up_logging(deployment="language_model", variant=variant.name)
        # The engine's thread and the event loop share the interpreter; the default 5 ms makes deltas late.
        sys.setswitchinterval(0.001)
        self._config, self._variant = config, variant
        # In a thread that ends: see Engine.
        with local_folder(variant.uri) as folder, ThreadPoolExecutor(1) as loader:
            self._model, self._tokenizer = loader.submit(models.load, folder).result()
        self._engine = Engine(
            self._model,
            self._tokenizer,
            slots=config.max_batch_slots,
            context_tokens=config.context_tokens,
            max_waiting=max(config.max_batch_slots, config.language_model.max_ongoing_requests),
        )
        self._slots_in_use = gauge(SLOTS_IN_USE)

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Event]:
        """Yield Started, Deltas and Finished; or one Refused."""
        from app.serving.engine import EngineFull

        accepted = self._accept(request)
        if isinstance(accepted, Refused):
            yield accepted
            return
        prompt, max_tokens = accepted
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event] = asyncio.Queue()

        def deliver(event: Event) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        try:
            running = self._engine.submit(prompt, request.sampling, max_tokens, deliver)
        except EngineFull:
            yield Refused(429, "too many requests are waiting for the model; try again shortly", "overloaded")
            return
        self._show_slots()
        try:
            yield Started(len(prompt))
            async for event in _merged(events, request.stream):
                yield event
        finally:
            self._engine.cancel(running)
            self._show_slots()

    async def ready(self) -> Readiness:
        """Answers once the model is loaded."""
        return Readiness(
            variant=self._variant.name,
            model_version=f"{self._variant.model}/{self._variant.version}",
            parameters=self._model.num_parameters(),
            slots=self._config.max_batch_slots,
            slots_in_use=self._engine.slots_in_use,
            code=str(APP),
        )

    def check_health(self) -> None:
        """Serve calls this every ten seconds; raising makes it start another replica."""
        self._show_slots()  # Ray forgets a gauge that is not set for 20 s
        if self._engine.failure:
            raise RuntimeError(f"the engine ended: {type(self._engine.failure).__name__}")

    def _show_slots(self) -> None:
        self._slots_in_use.set(self._engine.slots_in_use, {"variant": self._variant.name})

    def _accept(self, request: GenerationRequest) -> tuple[list[int], int] | Refused:
        """The prompt's tokens and how many may follow, if they fit into the context."""
        from app.conversation import Message, normalised, prompt_ids

        # Training reads normalised text, so the model is given what it learned from.
        messages: list[Message] = [
            {"role": message["role"], "content": normalised(message["content"])} for message in request.messages
        ]
        prompt = prompt_ids(self._tokenizer, messages)
        vocabulary = self._model.config.get_text_config().vocab_size
        for token, _ in request.sampling.logit_bias:
            if token >= vocabulary:
                what = f"logit_bias names token {token}, the model has {vocabulary}"
                return Refused(400, what, "invalid_value", "logit_bias")
        context, wanted = self._config.context_tokens, request.sampling.max_tokens
        if len(prompt) + (wanted or 1) > context:
            reply = f" and {wanted} of the reply" if wanted else ""
            return Refused(
                400,
                f"the context holds {context} tokens, but the messages take {len(prompt)}{reply}: "
                "shorten the messages or ask for fewer tokens",
                "context_length_exceeded",
                "max_tokens" if wanted and len(prompt) < context else "messages",
            )
        return prompt, wanted or min(self._config.default_max_tokens, context - len(prompt))


async def _merged(events: "asyncio.Queue[Event]", stream: bool) -> AsyncIterator[Event]:
    """The events, with the deltas of an interval as one; without `stream`, all deltas as one."""
    text, logprobs = "", list[TokenLogprob]()
    last: Event | None = None
    while last is None:
        arrived = [await events.get()]
        while not events.empty():
            arrived.append(events.get_nowait())
        for event in arrived:
            if isinstance(event, Delta):
                text += event.text
                logprobs += event.logprobs
            else:
                last = event
        if (text or logprobs) and (stream or isinstance(last, Finished)):
            yield Delta(text, tuple(logprobs))
            text, logprobs = "", []
        if last is None and stream:
            await asyncio.sleep(DELTA_INTERVAL_S)
    yield last
