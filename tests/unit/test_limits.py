"""What a gate makes of limits: estimates, headers, refusals, and what is settled in the end."""

import asyncio
import datetime
import json
import re
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import DeploymentUnavailableError

from app.errors import RequestError
from app.serving import keys, limits
from app.serving.body import Body
from app.serving.keys import StoredKey
from app.serving.ledger import Exceeded, Granted, Limits
from app.serving.limits import Limiter, RateLimits, Visit, duration, estimated_tokens
from app.settings.serving import ServingConfig

AT = datetime.datetime(2026, 11, 26, tzinfo=datetime.UTC)
CHAT, EMBEDDINGS = "/v1/chat/completions", "/v1/embeddings"


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        (0, "0s"), (-1, "0s"), (0.02, "20ms"), (0.0001, "1ms"), (0.9991, "1s"), (1, "1s"), (8.64, "8.64s"),
        (59.9999, "1m0s"), (60, "1m0s"), (360, "6m0s"), (90.5, "1m30.5s"),
    ],
)  # fmt: skip
def test_times_are_written_as_openai_does(seconds: float, told: str) -> None:
    assert duration(seconds) == told


@pytest.mark.parametrize(
    ("fields", "reply"),
    [
        ({}, 96), ({"max_tokens": 10}, 10), ({"max_completion_tokens": 20}, 20), ({"max_tokens": 10**8}, 512),
        ({"max_tokens": 5, "n": 3}, 15), ({"n": 10**8}, 128 * 96), ({"n": 0}, 96),
        ({"messages": [{"role": "user", "content": '"max_tokens": 400'}]}, 96),
        ({"max_tokens": 10, "metadata": {"max_tokens": 1}}, 10),
    ],
)  # fmt: skip
def test_an_estimate_is_the_body_and_the_longest_reply_that_it_asks_for(fields: dict[str, Any], reply: int) -> None:
    for body in (json.dumps(fields), json.dumps(fields, indent=2), json.dumps(fields, separators=(",", ":"))):
        tokens = estimated_tokens(body.encode(), ServingConfig(), CHAT)
        assert tokens == -(-len(body) // 4) + reply
        assert estimated_tokens(body.encode(), ServingConfig(), EMBEDDINGS) == -(-len(body) // 4)


@pytest.mark.parametrize(
    ("prompt", "prompts", "numbers"),
    [
        ("hello", 1, 0), (["hello"] * 5, 5, 0), ([7] * 900, 1, 900), ([[7] * 100] * 64, 64, 6_400), ([], 1, 0),
        (["hello"] * 1_000, 64, 0), ({"a": 1}, 1, 0), (None, 1, 0), ([None, 1], 1, 0),
    ],
)  # fmt: skip
def test_each_prompt_of_a_completion_may_have_its_reply(prompt: Any, prompts: int, numbers: int) -> None:
    body = json.dumps({"prompt": prompt, "input": prompt, "max_tokens": 40, "n": 2}, separators=(",", ":")).encode()
    read = max(numbers, -(-len(body) // 4))
    assert estimated_tokens(body, ServingConfig(), "/v1/completions") == read + prompts * 2 * 40
    assert estimated_tokens(body, ServingConfig(), EMBEDDINGS) == read


def test_the_system_text_counts() -> None:
    config = ServingConfig(system_prompt="be kind " * 50)
    assert estimated_tokens(b"{}", config, CHAT) == estimated_tokens(b"{}", ServingConfig(), CHAT) + 100


def test_a_key_that_is_hidden_in_escapes_counts_as_the_longest_reply() -> None:
    for name in (r"max\u005ftokens", r"m\u0061x_tokens", r"max_toke\u006Es"):
        assert estimated_tokens(f'{{"{name}":500}}'.encode(), ServingConfig(), CHAT) >= 512
    assert estimated_tokens(json.dumps({"x": "\x1f é 漢 \u2028"}).encode(), ServingConfig(), CHAT) < 120


@given(st.binary(max_size=200))
def test_an_estimate_of_anything_is_a_number(body: bytes) -> None:
    for path in limits.READING:
        assert 0 <= estimated_tokens(body, ServingConfig(), path) < 1_000_000


class Method:
    def __init__(self, call: Callable[..., Awaitable[Any]]) -> None:
        self.remote = call


class Handle:
    """A deployment handle to a ledger in this process, or to one that is gone."""

    def __init__(self, error: Exception | None = None) -> None:
        self.calls: list[tuple[Any, ...]] = []
        ledger = RateLimits()

        async def reserve(*arguments: Any) -> Any:
            self.calls.append(("reserve", *arguments))
            if error:
                raise error
            return await ledger.reserve(*arguments)

        async def settle(*arguments: Any) -> None:
            self.calls.append(("settle", *arguments))
            if error:
                raise error
            await ledger.settle(*arguments)

        self.reserve, self.settle = Method(reserve), Method(settle)

    def options(self, **options: Any) -> "Handle":
        return self


def key(**options: Any) -> StoredKey:
    return keys.new_ring().with_new(AT, "shop", **options)[1].stored


def body_of(content: bytes) -> Body:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": content, "more_body": False}

    return Body(receive, 1_000_000, 5.0)  # type: ignore[arg-type]


def admitted(limiter: Limiter, stored: StoredKey, path: str = CHAT, content: bytes = b"{}") -> Visit | None:
    async def admit() -> Visit | None:
        return await limiter.admit(stored, path, body_of(content))

    return asyncio.run(admit())


def test_a_key_without_limits_pays_no_hop() -> None:
    handle = Handle()
    assert admitted(Limiter(ServingConfig(), handle), key()) is None  # type: ignore[arg-type]
    assert handle.calls == []


def test_a_limit_of_its_own_goes_before_the_default() -> None:
    handle = Handle()
    limiter = Limiter(ServingConfig(requests_per_minute=7, tokens_per_minute=700), handle)  # type: ignore[arg-type]
    for stored in (key(), key(requests_per_minute=3)):
        admitted(limiter, stored)
    assert [call[2] for call in handle.calls] == [Limits(7, 700), Limits(3, 700)]


def test_only_routes_that_read_and_write_cost_tokens() -> None:
    handle = Handle()
    limiter = Limiter(ServingConfig(), handle)  # type: ignore[arg-type]
    for path in (CHAT, "/v1/completions", "/v1/embeddings", "/v1/models", "/v1/feedback"):
        admitted(limiter, key(tokens_per_minute=1_000), path, b"x" * 400)
    assert [call[3] for call in handle.calls] == [196, 196, 100, 0, 0]


def test_the_headers_are_those_of_openai() -> None:
    limiter = Limiter(ServingConfig(), Handle())  # type: ignore[arg-type]
    both = key(requests_per_minute=2, tokens_per_minute=200)
    visit = admitted(limiter, both)
    assert visit
    headers = visit.headers
    for what in ("requests", "tokens"):
        assert re.fullmatch(r"1m0(\.0\d{0,2})?s", headers.pop(f"x-ratelimit-reset-{what}"))
    assert headers == {
        "x-ratelimit-limit-requests": "2", "x-ratelimit-remaining-requests": "1",
        "x-ratelimit-limit-tokens": "200", "x-ratelimit-remaining-tokens": "103",
    }  # fmt: skip
    few = admitted(limiter, key(requests_per_minute=2))
    assert few
    assert not any("tokens" in name for name in few.headers)
    refused = admitted(limiter, both)
    assert refused
    assert refused.refusal
    assert (refused.refusal.status, refused.refusal.code) == (429, "rate_limit_exceeded")
    assert int(refused.headers["retry-after"]) in (60, 61)
    assert "may spend 2 requests a minute, and 0 are left: try again in 1m0" in str(refused.refusal)


@pytest.mark.parametrize(
    "error", [ActorDiedError(), DeploymentUnavailableError.__new__(DeploymentUnavailableError), TimeoutError()]
)
def test_a_ledger_that_is_gone_lets_nobody_in_who_has_limits(error: Exception) -> None:
    limiter = Limiter(ServingConfig(), Handle(error))  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="cannot be looked up") as told:
        admitted(limiter, key(requests_per_minute=5))
    assert (told.value.status, told.value.code) == (503, "service_unavailable")
    assert admitted(limiter, key()) is None


@pytest.mark.parametrize(
    ("status", "spent", "left"),
    [
        (200, None, 103), (200, 20, 180), (200, 150, 50), (200, 0, 200), (409, 20, 180), (404, None, 200),
        (500, 20, 200), (503, None, 200), (0, 20, 180),
    ],
)  # fmt: skip
def test_what_was_spent_takes_the_place_of_what_was_reserved_and_what_failed_gives_it_back(
    status: int, spent: int | None, left: int
) -> None:
    limiter = Limiter(ServingConfig(), Handle())  # type: ignore[arg-type]

    async def visit() -> int:
        visit = await limiter.admit(key(tokens_per_minute=200), CHAT, body_of(b"{}"))
        assert visit
        assert isinstance(visit.answer, Granted)
        limits.visiting(visit)
        if spent is not None:
            for part in (spent - spent // 2, spent // 2):  # of two choices
                await asyncio.create_task(_spend(part))
        limiter.leave(visit, status)
        await asyncio.gather(*limiter._background)
        again = await limiter.admit(key(tokens_per_minute=200), "/v1/models", body_of(b""))
        assert again
        assert again.answer.tokens
        return again.answer.tokens.remaining

    assert asyncio.run(visit()) == left


async def _spend(tokens: int) -> None:
    limits.spend(tokens)


def test_a_refused_request_settles_nothing() -> None:
    handle = Handle()
    limiter = Limiter(ServingConfig(), handle)  # type: ignore[arg-type]
    visit = admitted(limiter, key(tokens_per_minute=5))
    assert visit
    assert isinstance(visit.answer, Exceeded)
    assert "may spend 5 tokens a minute, and this request alone 97: make it shorter, or" in str(visit.refusal)
    limiter.leave(visit, 429)
    assert [call[0] for call in handle.calls] == ["reserve"]


def test_without_a_visit_spending_is_nothing() -> None:
    limits.visiting(None)
    limits.spend(5)
