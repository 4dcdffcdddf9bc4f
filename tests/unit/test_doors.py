"""Every route of the ingress with every kind of key, and senders of bodies, without a cluster: the application itself.

The routes are those that the ingress has: one that is added later is tried as well.
"""

import asyncio
import contextlib
import datetime
import inspect
import re
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest

from app.serving import keys
from app.serving.access import PUBLIC, VARIABLE, Access, scope_of
from app.serving.gate import Gate
from app.serving.input import InputHandling
from app.serving.keys import SCOPES
from app.serving.limits import Limiter
from app.settings.serving import ServingConfig
from app.storage import Storage
from tests.unit.test_limits import Handle

NOW = datetime.datetime.now(datetime.UTC)
ELSEWHERE = [
    "/v1/unknown",
    "/docs",
    "/openapi.json",
    "/metrics",
    "/v1/models/../why/x",
    "//health",
    "/health/",
    "/page/x",
]
"""Paths that no route answers, and those that look like public ones."""


@pytest.fixture
def storage(store: str, monkeypatch: pytest.MonkeyPatch) -> Storage:
    monkeypatch.delenv(VARIABLE, raising=False)
    storage = Storage(store)
    made(storage, "any")
    return storage


def made(storage: Storage, name: str, **options: Any) -> str:
    at = options.pop("at", NOW)
    return keys.change(storage, lambda ring: ring.with_new(at, name, **options)).key


def ingress(storage: Storage, **settings: Any) -> tuple[Gate, Handle]:
    """The application as a replica of the ingress builds it; behind its doors is nothing."""
    config, handle = ServingConfig(**settings), Handle()
    (kind,) = (each for each in InputHandling.__mro__ if "_gate" in vars(each))
    replica = kind.__new__(kind)
    vars(replica).update(_config=config, _access=Access(storage), _limiter=Limiter(config, handle))  # type: ignore[arg-type]
    return replica._gate(), handle


def client(gate: Gate, **options: Any) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(gate, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://here", **options)


def doors(gate: Gate) -> Iterator[tuple[str, str]]:
    """Every method and path of every route, and paths that there are not."""
    for route in gate._app.routes:  # type: ignore[attr-defined]
        for method in {*route.methods, "GET", "POST", "DELETE", "OPTIONS", "TRACE"}:
            yield method, re.sub(r"\{.*?\}", "some", route.path)
    for path in ELSEWHERE:
        yield "GET", path


async def knocked(gate: Gate, method: str, path: str, header: str | None) -> httpx.Response:
    """The answer to a request whose path is taken as it is; clients would tidy some of them."""
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"{}", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"authorization", header.encode())] if header else []
    scope = {"type": "http", "method": method, "path": path, "query_string": b"", "headers": headers}
    with contextlib.suppress(AttributeError):  # behind the doors is nothing
        await gate(scope, receive, send)  # type: ignore[arg-type]
    start, *rest = sent
    content = b"".join(message.get("body", b"") for message in rest)
    return httpx.Response(start["status"], headers=start["headers"], content=content)


async def asked(gate: Gate, header: str | None) -> AsyncIterator[tuple[str, httpx.Response]]:
    """The answer of every door to one Authorization header."""
    for method, path in doors(gate):
        yield path, await knocked(gate, method, path, header)


def test_the_routes_are_walked(storage: Storage) -> None:
    paths = {path for _, path in doors(ingress(storage)[0])}
    assert {"/v1/chat/completions", "/v1/models", "/v1/models/some", "/v1/feedback", "/v1/why/some", *PUBLIC} <= paths


@pytest.mark.parametrize("kind", ["none", "wrong", "expired", "revoked", "basic"])
def test_no_door_but_the_public_ones_opens_without_a_key_that_is_one(storage: Storage, kind: str) -> None:
    good = made(storage, "good")
    yesterday = NOW - datetime.timedelta(days=1)
    expired = made(storage, "expired", at=yesterday, expires_in=datetime.timedelta(hours=1))
    revoked = made(storage, "revoked")
    keys.change(storage, lambda ring: ring.revoked(NOW, "revoked"))
    header = {
        "none": None, "wrong": f"Bearer {good}x", "expired": f"Bearer {expired}", "revoked": f"Bearer {revoked}",
        "basic": f"Basic {good}",
    }[kind]  # fmt: skip
    gate, _ = ingress(storage)

    async def walk() -> int:
        refused = 0
        async for path, response in asked(gate, header):
            if path in PUBLIC:
                assert response.status_code not in (401, 403), path
                continue
            refused += 1
            assert response.status_code == 401, path
            error = response.json()["error"]
            assert (error["type"], error["code"], error["param"]) == ("authentication_error", "invalid_api_key", None)
            assert ("has expired" in error["message"]) == (kind == "expired")
            assert ("was revoked" in error["message"]) == (kind == "revoked")
            assert response.headers["www-authenticate"] == "Bearer"
        return refused

    assert asyncio.run(walk()) > 30


