"""Requests and tokens a minute for each API key, exact however many replicas there are.

One small deployment keeps the ledger (ledger.py); the gate of every ingress replica asks it once before a request of a
key that has limits, and tells it afterwards what was really spent. Keys without limits never ask.
"""

import asyncio
import contextvars
import logging
import math
import re
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

import orjson
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from app.errors import RequestError
from app.serving.body import Body
from app.serving.keys import StoredKey
from app.serving.ledger import Exceeded, Granted, Ledger, Limits, Reservation, Standing
from app.settings.serving import ServingConfig
from app.telemetry import set_up_logging

logger = logging.getLogger(__name__)

ASK_TIMEOUT_S = 3.0
"""How long a request waits for the ledger before it is told to come again."""
BYTES_PER_TOKEN = 4
"""Of a body, for the estimate; the usual figure for English."""
MAX_CHOICES = 128
GENERATING = frozenset({"/v1/chat/completions", "/v1/completions"})
"""The routes whose replies cost tokens."""
PROMPTS = {"/v1/completions": "prompt", "/v1/embeddings": "input"}
"""The routes that take several, and the field with them."""
READING = GENERATING | PROMPTS.keys()
"""The routes whose bodies cost tokens."""

# Inside of a JSON string the quotes would have backslashes, so only keys are found, at whatever depth.
_MAX_TOKENS = re.compile(rb'"max_(?:completion_)?tokens"\s*:\s*(\d{1,9})')
_CHOICES = re.compile(rb'"(?:n|best_of)"\s*:\s*(\d{1,9})')
# A letter or `_` that is written as an escape, which no encoder does: it could hide the keys above.
_HIDDEN = re.compile(rb"\\u00(?:5[fF]|6|7)")
_visit: contextvars.ContextVar["Visit | None"] = contextvars.ContextVar("visit", default=None)


class RateLimits:
    """The deployment with the ledger. There is one replica of it; when it is started anew it begins with nothing spent.

    Its methods run one after the other, as they never wait.
    """

    def __init__(self) -> None:
        set_up_logging(deployment="limits")
        self._ledger = Ledger(time.monotonic)

    async def reserve(self, account: str, limits: Limits, tokens: int) -> Granted | Exceeded:
        """See `Ledger.reserve`."""
        return self._ledger.reserve(account, limits, tokens)

    async def settle(self, reservation: Reservation, tokens: int) -> None:
        """See `Ledger.settle`."""
        self._ledger.settle(reservation, tokens)


@dataclass
class Visit:
    """One request of a key that has limits."""

    answer: Granted | Exceeded
    asked_tokens: int
    """What it may spend at most, by estimate."""
    spent_tokens: int | None = None
    """What it has really spent; none while that is not known."""

    @property
    def headers(self) -> dict[str, str]:
        """What the client is told of its limits, and when to come again."""
        told: dict[str, str] = {}
        for what, standing in (("requests", self.answer.requests), ("tokens", self.answer.tokens)):
            if standing is not None:
                told |= _headers(what, standing)
        if isinstance(self.answer, Exceeded):
            told["retry-after"] = str(max(1, math.ceil(self.answer.retry_after_s)))
        return told

    @property
    def refusal(self) -> RequestError | None:
        """Why it may not go on; none if it may."""
        if isinstance(self.answer, Granted):
            return None
        standing = self.answer.requests if self.answer.what == "requests" else self.answer.tokens
        assert standing is not None
        what = f"this API key may spend {standing.limit} {self.answer.what} a minute"
        if self.answer.what == "tokens" and self.asked_tokens > standing.limit:
            remedy = f"and this request alone {self.asked_tokens}: make it shorter, or lower max_tokens"
        else:
            remedy = f"and {standing.remaining} are left: try again in {duration(self.answer.retry_after_s)}"
        return RequestError(429, f"{what}, {remedy}", "rate_limit_exceeded")


