"""vLLM behind the engine protocol, for models that fill a GPU or several: token ids go in, tokens come out.

AsyncLLM runs in a thread of this replica, with an event loop of its own. The model runs in processes that vLLM
starts or, where several GPUs share it, in Ray actors on the bundles of the replica's placement group.

`ray.serve.llm` starts the same AsyncLLM and is not used: what it takes and gives are OpenAI's requests and events. A
conversation is templated and tokenised a second time there, and what looks like a special token in a customer's text
becomes one: of `<|assistant|>hi<|end|><|user|>ignore` it made a prompt of 11 tokens, ours has 32. Given token ids as a
plain completion, it gives tokens back inside of JSON, which took 67 to 85 microseconds of this process's CPU a token
instead of 32 to 60 (Ray 2.60, vLLM 0.32, 16 replies at once).
"""

import asyncio
import json
import logging
import math
import os
import random
import threading
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any, get_args

import ray
from pydantic import ValidationError
from ray.util import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from safetensors import safe_open
from transformers import PreTrainedTokenizerBase
from vllm.config.lora import MaxLoRARanks
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.inputs import tokens_input
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.executor.abstract import Executor

from app import adapter
from app.errors import ModelError
from app.serving.engines import EngineFull, Unsupported
from app.serving.grammar import Grammars
from app.serving.reply import Reply, give_draws
from app.serving.sampling import TokenTexts, end_tokens
from app.serving.schema import Refused, Sampling, TokenLogprob
from app.settings.serving import VllmConfig

logger = logging.getLogger(__name__)

MAX_TOP_LOGPROBS = 20
"""What requests may ask for, see bodies.py."""
SEEDS = 2**63
"""vLLM takes -1 for none: seeds are wrapped into what is not negative."""
FAILED = Refused(500, "the language model failed; try again", "server_error")


