"""The body of a request on its way in: limited in bytes and in time, whoever reads it."""

import asyncio

from starlette.types import Message, Receive

from app.errors import RequestError


class Body:
    """Hands on an ASGI application's `receive`.

    The time counts from here to the last byte, so that a byte now and then buys no more of it.

    Args:
        max_bytes: Of the whole body, whatever its Content-Length says.
    """

    def __init__(self, receive: Receive, max_bytes: int, timeout_s: float) -> None:
        self._receive, self._max_bytes, self._timeout_s = receive, max_bytes, timeout_s
        self._ends_at_s = asyncio.get_running_loop().time() + timeout_s
        self._bytes = 0
        self._is_complete = False
        self._read: Message | None = None

    async def receive(self) -> Message:
        """The next message, as ASGI has it.

        Raises:
            RequestError: 413, the body is too large; 408, it takes too long.
        """
        if self._read is not None:
            message, self._read = self._read, None
            return message
        if self._is_complete:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._ends_at_s):
                message = await self._receive()
        except TimeoutError:
            raise RequestError(
                408, f"the body was not here after {self._timeout_s:g} s; the connection is closed", "request_timeout"
            ) from None
        if message["type"] == "http.request":
            self._bytes += len(message.get("body", b""))
            if self._bytes > self._max_bytes:
                raise RequestError(413, f"the body is larger than {self._max_bytes} bytes", "body_too_large")
            self._is_complete = not message.get("more_body", False)
        return message

    async def read(self) -> bytes:
        """All of it. What calls `receive` afterwards gets it too.

        Raises:
            RequestError: 413 and 408 as above; 400, the client left before it was complete.
        """
        body = bytearray()
        while not self._is_complete:
            message = await self.receive()
            if message["type"] != "http.request":
                raise RequestError(400, "the connection closed before the body was complete", "incomplete_body")
            body += message.get("body", b"")
        self._read = {"type": "http.request", "body": bytes(body), "more_body": False}
        return bytes(body)
