"""Who may ask for what: every route wants a scope, and a key that has it.

Keys are those of `serving/api_keys.json` below the storage root (keys.py), and RAYLOOP_API_KEY, which should be as
random. One is made when the application is first deployed and there is none.
"""

import asyncio
import datetime
import hashlib
import hmac
import logging
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from app.errors import RequestError, StageFailed, StorageError
from app.serving import keys
from app.serving.keys import FILE, KeyRing, Scope, StoredKey
from app.storage import Storage

logger = logging.getLogger(__name__)

VARIABLE = "RAYLOOP_API_KEY"
PUBLIC = frozenset({"/", "/page/page.css", "/page/page.js", "/health", "/ready"})
"""The routes that want no key."""
ROUTE_SCOPES: Mapping[str, Scope] = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "chat",
    "/v1/embeddings": "chat",
    "/v1/models": "chat",
    "/v1/models/": "chat",
    "/tokenize": "chat",
    "/detokenize": "chat",
    "/openapi.json": "chat",
    "/v1/feedback": "feedback",
}
"""The scope that a route wants; one that ends with a slash stands for all below it. Every other path, those that do
not exist included, wants `admin`."""
POLL_S = 1.0
"""How often the file is read again."""


def scope_of(path: str) -> Scope | None:
    """The scope that a path wants; none where no key is wanted."""
    if path in PUBLIC:
        return None
    for route, scope in ROUTE_SCOPES.items():
        if path == route or (route.endswith("/") and path.startswith(route)):
            return scope
    return "admin"


class Access:
    """Says who is let in. A check is one SHA-256 a key, some microseconds.

    Raises:
        StageFailed: There is no key at all: the application does not start open.
        StorageError: The file of keys cannot be read.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        given = os.environ.get(VARIABLE)
        self._environment = keys.stored_key(given, "environment", "environment", _now()) if given else None
        # The same in every replica and at every look.
        self._salt = hashlib.sha256(f"user salt {given}".encode("utf-8", "surrogateescape")).hexdigest()[:32]
        self._of_file: KeyRing | None = None
        self._ring = self._read()
        self._is_stale = False
        if not self._ring.keys:
            raise StageFailed(
                f"no API key is in {storage.uri(*FILE)} or {VARIABLE}",
                "deploy with `python -m jobs.serve`, which makes one, or set the variable",
            )

    def check(self, path: str, authorization: str | None) -> StoredKey | None:
        """The key of an Authorization header that opens a path; none where no key is wanted.

        Raises:
            RequestError: 401, there is no such key, or it is no longer one; 403, it lacks the scope.
        """
        scope = scope_of(path)
        if scope is None:
            return None
        key = self._identified(authorization)
        if scope not in key.scopes:
            raise RequestError(
                403,
                f"the API key {key.id} lacks the scope `{scope}`, which this route wants; it has {_said(key.scopes)}",
                "insufficient_scope",
            )
        return key

    @asynccontextmanager
    async def followed(self, application: object = None) -> AsyncIterator[None]:
        """While this is open, changes of the file take effect within about `POLL_S`; the lifespan of an ASGI app.

        While the file cannot be read, or is gone, the keys that were known before stay, and expire.
        """
        following = asyncio.create_task(self._follow())
        try:
            yield
        finally:
            following.cancel()

    def pseudonym(self, user: str) -> str:
        """A stable stand-in for a user's name in the traffic log; without the salt it cannot be guessed."""
        return hmac.digest(self._ring.user_salt.encode(), user.encode(), "sha256").hex()[:24]

    def _identified(self, authorization: str | None) -> StoredKey:
        scheme, _, given = (authorization or "").partition(" ")
        # Every key is tried, whichever matches, and whatever the scheme is.
        matching = [key for key in self._ring.keys if key.matches(given.strip())]
        if scheme.lower() != "bearer" or not matching:
            what = "the API key is not known here: check it, or ask for a new one"
            if scheme.lower() != "bearer":
                what = "the API key is missing: send it as `Authorization: Bearer <key>`"
            raise RequestError(401, what, "invalid_api_key")
        at = _now()
        states = {key.state(at): key for key in matching}
        if "active" not in states:
            what = "was revoked" if "revoked" in states else "has expired"
            raise RequestError(401, f"the API key {what}: ask for a new one", "invalid_api_key")
        return states["active"]

    def _read(self) -> KeyRing:
        """The keys of the file and the environment.

        Raises:
            StorageError: The file cannot be read, or there was one and it is gone.
        """
        found = keys.read(self._storage)
        if found is None and self._of_file is not None:
            raise StorageError(f"{self._storage.uri(*FILE)} is gone", "restore it, or make keys and deploy again")
        self._of_file = found
        if found is not None:
            # What is deployed puts RAYLOOP_API_KEY into the file. A replica's own environment may be older.
            return found
        return KeyRing(self._salt, (self._environment,) if self._environment else ())

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(POLL_S)
            try:
                self._ring = await asyncio.to_thread(self._read)
                if self._is_stale:
                    logger.info("API keys can be read again")
                self._is_stale = False
            except Exception as error:  # whatever it is: were this loop to end, revoked keys would stay open
                if not self._is_stale:
                    logger.error("API keys cannot be read, those known before stay: %s", error)
                self._is_stale = True


def ensure_key(storage: Storage) -> str | None:
    """See to it that there is a key; returns a newly made one, to be shown this once.

    A changed RAYLOOP_API_KEY takes the place of the one before. Keys that were all revoked, or have expired, are keys:
    none is made behind the back of who did that.
    """
    environment = os.environ.get(VARIABLE)

    def ensured(ring: KeyRing) -> tuple[KeyRing, str | None]:
        if environment:
            if any(key.matches(environment) for key in ring.keys):
                return ring, None
            kept = (key for key in ring.keys if key.source != "environment")
            taken = keys.stored_key(environment, "environment", "environment", _now())
            return KeyRing(ring.user_salt, (*kept, taken)), None
        if ring.keys:
            return ring, None
        after, made = ring.with_new(_now(), "made")
        return after, made.key

    return keys.change(storage, ensured)


def _said(scopes: tuple[Scope, ...]) -> str:
    return ", ".join(f"`{scope}`" for scope in scopes)


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