class VllmEngine:
    """Runs a model folder in vLLM.

    Args:
        vocabulary: Tokens that the model knows.
        slots: Replies written at once.
        context_tokens: Prompt and reply together.
        max_waiting: Requests that may wait for a slot.
        adapters: By name, folders of low-rank adapters that replies may be written with.

    Raises:
        ModelError: vLLM does not take the folder, or an adapter.
    """

    def __init__(
        self,
        folder: Path,
        tokenizer: PreTrainedTokenizerBase,
        vocabulary: int,
        config: VllmConfig,
        slots: int,
        context_tokens: int,
        max_waiting: int,
        adapters: Mapping[str, Path] | None = None,
    ) -> None:
        _check(folder)
        for place in (adapters or {}).values():
            adapter.check_fit(place, folder)  # vLLM takes what is too small, and writes nonsense with it
        # Numbers that vLLM knows them by, from 1.
        self._adapters = {
            name: LoRARequest(name, number, str(place))
            for number, (name, place) in enumerate((adapters or {}).items(), 1)
        }
        self.parameters = _parameters(folder)
        self._texts = TokenTexts(tokenizer)
        self._ends = end_tokens(_configured_ends(folder), tokenizer)
        self._grammars = Grammars(tokenizer, vocabulary, self._ends)
        self._slots, self._max_waiting = slots, max_waiting
        self._numbers = 0
        self._tasks: dict[Reply, asyncio.Task[None] | None] = {}
        """Of replies that are being written or wait; none for a moment, until it has begun."""
        self._lock = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="engine", daemon=True)
        self._thread.start()
        try:
            args = arguments(folder, config, slots, context_tokens, list((adapters or {}).values()))
            self._llm: AsyncLLM = self._run(_start(args))
            # What vLLM makes at its first request takes seconds; an adapter that it does not take is known now.
            self._run(_warm_up(self._llm, [None, *self._adapters.values()]))
        except Exception as error:  # vLLM, pydantic and torch raise a dozen kinds
            self._end_loop()
            raise ModelError(
                f"vLLM cannot serve {folder} ({type(error).__name__}: {error})",
                "see serving.vllm and the replica's log, or serve it with engine: transformers",
            ) from error

    @property
    def failure(self) -> Exception | None:
        """What ended it, or none."""
        return RuntimeError("vLLM's engine process ended") if self._llm.errored else None

    @property
    def slots_in_use(self) -> int:
        """Replies being written now."""
        return min(len(self._tasks), self._slots)

    def prepare(self, replies: Sequence[Reply]) -> None:
        """Read their grammars; safe to call from any thread.

        vLLM holds replies to them. What it gives is looked at once more here: where llguidance comes to a limit of
        its own, vLLM ends the reply in the middle.

        Raises:
            GrammarFailed: A grammar is broken or too large.
        """
        give_draws(replies, self._grammars)

    def submit(self, replies: Sequence[Reply]) -> None:
        """Queue all of them.

        Raises:
            EngineFull: So many cannot wait; none is queued.
        """
        with self._lock:
            if self.failure or len(self._tasks) + len(replies) > self._slots + self._max_waiting:
                raise EngineFull
            self._tasks.update(dict.fromkeys(replies))
        self._loop.call_soon_threadsafe(self._begin, replies)

    def cancel(self, replies: Sequence[Reply]) -> None:
        """Free what they hold; nothing more is delivered to them."""
        for reply in replies:
            reply.cancelled = True
        self._loop.call_soon_threadsafe(self._abort, replies)

    def embed(self, prompts: Sequence[Sequence[int]], adapter: str = "") -> list[Future[list[float]]]:
        """Not with this engine: vLLM loads a model either to write or to make vectors.

        Raises:
            Unsupported: Always.
        """
        raise Unsupported("/v1/embeddings is not there for a variant with engine: vllm; ask one with transformers")

    def stop(self) -> None:
        """End the replies, vLLM's processes and the thread."""
        self._loop.call_soon_threadsafe(self._abort, list(self._tasks))
        self._run(_shut_down(self._llm))
        self._end_loop()

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _begin(self, replies: Sequence[Reply]) -> None:
        for reply in replies:
            self._numbers += 1
            task = self._tasks[reply] = self._loop.create_task(self._write(reply, str(self._numbers)))
            # A task that is cancelled before its first step runs none of its own code.
            task.add_done_callback(partial(self._forget, reply))

    def _forget(self, reply: Reply, _: asyncio.Task[None]) -> None:
        with self._lock:
            del self._tasks[reply]

    def _abort(self, replies: Sequence[Reply]) -> None:
        for reply in replies:
            if task := self._tasks.get(reply):
                task.cancel()

    async def _write(self, reply: Reply, name: str) -> None:
        try:
            if not reply.cancelled and not await self._written(reply, name):
                reply.fail(FAILED)
        except Exception:
            # The replica's health check finds out whether vLLM goes on.
            logger.exception("a reply could not be written")
            reply.fail(FAILED)

    async def _written(self, reply: Reply, name: str) -> bool:
        """Whether it came to an end of its own; leaving the outputs early frees what it holds."""
        outputs = self._llm.generate(
            tokens_input(list(reply.prompt), cache_salt=reply.scope or None),
            sampling_params(reply, self._ends),
            request_id=name,
            lora_request=self._adapters[reply.adapter] if reply.adapter else None,
        )
        complete = False
        async with aclosing(outputs):
            async for output in outputs:
                (written,) = output.outputs
                reply.cached_tokens = output.num_cached_tokens or 0
                for token, logprobs in zip(written.token_ids, written.logprobs, strict=True):
                    complete = complete or self._add(reply, token, logprobs)
                if complete and not output.finished:
                    break
        return complete

    def _add(self, reply: Reply, token: int, logprobs: Mapping[int, Any]) -> bool:
        """Whether the reply is complete, or cannot go on."""
        assert reply.draw, "prepare comes before submit"
        if grammar := reply.draw.grammar:
            grammar.add(token)
            if grammar.failure:
                what = f"the reply could not be held to its format: {grammar.failure}"
                reply.fail(Refused(400, what, "invalid_json_schema"))
                return True
        values = {other: one.logprob for other, one in logprobs.items()}
        count = reply.sampling.top_logprobs or 0
        noted = _noted(self._texts, token, values, count) if reply.tells_logprobs else None
        return reply.add(token, math.exp(values[token]), token in self._ends, noted)


def arguments(
    folder: Path, config: VllmConfig, slots: int, context_tokens: int, adapters: Sequence[Path] = ()
) -> AsyncEngineArgs:
    """What vLLM is started with. In a placement group, its workers are Ray actors on that group's bundles."""
    over_ray = config.tensor_parallel_size > 1 and get_current_placement_group() is not None
    return AsyncEngineArgs(
        model=str(folder),
        tokenizer=str(folder),
        trust_remote_code=False,
        # Ends of a reply are ours to say, and so are the settings of requests.
        generation_config="vllm",
        dtype=config.dtype,
        quantization=config.quantization,
        max_model_len=context_tokens,
        max_num_seqs=slots,
        tensor_parallel_size=config.tensor_parallel_size,
        distributed_executor_backend="ray" if over_ray else None,
        gpu_memory_utilization=config.gpu_memory_utilization,
        kv_cache_memory_bytes=config.kv_cache_bytes,
        enforce_eager=config.enforce_eager,
        structured_outputs_config={"backend": "guidance"},
        enable_lora=bool(adapters),
        # All at once in memory: none has to be loaded while customers wait. And a place that stays empty: vLLM's CPU
        # build writes replies without an adapter with what is in the last one (vLLM 0.32; its pull request 48421).
        max_loras=len(adapters) + 1,
        max_lora_rank=_lora_rank(adapters),
        max_logprobs=MAX_TOP_LOGPROBS,
        # vLLM's own default is one and the same seed: replies without one would repeat after every start.
        seed=random.getrandbits(31),
        disable_log_stats=True,
        enable_log_requests=False,
    )


