"""A load generator for servers that stream replies as OpenAI's API does; its figures are defined as vLLM's are.

    python -m benchmarks.serving_client http://127.0.0.1:8000/v1/completions REQUESTS.json '{"users": 16, "seconds": 8}'
    python -m benchmarks.serving_client URL REQUESTS.json '{"rate": 4.0, "seconds": 8}'       # Poisson arrivals

REQUESTS.json: a list of {"body": ..., "tokens": ...}; a reply has exactly so many tokens. A list of such instead is a
conversation, whose turns one user sends one after another. The same requests are sent in the same order to all servers,
from the number `begin` on. Prints one line of JSON. It speaks HTTP over plain sockets, so that the load takes
little of the cores that it shares with the server: about 0.15 ms a request and 0.03 ms a chunk.

Source: vLLM, vllm/benchmarks/serve.py: TTFT is the time to the first chunk with text, ITL the time from a chunk to the
next, TPOT that from the first to the last divided by the tokens after the first. Goodput counts the requests that keep
both limits of the objective.
"""

import asyncio
import json
import os
import random
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import quantiles
from typing import Any
from urllib.parse import urlsplit

OBJECTIVE = {"ttft_s": 0.25, "tpot_s": 0.05}
"""What goodput asks of a request: the first word at once, the others faster than anybody reads."""


