"""A TCP proxy in front of an HTTP server that does harm to chosen answers, and counts what it did.

with Proxy(store.port) as proxy:
    proxy.harm("GET", [answer(503), answer(503)])    # the next two GETs; then it passes everything on
    ...
    assert proxy.done == 2
"""

import re
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

Harm = Callable[[bytes], bytes | None]
"""What becomes of an answer (head and body); the connection is reset after what is sent if it is not the whole."""


def answer(status: int, headers: str = "") -> Harm:
    """Another answer instead: of this status, without a body."""
    return lambda whole: f"HTTP/1.1 {status} Harmed\r\nContent-Length: 0\r\n{headers}\r\n".encode()


def reset(whole: bytes) -> bytes:
    """Nothing, and the connection is reset."""
    return b""


def reset_after(count: int) -> Harm:
    """Some bytes of the body, then the connection is reset."""
    return lambda whole: whole[: _body(whole) + count]


def wrong_length(count: int) -> Harm:
    """A well-formed answer whose body is only so many bytes long."""

    def cut(whole: bytes) -> bytes:
        body = whole[_body(whole) :][:count]
        head = re.sub(rb"(?i)content-length: *\d+", b"Content-Length: %d" % len(body), whole[: _body(whole)])
        return head + body

    return cut


def flipped(at: int) -> Harm:
    """One bit of the body is another one."""

    def flip(whole: bytes) -> bytes:
        place = _body(whole) + at
        return whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]

    return flip


def silence(whole: bytes) -> bytes | None:
    """No answer, and the connection stays open."""
    return None


def _body(whole: bytes) -> int:
    return whole.index(b"\r\n\r\n") + 4


class Proxy(socketserver.ThreadingTCPServer):
    """Listens on `port` of the loopback; one thread a connection."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, target_port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Connection)
        self.target_port = target_port
        self.port = int(self.server_address[1])
        self.requests: list[str] = []
        """First lines of what was asked."""
        self.done = 0
        """Answers that were harmed."""
        self.since_s = 0.0
        """When the first of them was."""
        self._harms: list[Harm] = []
        self._method, self._path = "", ""
        self._lock = threading.Lock()
        self.ended = threading.Event()

    def __enter__(self) -> "Proxy":
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.ended.set()
        self.shutdown()
        self.server_close()

    def harm(self, method: str, harms: Sequence[Harm], path: str = "") -> None:
        """What is done to the next answers to requests of this method whose path holds `path`, one harm each."""
        with self._lock:
            self._method, self._path, self._harms, self.done = method, path, list(harms), 0

    def seconds_ago(self) -> float:
        """Since when there has been harm."""
        assert self.done, "no answer was harmed"
        return time.monotonic() - self.since_s

    def next_harm(self, request: str) -> Harm | None:
        """For the answer to this request."""
        with self._lock:
            self.requests.append(request)
            if not self._harms or not request.startswith(f"{self._method} ") or self._path not in request:
                return None
            return self._harms.pop(0)

    def harmed(self) -> None:
        """An answer is another one than it was."""
        with self._lock:
            self.since_s = self.since_s if self.done else time.monotonic()
            self.done += 1

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are what this is about."""


class _Connection(socketserver.BaseRequestHandler):
    server: Proxy

    def handle(self) -> None:
        client = self.request.makefile("rb")
        while request := _message(client):
            harm = self.server.next_harm(request.split(b"\r\n", 1)[0].decode())
            with socket.create_connection(("127.0.0.1", self.server.target_port)) as upstream:
                upstream.sendall(re.sub(rb"(?i)\r\nconnection: [^\r]*", b"", request))
                head_only = request.startswith(b"HEAD ")
                whole = _message(upstream.makefile("rb"), head_only)
            sent = whole if harm is None else harm(whole)
            if sent != whole:
                self.server.harmed()
            if sent is None:
                self.server.ended.wait()
                return
            self.request.sendall(sent)
            if harm is not None and whole.startswith(sent) and sent != whole:
                # Zero seconds to linger: closing sends a reset.
                self.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
                self.request.close()
                return


def _message(stream: Any, head_only: bool = False) -> bytes:
    """One HTTP message, whole; empty if the connection has ended."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        line = stream.readline()
        if not line:
            return b""
        head += line
        if line == b"HTTP/1.1 100 Continue\r\n":
            stream.readline()
            head = b""
    if head_only:
        return head
    if b"chunked" in head.lower():
        body = b""
        while (size := stream.readline()) and int(size.split(b";")[0], 16):
            body += size + stream.read(int(size.split(b";")[0], 16) + 2)
        return head + body + size + stream.readline()
    length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
    return head + (stream.read(int(length[1])) if length else b"")