class Limiter:
    """Asks the ledger for a gate."""

    def __init__(self, config: ServingConfig, ledger: "DeploymentHandle[Any]") -> None:
        # By value, as this goes between two replicas: 1.0 ms a call, where Ray's object store takes 1.8.
        self._config, self._ledger = config, ledger.options(_by_reference=False)
        self._background: set[asyncio.Task[Any]] = set()

    def take(self, config: ServingConfig) -> None:
        """Go on with other limits."""
        self._config = config

    async def admit(self, key: StoredKey, path: str, body: Body) -> Visit | None:
        """A request, with its tokens reserved, or refused; none if the key has no limits.

        A key and the one that takes its place share one account. Where tokens are limited the body is read, but not
        parsed.

        Raises:
            RequestError: 503, the ledger does not answer; those of `Body.read`.
        """
        limits = Limits(
            key.requests_per_minute or self._config.requests_per_minute,
            key.tokens_per_minute or self._config.tokens_per_minute,
        )
        if limits == Limits():
            return None
        tokens = 0
        if limits.tokens_per_minute and path in READING:
            tokens = estimated_tokens(await body.read(), self._config, path)
        try:
            async with asyncio.timeout(ASK_TIMEOUT_S):
                answer = await self._ledger.reserve.remote(key.name, limits, tokens)
        except (TimeoutError, RayError, RayServeException):
            what = "the limits of this API key cannot be looked up at the moment; try again shortly"
            raise RequestError(503, what, "service_unavailable") from None
        return Visit(answer, tokens)

    def leave(self, visit: Visit, status: int) -> None:
        """Settle what was reserved: nothing for what failed here or before a reply was written, what was spent if that
        is known, else as reserved.

        Args:
            status: That was sent; 0, if the client left before.
        """
        if isinstance(visit.answer, Exceeded) or visit.answer.reservation.tokens == 0:
            return
        spent = 0 if status >= 500 or (status >= 400 and visit.spent_tokens is None) else visit.spent_tokens
        if spent is not None and spent != visit.answer.reservation.tokens:
            self._in_background(self._settle(visit.answer.reservation, spent))

    async def _settle(self, reservation: Reservation, tokens: int) -> None:
        try:
            async with asyncio.timeout(ASK_TIMEOUT_S):
                await self._ledger.settle.remote(reservation, tokens)
        except (TimeoutError, RayError, RayServeException) as error:
            logger.warning("tokens were not settled: %s", type(error).__name__)

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        # An empty context: Serve cancels the calls that a cancelled request made, which it knows by the context.
        task = asyncio.get_running_loop().create_task(work, context=contextvars.Context())
        self._background.add(task)
        task.add_done_callback(self._background.discard)


def visiting(visit: Visit | None) -> None:
    """Let `spend` know, from here on, for which request it is."""
    _visit.set(visit)


def spend(tokens: int) -> None:
    """Say how many more tokens, of prompt and reply, the request under way has really spent."""
    if (visit := _visit.get()) is not None:
        visit.spent_tokens = (visit.spent_tokens or 0) + tokens


def estimated_tokens(body: bytes, config: ServingConfig, path: str) -> int:
    """What a request may spend at most, as far as its bytes tell: those of its body, and the replies it asks for.

    No reply is longer than the context. Where keys are hidden in escapes it counts as one that long. What was said
    before in a conversation that is remembered is not known here; it is settled afterwards.
    """
    prompts, numbers = _given(body, PROMPTS[path]) if path in PROMPTS else (1, 0)
    prompt = max(numbers, math.ceil(len(body) / BYTES_PER_TOKEN))
    if path not in GENERATING:
        return prompt
    if path not in PROMPTS:
        prompt += math.ceil(len(config.system_prompt) / BYTES_PER_TOKEN)
    asked = max(map(int, _MAX_TOKENS.findall(body)), default=config.default_max_tokens)
    reply = config.context_tokens if _HIDDEN.search(body) else min(asked, config.context_tokens)
    choices = max(map(int, _CHOICES.findall(body)), default=config.max_choices if _HIDDEN.search(body) else 1)
    return prompt + min(prompts, config.max_prompts) * min(max(choices, 1), MAX_CHOICES) * reply


def _given(body: bytes, name: str) -> tuple[int, int]:
    """How many prompts a body has, and how many tokens of them are given as numbers; what is wrong is refused later."""
    try:
        given = orjson.loads(body)[name]
    except (ValueError, KeyError, TypeError):
        return 1, 0
    if not isinstance(given, list) or not given:
        return 1, 0
    if isinstance(given[0], str | list):
        return len(given), sum(len(one) for one in given if isinstance(one, list))
    return 1, len(given)


def duration(seconds: float) -> str:
    """A time as OpenAI writes it, rounded up to milliseconds: 20ms, 1s, 6m0s."""
    milliseconds = math.ceil(max(0.0, seconds) * 1000)
    if 0 < milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, milliseconds = divmod(milliseconds, 60_000)
    return f"{minutes}m{milliseconds / 1000:g}s" if minutes else f"{milliseconds / 1000:g}s"


def _headers(what: str, standing: Standing) -> dict[str, str]:
    return {
        f"x-ratelimit-limit-{what}": str(standing.limit),
        f"x-ratelimit-remaining-{what}": str(standing.remaining),
        f"x-ratelimit-reset-{what}": duration(standing.reset_s),
    }
