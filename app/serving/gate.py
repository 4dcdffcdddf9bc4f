"""What every HTTP request passes first: the key and its scope, sizes, limits; a last net; one line in the log."""

import logging
import re
import time
import traceback
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import RequestError
from app.serving import openai_format
from app.serving.access import Access
from app.serving.body import Body
from app.serving.keys import StoredKey
from app.serving.limits import Limiter, Visit, visiting
from app.settings.serving import ServingConfig
from app.telemetry import REQUESTS, counter

logger = logging.getLogger(__name__)

SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_STATUS_HEADERS = {
    401: {"WWW-Authenticate": "Bearer"},
    408: {"Connection": "close"},
    429: {"Retry-After": "1"},
    503: {"Retry-After": "1"},
}


class Gate:
    """ASGI middleware around the routes. The request id is set, and sent back, by Serve."""

    def __init__(self, app: ASGIApp, access: Access, limiter: Limiter, config: ServingConfig) -> None:
        self._app, self._access, self._limiter, self._config = app, access, limiter, config
        self._requests = counter(REQUESTS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, or answer it here. There are no WebSockets: they are closed."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        begun_s = time.monotonic()
        headers = Headers(scope=scope)
        body = Body(receive, self._config.max_body_bytes, self._config.body_timeout_s)
        status = 0
        key: StoredKey | None = None
        visit: Visit | None = None

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                _put_headers(message, visit.headers if visit else {})
            await send(message)

        try:
            try:
                path = _path(scope)
                key = self._access.check(path, headers.get("authorization"))
                self._check_size(headers)
                visit = await self._limiter.admit(key, path, body) if key else None
                if visit and visit.refusal:
                    raise visit.refusal
            except RequestError as error:
                await error_response(error.status, str(error), error.code, error.param)(scope, receive, send_on)
            else:
                visiting(visit)
                scope.setdefault("state", {})["key"] = key
                await self._app(scope, body.receive, send_on)
        except Exception as error:
            # The message may quote the customer; the place where it happened does not.
            where = "".join(traceback.format_tb(error.__traceback__))
            fields = {"request_id": _request_id(headers), "traceback": where}
            logger.error("unexpected %s", type(error).__name__, extra={"fields": fields})
            if status:
                raise
            await error_response(500, openai_format.UNEXPECTED, "server_error")(scope, receive, send_on)
        finally:
            if visit:
                self._limiter.leave(visit, status)
            self._record(scope, headers, key, status or 499, time.monotonic() - begun_s)

    def _check_size(self, headers: Headers) -> None:
        size = headers.get("content-length", "")
        if size.isdecimal() and int(size[:20]) > self._config.max_body_bytes:
            raise RequestError(413, f"the body is larger than {self._config.max_body_bytes} bytes", "body_too_large")

    def _record(self, scope: Scope, headers: Headers, key: StoredKey | None, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "unknown")
        self._requests.inc(tags={"route": route, "status": str(status)})
        fields: dict[str, Any] = {
            "request_id": _request_id(headers),
            "response_id": scope.get("state", {}).get("response_id"),
            "key": key and key.id,
            "route": route,
            "status": status,
            "seconds": round(seconds, 4),
        }
        logger.info("request", extra={"fields": fields})


def error_response(status: int, message: str, code: str | None = None, param: str | None = None) -> JSONResponse:
    """An answer in OpenAI's error shape."""
    return JSONResponse(openai_format.error(status, message, code, param), status, _STATUS_HEADERS.get(status))


def _request_id(headers: Headers) -> str | None:
    """As it may stand in the log."""
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else None


def _path(scope: Scope) -> str:
    """The path as the routes have it: without the prefix of the application."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def _put_headers(message: Message, limits: dict[str, str]) -> None:
    headers = MutableHeaders(scope=message)
    for name, value in SECURITY_HEADERS.items():
        headers.setdefault(name, value)
    headers.update(limits)