@dataclass
class Sent:
    """One request, and when its text came."""

    tokens: int
    begun_s: float
    chunks_s: list[float] = field(default_factory=list)
    text: str = ""
    failure: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Of the prompt, that the server had read before; where the request asks for the usage."""

    @property
    def ttft_s(self) -> float:
        """Time to the first text."""
        return self.chunks_s[0] - self.begun_s

    @property
    def tpot_s(self) -> float:
        """Time of a token after the first."""
        return (self.chunks_s[-1] - self.chunks_s[0]) / max(1, self.tokens - 1)


class Client:
    """Sends requests to one address.

    Args:
        url: Where to POST.
        headers: Beside the usual ones.
    """

    def __init__(self, url: str, headers: dict[str, str]) -> None:
        parts = urlsplit(url)
        self._host, self._port, self._path = parts.hostname, parts.port, parts.path
        self._headers = "".join(f"{name}: {value}\r\n" for name, value in headers.items())

    async def send(self, request: dict[str, Any]) -> Sent:
        """One request to the end of its reply."""
        body = json.dumps(request["body"]).encode()
        sent = Sent(request["tokens"], time.monotonic())
        try:
            async for line in self._lines(body):
                if not line.startswith(b"data: {"):
                    continue
                now_s = time.monotonic()
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    sent.failure = str(chunk["error"])
                if usage := chunk.get("usage"):
                    sent.prompt_tokens = usage["prompt_tokens"]
                    sent.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
                choice = next(iter(chunk.get("choices") or []), {})
                if text := choice.get("text") or (choice.get("delta") or {}).get("content"):
                    sent.chunks_s.append(now_s)
                    sent.text += text
        except OSError as error:
            sent.failure = str(error)
        else:
            if not sent.chunks_s and not sent.failure:  # a reply of special tokens alone
                sent.chunks_s.append(time.monotonic())
        return sent

    async def get_until(self, end_s: float, latencies: list[float]) -> None:
        """GET over one connection until then, noting how long each took."""
        reader, writer = await asyncio.open_connection(self._host, self._port)
        asked = f"GET {self._path} HTTP/1.1\r\nHost: {self._host}:{self._port}\r\n\r\n".encode()
        while (begun_s := time.monotonic()) < end_s:
            writer.write(asked)
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            if b" 200 " not in head.partition(b"\r\n")[0]:
                raise OSError(f"{head!r}")
            await reader.readexactly(int(head.partition(b"content-length:")[2].partition(b"\r\n")[0]))
            latencies.append(time.monotonic() - begun_s)
        writer.close()

    async def _lines(self, body: bytes) -> AsyncIterator[bytes]:
        reader, writer = await asyncio.open_connection(self._host, self._port)
        try:
            head = f"POST {self._path} HTTP/1.1\r\nHost: {self._host}:{self._port}\r\nConnection: close\r\n"
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n{self._headers}\r\n"
            writer.write(head.encode() + body)
            status = await reader.readline()
            if b" 200 " not in status:
                raise OSError(f"{status!r} {(await reader.read(2_000))!r}")
            while line := await reader.readline():
                yield line
                if line.startswith(b"data: [DONE]"):
                    return
            raise OSError("the stream ended before it was done")
        finally:
            writer.close()


async def closed(client: Client, requests: list[Any], users: int, is_over: Callable[[], bool]) -> list[Sent]:
    """So many users, each of whom sends the next request when the reply to the last is complete."""
    done: list[Sent] = []
    left = iter(requests * 1_000)

    async def user() -> None:
        while not is_over():
            request = next(left)
            for turn in request if isinstance(request, list) else [request]:
                done.append(await client.send(turn))

    await asyncio.gather(*(user() for _ in range(users)))
    return done


async def poisson(client: Client, requests: list[dict[str, Any]], rate: float, seconds: float) -> list[Sent]:
    """Arrivals at a mean rate a second, whatever becomes of the requests before them."""
    gaps = random.Random(0)
    tasks = []
    end_s = time.monotonic() + seconds
    for request in requests * 1_000:
        if time.monotonic() >= end_s:
            break
        tasks.append(asyncio.create_task(client.send(request)))
        await asyncio.sleep(gaps.expovariate(rate))
    return list(await asyncio.gather(*tasks))


async def plain(client: Client, connections: int, seconds: float) -> dict[str, Any]:
    """GET again and again over connections that stay open."""
    latencies: list[float] = []
    begun_s = time.monotonic()
    await asyncio.gather(*(client.get_until(begun_s + seconds, latencies) for _ in range(connections)))
    times, took_s = os.times(), time.monotonic() - begun_s
    return {
        "requests_per_s": len(latencies) / took_s,
        "requests": len(latencies),
        "client_cpu_s": times.user + times.system,
        **percentiles("latency_s", latencies),
    }


def figures(done: list[Sent], begun_s: float) -> dict[str, Any]:
    """Of one run; times in seconds."""
    good = [sent for sent in done if not sent.failure]
    if not good:
        raise RuntimeError(f"no request succeeded: {done[0].failure if done else 'none was sent'}")
    seconds = max(sent.chunks_s[-1] for sent in good) - begun_s
    kept = [s for s in good if s.ttft_s <= OBJECTIVE["ttft_s"] and s.tpot_s <= OBJECTIVE["tpot_s"]]
    gaps = [after - before for s in good for before, after in zip(s.chunks_s, s.chunks_s[1:], strict=False)]
    times = os.times()
    return {
        "tokens_per_s": sum(sent.tokens for sent in good) / seconds,
        "requests_per_s": len(good) / seconds,
        "goodput": len(kept) / seconds,
        "requests": len(good),
        "failures": len(done) - len(good),
        "failure": next((sent.failure for sent in done if sent.failure), ""),
        "client_cpu_s": times.user + times.system,
        "chunks": sum(len(sent.chunks_s) for sent in good),
        "cached": sum(sent.cached_tokens for sent in good) / max(1, sum(sent.prompt_tokens for sent in good)),
        **percentiles("ttft_s", [sent.ttft_s for sent in good]),
        **percentiles("tpot_s", [sent.tpot_s for sent in good if sent.tokens > 1 and len(sent.chunks_s) > 1]),
        **percentiles("itl_s", gaps),
    }


def percentiles(name: str, values: list[float]) -> dict[str, float]:
    """Median and 99th of a hundred."""
    cuts = quantiles(values, n=100, method="inclusive") if len(values) > 1 else values * 99 or [float("nan")] * 99
    return {f"{name}_p50": cuts[49], f"{name}_p99": cuts[98]}


async def main(url: str, file: str, settings: dict[str, Any]) -> dict[str, Any]:
    """One run as the settings have it."""
    requests = json.loads(Path(file).read_text())
    begin = settings.get("begin", 0) % max(1, len(requests))
    requests = [*requests[begin:], *requests[:begin]]
    client = Client(url, settings.get("headers", {}))
    if settings.get("texts"):
        return {"texts": [(await client.send(request)).text for request in requests[: settings["texts"]]]}
    if "plain" in settings:
        return await plain(client, settings["plain"], settings["seconds"])
    begun_s = time.monotonic()
    if "rate" in settings:
        return figures(await poisson(client, requests, settings["rate"], settings["seconds"]), begun_s)
    end_s = begun_s + settings["seconds"]
    return figures(await closed(client, requests, settings["users"], lambda: time.monotonic() >= end_s), begun_s)


if __name__ == "__main__":
    import uvloop

    print(json.dumps(uvloop.run(main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3])))))