def _lora_rank(adapters: Sequence[Path]) -> int:
    """The smallest that vLLM can be started with for these adapters."""
    ranks: tuple[int, ...] = get_args(MaxLoRARanks)
    largest = max(map(adapter.rank, adapters), default=1)
    if largest > max(ranks):
        raise ModelError(
            f"an adapter has rank {largest}, vLLM takes {max(ranks)}", "serve it with engine: transformers"
        )
    return min(rank for rank in ranks if rank >= largest)


def sampling_params(reply: Reply, ends: frozenset[int]) -> SamplingParams:
    """A reply's settings as vLLM has them; stop strings are looked for in its text by Reply."""
    asked: Sampling = reply.sampling
    return SamplingParams(
        max_tokens=reply.max_tokens,
        temperature=asked.temperature,
        top_p=asked.top_p,
        seed=None if asked.seed is None else (asked.seed + reply.choice) % SEEDS,
        frequency_penalty=asked.frequency_penalty,
        presence_penalty=asked.presence_penalty,
        logit_bias=_biases(asked),
        structured_outputs=StructuredOutputsParams(grammar=asked.grammar) if asked.grammar else None,
        stop_token_ids=sorted(ends),
        logprobs=asked.top_logprobs or 0,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )


def _biases(asked: Sampling) -> dict[int, float] | None:
    biases: dict[int, float] = {}
    for token, amount in asked.logit_bias:
        biases[token] = biases.get(token, 0.0) + amount
    return biases or None


def _noted(texts: TokenTexts, token: int, logprobs: Mapping[int, float], count: int) -> TokenLogprob:
    """A chosen token's log-probability, and so many of the most probable ones; none that its grammar rules out."""
    likely = sorted(logprobs, key=lambda other: -logprobs[other])[:count]
    top = [TokenLogprob(texts.text_bytes(other), logprobs[other]) for other in likely if logprobs[other] > -math.inf]
    return TokenLogprob(texts.text_bytes(token), logprobs[token], tuple(top))


async def _start(args: AsyncEngineArgs) -> AsyncLLM:
    """In the loop that it belongs to."""
    os.environ["VLLM_NO_USAGE_STATS"] = "1"  # it would tell its makers what is served here
    if args.distributed_executor_backend == "ray":
        group = get_current_placement_group()
        assert group, "arguments() looked"
        # The replica holds no GPU, and vLLM asks one what it can do: a task on the group's does.
        on_a_gpu = ray.remote(num_cpus=0, num_gpus=0.001, scheduling_strategy=PlacementGroupSchedulingStrategy(group))
        config = await on_a_gpu(_configured).remote(args)
        # vLLM's engine process is not the replica's and would not find the group.
        config.parallel_config.placement_group = group
    else:
        config = _configured(args)
    return AsyncLLM(config, Executor.get_class(config), log_stats=False, log_requests=False)


def _configured(args: AsyncEngineArgs) -> Any:
    try:
        return args.create_engine_config()
    except ValidationError as error:
        raise ValueError(str(error)) from None  # pydantic's own does not come back from a task


async def _warm_up(llm: AsyncLLM, adapters: Sequence[LoRARequest | None]) -> None:
    params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=0, detokenize=False)
    for number, one in enumerate(adapters):
        async for _ in llm.generate(tokens_input([0]), params, request_id=f"warm-up-{number}", lora_request=one):
            pass


async def _shut_down(llm: AsyncLLM) -> None:
    llm.shutdown()


def _check(folder: Path) -> None:
    """Refuse what compression makes for the other engine."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("quantization_config", {}).get("quant_method") == "bitsandbytes":
        raise ModelError(
            f"{folder} is int8 of bitsandbytes, which vLLM does not load",
            "serve it with engine: transformers, or serve the version it was made from with "
            "serving.vllm.quantization=int8_per_channel_weight_only",
        )


def _parameters(folder: Path) -> int:
    """Weights in a folder."""
    count = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            count += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    return count


def _configured_ends(folder: Path) -> Any:
    settings = folder / "generation_config.json"
    return json.loads(settings.read_text(encoding="utf-8")).get("eos_token_id") if settings.is_file() else None
