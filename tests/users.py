"""Users of the served application, many at once, who note what each of their questions came to."""

import asyncio
import contextlib
import json
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx


@dataclass
class Asked:
    """A question, and what it came to."""

    question: str
    stream: bool
    begun_s: float
    ended_s: float | None = None
    status: int = 0
    """Of the HTTP response; 0 where none came."""
    text: str = ""
    is_whole: bool = False
    """JSON came, or a stream that said that it was done."""
    error: str = ""
    """The code of the error that was told, in an answer or in a stream; or what became of the connection."""
    model: str = ""
    variant: str = ""
    retry_after: str | None = None

    @property
    def is_answered(self) -> bool:
        return self.status == 200 and self.is_whole

    @property
    def is_silent(self) -> bool:
        """A stream that broke off without a word."""
        return self.status == 200 and not self.is_whole and self.error in ("", "RemoteProtocolError", "ReadError")

    @property
    def took_s(self) -> float:
        assert self.ended_s is not None
        return self.ended_s - self.begun_s


async def ask(
    client: httpx.AsyncClient, asked: Asked, body: Mapping[str, Any], path: str = "/v1/chat/completions"
) -> None:
    """Send a question and note the answer; fails for nothing."""
    messages = [{"role": "user", "content": asked.question}]
    sent = {"model": "support", "messages": messages, "stream": asked.stream, **body}
    try:
        async with client.stream("POST", path, json=sent) as response:
            asked.status = response.status_code
            asked.retry_after = response.headers.get("retry-after")
            if asked.stream and response.status_code == 200:
                asked.variant = response.headers["x-rayloop-variant"]
                async for line in response.aiter_lines():
                    if line == "data: [DONE]":
                        asked.is_whole = True
                    elif line:
                        _take(asked, json.loads(line.removeprefix("data: ")))
            else:
                whole = json.loads(await response.aread())
                if "error" in whole:
                    asked.error = str(whole["error"]["code"])
                else:
                    asked.variant, asked.model = response.headers["x-rayloop-variant"], whole["model"]
                    asked.text = whole["choices"][0]["message"]["content"]
                    asked.is_whole = True
    except (httpx.HTTPError, ValueError) as error:
        asked.error = type(error).__name__
    finally:
        asked.ended_s = time.monotonic()


def _take(asked: Asked, chunk: dict[str, Any]) -> None:
    if "error" in chunk:
        asked.error = str(chunk["error"]["code"])
        return
    assert asked.model in ("", chunk["model"]), "the chunks of a stream name different models"
    asked.model = chunk["model"]
    for choice in chunk["choices"]:
        asked.text += choice["delta"].get("content") or ""


class Users(threading.Thread):
    """Each asks again as soon as there is an answer.

        with Users(url, key, 8, ANSWERS, random.Random(0)) as users:
            ...
        assert not users.wrong(ANSWERS)

    Args:
        body: More fields of the request, by question.
    """

    def __init__(
        self,
        url: str,
        key: str,
        number: int,
        questions: Sequence[str],
        chance: random.Random,
        body: Callable[[str], Mapping[str, Any]] = lambda question: {},
        pause_s: float = 0.0,
    ) -> None:
        super().__init__(daemon=True)
        self._url, self._key, self._number, self._body, self._pause_s = url, key, number, body, pause_s
        self._questions, self._chances = list(questions), [random.Random(chance.random()) for _ in range(number)]
        self._ended, self._held = threading.Event(), threading.Event()
        self.all: list[Asked] = []
        self.failure: BaseException | None = None

    def __enter__(self) -> "Users":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.join(180)
        assert not self.is_alive(), "a question has had no answer for three minutes"
        if self.failure:
            raise self.failure

    def run(self) -> None:
        try:
            asyncio.run(self._ask_all())
        except BaseException as error:
            self.failure = error

    async def _ask_all(self) -> None:
        async with asyncio.TaskGroup() as group:
            for chance in self._chances:
                group.create_task(self._ask(chance))

    async def _ask(self, chance: random.Random) -> None:
        headers = {"Authorization": f"Bearer {self._key}"}
        async with httpx.AsyncClient(base_url=self._url, headers=headers, timeout=150) as client:
            while not self._ended.is_set():
                if self._held.is_set():
                    await asyncio.sleep(0.01)
                    continue
                asked = Asked(chance.choice(self._questions), chance.random() < 0.5, time.monotonic())
                self.all.append(asked)
                await ask(client, asked, self._body(asked.question))
                # Who was refused does not ask again at once.
                await asyncio.sleep(self._pause_s if asked.is_answered else 0.2)

    def hold(self) -> None:
        """Ask nothing new, until `go_on`."""
        self._held.set()

    def go_on(self) -> None:
        """Ask again."""
        self._held.clear()

    @property
    def ended(self) -> list[Asked]:
        """Questions that came to something."""
        return [asked for asked in list(self.all) if asked.ended_s is not None]

    @property
    def open(self) -> list[Asked]:
        """Questions that are being answered."""
        return [asked for asked in list(self.all) if asked.ended_s is None]

    @property
    def answered(self) -> list[Asked]:
        return [asked for asked in self.ended if asked.is_answered]

    @property
    def failed(self) -> list[Asked]:
        return [asked for asked in self.ended if not asked.is_answered]

    def wrong(self, answers: Mapping[str, str]) -> list[Asked]:
        """Answers that are not the right ones; of one that broke off, the beginning is looked at."""
        return [
            asked
            for asked in self.ended
            if (asked.is_answered and asked.text != answers[asked.question])
            or not answers[asked.question].startswith(asked.text)
        ]

    def answers_after(self, number: int, within_s: float = 120.0) -> None:
        """Wait for so many more answers."""
        wanted, deadline_s = len(self.answered) + number, time.monotonic() + within_s
        while len(self.answered) < wanted:
            missing = wanted - len(self.answered)
            assert time.monotonic() < deadline_s, f"{missing} of {number} answers did not come; {self.failed[-3:]}"
            time.sleep(0.05)


@contextlib.contextmanager
def slow_readers(address: tuple[str, int], request: bytes, number: int) -> Iterator[list[Any]]:
    """So many connections with small buffers that have sent a request, and read only what the block reads."""
    import socket

    connections = []
    try:
        for _ in range(number):
            connection = socket.socket()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2_048)
            connection.settimeout(60)
            connection.connect(address)
            connection.sendall(request)
            connections.append(connection)
        yield connections
    finally:
        for connection in connections:
            connection.close()
