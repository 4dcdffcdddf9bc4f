"""What every HTTP request passes first: the key, the size, a last net for errors, and one line in the log."""

import logging
import re
import time
import traceback
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.serving import openai_format
from app.serving.access import Access
from app.telemetry import REQUESTS, counter

logger = logging.getLogger(__name__)

PUBLIC = frozenset({"/", "/page/page.css", "/page/page.js", "/health", "/ready"})
"""Every other path wants a key, those that do not exist included."""

SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_REQUEST_ID = re.compile(r"^[A-Za-z0-9._-]{1,128}$")


class Gate:
    """ASGI middleware around the routes. The request id is set, and sent back, by Serve's HTTP proxy."""

    def __init__(self, app: ASGIApp, access: Access, max_body_bytes: int) -> None:
        self._app, self._access, self._max_body_bytes = app, access, max_body_bytes
        self._requests = counter(REQUESTS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, or answer it here."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun_s = time.monotonic()
        headers = Headers(scope=scope)
        status = 0

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                _put_headers(message)
            await send(message)

        try:
            refusal = self._refusal(scope["path"], headers)
            await (refusal or self._app)(scope, receive, send_on)
        except Exception as error:
            # The message may quote the customer; the place where it happened does not.
            where = "".join(traceback.format_tb(error.__traceback__))
            logger.error("unexpected %s", type(error).__name__, extra={"fields": {"traceback": where}})
            if status:
                raise
            await error_response(500, "something went wrong here; the request id finds it in our log", "server_error")(
                scope, receive, send_on
            )
        finally:
            self._record(scope, headers, status or 499, time.monotonic() - begun_s)

    def _refusal(self, path: str, headers: Headers) -> JSONResponse | None:
        if path not in PUBLIC and not self._access.allows(headers.get("authorization")):
            given = "is not known here" if headers.get("authorization") else "is missing"
            return error_response(
                401, f"the API key {given}: send it as `Authorization: Bearer <key>`", "invalid_api_key"
            )
        size = headers.get("content-length", "")
        if size.isdigit() and int(size[:20]) > self._max_body_bytes:
            return too_large(self._max_body_bytes)
        return None

    def _record(self, scope: Scope, headers: Headers, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "unknown")
        self._requests.inc(tags={"route": route, "status": str(status)})
        given = headers.get("x-request-id", "")
        fields: dict[str, Any] = {
            "request_id": given if _REQUEST_ID.match(given) else None,
            "route": route,
            "status": status,
            "seconds": round(seconds, 4),
        }
        logger.info("request", extra={"fields": fields})


def error_response(status: int, message: str, code: str | None = None, param: str | None = None) -> JSONResponse:
    """An answer in OpenAI's error shape."""
    headers = (
        {"Retry-After": "1"} if status in (429, 503) else {"WWW-Authenticate": "Bearer"} if status == 401 else None
    )
    return JSONResponse(openai_format.error(status, message, code, param), status, headers)


def too_large(limit: int) -> JSONResponse:
    """The answer to a body that is larger than `limit` bytes."""
    return error_response(413, f"the body is larger than {limit} bytes", "body_too_large")


def _put_headers(message: Message) -> None:
    headers = MutableHeaders(scope=message)
    for name, value in SECURITY_HEADERS.items():
        headers.setdefault(name, value)