@pytest.mark.parametrize("scope", SCOPES)
def test_a_key_opens_the_doors_of_its_scope_and_no_other(storage: Storage, scope: str) -> None:
    gate, _ = ingress(storage)
    header = f"Bearer {made(storage, scope, scopes=[scope])}"
    gate._access = Access(storage)

    async def walk() -> set[str]:
        opened = set()
        async for path, response in asked(gate, header):
            if response.status_code == 403:
                error = response.json()["error"]
                assert (error["type"], error["code"]) == ("permission_error", "insufficient_scope")
                assert f"lacks the scope `{scope_of(path)}`" in error["message"]
                continue
            assert response.status_code != 401
            assert scope_of(path) in (None, scope), path
            opened.add(path)
        return opened

    opened = asyncio.run(walk())
    assert opened >= PUBLIC
    assert {path for _, path in doors(gate) if scope_of(path) == scope} <= opened


def test_a_web_socket_is_closed(storage: Storage) -> None:
    sent: list[Any] = []

    async def nothing() -> Any:
        raise AssertionError("nobody listens")

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(ingress(storage)[0]({"type": "websocket", "path": "/health", "headers": []}, nothing, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]


def test_behind_a_prefix_the_doors_are_the_same(storage: Storage) -> None:
    gate, _ = ingress(storage)

    async def ask(path: str) -> int:
        transport = httpx.ASGITransport(gate, root_path="/prefix")
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as http:
            return (await http.get(path)).status_code

    assert asyncio.run(ask("/prefix/health")) == 200
    assert asyncio.run(ask("/prefix/v1/models")) == 401
    assert asyncio.run(ask("/prefix/prefix/health")) == 401


async def dripping(parts: int, pause_s: float) -> AsyncIterator[bytes]:
    for _ in range(parts):
        yield b" "
        await asyncio.sleep(pause_s)


@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/feedback"])
def test_a_body_that_drips_in_is_given_up_and_its_connection_closed(storage: Storage, limited: bool, path: str) -> None:
    header = f"Bearer {made(storage, 'slow', tokens_per_minute=10_000 if limited else None)}"
    gate, _ = ingress(storage, body_timeout_s=0.2)
    held = iter([{"type": "http.request", "body": b"{", "more_body": True}])
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(0.05)  # a byte now and then buys no time
        return next(held, {"type": "http.request", "body": b" ", "more_body": True})

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http", "method": "POST", "path": path, "query_string": b"",
        "headers": [(b"authorization", header.encode())],
    }  # fmt: skip

    async def run() -> float:
        begun_s = asyncio.get_running_loop().time()
        await gate(scope, receive, send)  # type: ignore[arg-type]
        return asyncio.get_running_loop().time() - begun_s

    assert 0.2 <= asyncio.run(run()) < 1
    start, body = sent
    assert start["status"] == 408
    assert (b"connection", b"close") in start["headers"]
    assert b'"code":"request_timeout"' in body["body"]


@pytest.mark.parametrize("limited", [False, True])
def test_a_body_that_is_larger_than_it_says_is_given_up_early(storage: Storage, limited: bool) -> None:
    header = {"authorization": f"Bearer {made(storage, 'big', tokens_per_minute=10_000 if limited else None)}"}
    gate, _ = ingress(storage, max_body_bytes=1_000)
    taken = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal taken
        while True:
            taken += 100
            yield b" " * 100

    async def ask() -> httpx.Response:
        async with client(gate, headers=header) as http:
            return await http.post("/v1/chat/completions", content=endless())

    response = asyncio.run(ask())
    assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")
    assert taken <= 1_200


def test_a_limited_key_is_refused_before_its_body_is_parsed_and_told_how_it_stands(storage: Storage) -> None:
    few = {"authorization": f"Bearer {made(storage, 'few', requests_per_minute=2, tokens_per_minute=1_000)}"}
    gate, handle = ingress(storage)

    async def ask() -> list[httpx.Response]:
        async with client(gate, headers=few) as http:
            responses = []
            for _ in range(3):
                responses.append(await http.post("/v1/chat/completions", content=b"{"))
                await asyncio.gather(*gate._limiter._background)
            return responses

    first, second, third = asyncio.run(ask())
    assert [first.status_code, second.status_code, third.status_code] == [400, 400, 429]
    assert [one.headers["x-ratelimit-remaining-requests"] for one in (first, second, third)] == ["1", "0", "0"]
    assert second.headers["x-ratelimit-remaining-tokens"] == "903", "the first one failed and gave its tokens back"
    error = third.json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert third.headers["retry-after"] in ("60", "61")
    assert [call[0] for call in handle.calls] == ["reserve", "settle", "reserve", "settle", "reserve"]


def test_what_is_public_is_not_limited(storage: Storage) -> None:
    gate, handle = ingress(storage, requests_per_minute=1)

    async def ask() -> set[int]:
        async with client(gate) as http:
            return {(await http.get("/health")).status_code for _ in range(5)}

    assert asyncio.run(ask()) == {200}
    assert handle.calls == []


def test_every_settings_string_says_what_it_is() -> None:
    for name in ("requests_per_minute", "tokens_per_minute", "body_timeout_s"):
        assert inspect.cleandoc(ServingConfig.model_fields[name].description or "")
