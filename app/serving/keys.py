"""API keys as they are kept, in `serving/api_keys.json` below the storage root, and what is done with them.

A key is kept as `SHA-256(salt + key)`, with a salt of its own. A made key has 192 random bits, which no search of any
hash reaches, so a slow password hash would buy nothing and would let anyone keep a replica busy with wrong keys.

`python -m jobs.keys` changes the file; every replica of the application follows it, see access.py.
"""

import datetime
import hashlib
import hmac
import json
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeVar

from app.errors import AccessError, ConfigError, StorageError
from app.storage import Storage

Scope = Literal["chat", "feedback", "admin"]
SCOPES: tuple[Scope, ...] = ("chat", "feedback", "admin")
"""What a key may open, see the table of routes in access.py."""
PREFIX = "sk-rayloop-"
FILE = ("serving", "api_keys.json")
_LOCK = ("serving", "api_keys.lock")
_ATTEMPTS = 5
_NAME = re.compile(r"(?![0-9a-f]{8}\Z)[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
Result = TypeVar("Result")


@dataclass(frozen=True)
class StoredKey:
    """A key as it is kept. Times are ISO 8601 with their zone.

    Raises:
        ValueError: A scope is not known, or a time is none.
    """

    id: str
    """Public: what lists and logs call it."""
    name: str
    """Who has it. A key and the one that takes its place have the same."""
    source: str
    """environment, or made"""
    salt: str
    hash: str
    scopes: tuple[Scope, ...]
    created_at: str
    expires_at: str | None = None
    revoked_at: str | None = None
    requests_per_minute: int | None = None
    """Of its own; none: the default of the configuration."""
    tokens_per_minute: int | None = None
    """Of its own; none: the default of the configuration."""

    def __post_init__(self) -> None:
        if unknown := set(self.scopes) - set(SCOPES):
            raise ValueError(f"key {self.id} has the unknown scopes {sorted(unknown)}")
        for time in (self.created_at, self.expires_at, self.revoked_at):
            if time is not None and datetime.datetime.fromisoformat(time).tzinfo is None:
                raise ValueError(f"the time {time} of key {self.id} has no zone")

    def matches(self, key: str) -> bool:
        """Whether this is the key; takes as long for any other."""
        return hmac.compare_digest(self.hash, _hash(self.salt, key))

    def state(self, at: datetime.datetime) -> Literal["active", "expired", "revoked"]:
        """What it is worth at a time. A revoked key that has expired as well is revoked."""
        if self.revoked_at is not None:
            return "revoked"
        expires_at = self.expires_at and datetime.datetime.fromisoformat(self.expires_at)
        return "expired" if expires_at and expires_at <= at else "active"


@dataclass(frozen=True)
class NewKey:
    """A key that was just made."""

    key: str
    """To be shown once, and then forgotten."""
    stored: StoredKey
    replaces: StoredKey | None = None
    """The key that it takes the place of, as it was."""


@dataclass(frozen=True)
class KeyRing:
    """All keys, and the salt of users' pseudonyms. Changes give another ring."""

    user_salt: str
    keys: tuple[StoredKey, ...] = ()

    def with_new(
        self,
        at: datetime.datetime,
        name: str,
        scopes: Sequence[str] = SCOPES,
        expires_in: datetime.timedelta | None = None,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
    ) -> tuple["KeyRing", NewKey]:
        """The ring with one more key, and that key.

        Raises:
            ConfigError: The name, a scope, the time or a limit cannot be.
            AccessError: An active key has that name.
        """
        _check(name, scopes, expires_in, requests_per_minute, tokens_per_minute)
        if any(key.name == name and key.state(at) == "active" for key in self.keys):
            raise AccessError(f"there is an active key named {name}", "choose another name, or rotate that key")
        made = new_secret()
        stored = stored_key(
            made, name, "made", at,
            scopes=tuple(scope for scope in SCOPES if scope in scopes),
            expires_at=as_text(at + expires_in) if expires_in else None,
            requests_per_minute=requests_per_minute, tokens_per_minute=tokens_per_minute,
        )  # fmt: skip
        return replace(self, keys=(*self.keys, stored)), NewKey(made, stored)

    def rotated(self, at: datetime.datetime, which: str, overlap: datetime.timedelta) -> tuple["KeyRing", NewKey]:
        """The ring with a key in the place of another, and that key.

        The new one has the old one's name, scopes, limits and length of life. The old one expires after the overlap,
        or when it would have anyway. Of several active keys of a name, the one that lives longest is meant.

        Raises:
            AccessError: No active key has that name or id, or it is the environment's.
            ConfigError: The overlap is negative.
        """
        if overlap < datetime.timedelta():
            raise ConfigError(
                f"an overlap of {overlap.total_seconds():g} s cannot be", "give --overlap-s 0 or more seconds"
            )
        active = [key for key in self._named(which) if key.state(at) == "active"]
        if not active:
            raise AccessError(f"the key {which!r} is no longer active", "make a new one with `jobs.keys make`")
        old = max(active, key=lambda key: (key.expires_at is None, key.expires_at or "", key.created_at))
        if old.source == "environment":
            raise AccessError(
                f"the key {which!r} comes from RAYLOOP_API_KEY", "set the variable to another one, and serve again"
            )
        made = new_secret()
        new = stored_key(
            made, old.name, "made", at, scopes=old.scopes, expires_at=_renewed(old, at),
            requests_per_minute=old.requests_per_minute, tokens_per_minute=old.tokens_per_minute,
        )  # fmt: skip
        ends_at = min(filter(None, (as_text(at + overlap), old.expires_at)), key=datetime.datetime.fromisoformat)
        kept = (replace(key, expires_at=ends_at) if key is old else key for key in self.keys)
        return replace(self, keys=(*kept, new)), NewKey(made, new, old)

    def revoked(self, at: datetime.datetime, which: str) -> tuple["KeyRing", tuple[StoredKey, ...]]:
        """The ring with the key of that id, or all keys of that name, revoked; and those that were not yet.

        Raises:
            AccessError: No key has that name or id.
        """
        meant = tuple(key for key in self._named(which) if key.revoked_at is None)
        kept = (replace(key, revoked_at=as_text(at)) if key in meant else key for key in self.keys)
        return replace(self, keys=tuple(kept)), meant

    def _named(self, which: str) -> list[StoredKey]:
        found = [key for key in self.keys if which in (key.id, key.name)]
        if not found:
            raise AccessError(f"there is no key {which!r}", "see `jobs.keys list` for names and ids")
        return found


def new_ring() -> KeyRing:
    """One without keys."""
    return KeyRing(secrets.token_hex(16))


def new_secret() -> str:
    """A key that nobody can guess."""
    return PREFIX + secrets.token_hex(24)


def stored_key(key: str, name: str, source: str, at: datetime.datetime, **more: Any) -> StoredKey:
    """A key as it is kept, with a new id and salt; with all scopes unless `more` names others."""
    salt = secrets.token_hex(16)
    fields = {"scopes": SCOPES, **more}
    return StoredKey(secrets.token_hex(4), name, source, salt, _hash(salt, key), created_at=as_text(at), **fields)


def read(storage: Storage) -> KeyRing | None:
    """The keys of the file; none where there is no file.

    Raises:
        StorageError: It cannot be read, or is damaged.
    """
    if not storage.exists(*FILE):
        return None
    try:
        content = json.loads(storage.read(*FILE))
        return KeyRing(str(content["user_salt"]), tuple(_stored(fields) for fields in content["keys"]))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise StorageError(
            f"{storage.uri(*FILE)} is damaged ({error})", "restore it, or remove it to make a new key"
        ) from error


def change(storage: Storage, changed: Callable[[KeyRing], tuple[KeyRing, Result]]) -> Result:
    """Replace the file by what `changed` makes of it, and return what `changed` tells.

    Readers see the file before or after. On local storage one writer waits for the other (a lock file beside it), so
    that no change is lost. Object stores and HDFS have no such lock: there the file is read again after it was
    written, and a change that another writer has undone meanwhile is made again, up to five times. Two writers within
    the same fraction of a second may still lose one there: look at `jobs.keys list`, or let one person do it.

    Args:
        changed: May be called again, with another ring.

    Raises:
        StorageError: The file cannot be read or written, or others kept undoing the change.
    """
    with storage.alone(*_LOCK):
        for _ in range(_ATTEMPTS):
            before = read(storage) or new_ring()
            after, told = changed(before)
            if after == before:
                return told
            content = {"user_salt": after.user_salt, "keys": [asdict(key) for key in after.keys]}
            storage.write(json.dumps(content, indent=2).encode(), *FILE)
            if storage.is_local or set(after.keys) <= set((read(storage) or before).keys):
                return told
    raise StorageError(f"others keep changing {storage.uri(*FILE)}", "try again when they are done")


def as_text(at: datetime.datetime) -> str:
    """A time as it is kept."""
    return at.astimezone(datetime.UTC).isoformat(timespec="milliseconds")


def _stored(fields: dict[str, Any]) -> StoredKey:
    """A key of the file; those of earlier versions have no id, name and scopes."""
    fields = {"id": fields["hash"][:8], "name": fields["source"], "scopes": SCOPES, **fields}
    return StoredKey(**{**fields, "scopes": tuple(fields["scopes"])})


def _renewed(old: StoredKey, at: datetime.datetime) -> str | None:
    if old.expires_at is None:
        return None
    begun, ends = map(datetime.datetime.fromisoformat, (old.created_at, old.expires_at))
    return as_text(at + (ends - begun))


def _check(
    name: str, scopes: Sequence[str], expires_in: datetime.timedelta | None, *limits_per_minute: int | None
) -> None:
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r} cannot be a key's name",
            "use up to 64 of A-Z a-z 0-9 . _ -, beginning with a letter or digit; not eight hex digits, which is an id",
        )
    if unknown := sorted(set(scopes) - set(SCOPES)):
        raise ConfigError(f"there is no scope {', '.join(map(repr, unknown))}", f"give some of {', '.join(SCOPES)}")
    if not scopes:
        raise ConfigError("a key without any scope opens nothing", f"give some of {', '.join(SCOPES)}")
    if expires_in is not None and expires_in <= datetime.timedelta():
        raise ConfigError(f"a life of {expires_in.total_seconds() / 86_400:g} days is none", "give more than 0 days")
    for limit in limits_per_minute:
        if limit is not None and limit < 1:
            raise ConfigError(f"a limit of {limit} a minute lets nothing in", "give 1 or more, or revoke the key")


def _hash(salt: str, key: str) -> str:
    return hashlib.sha256((salt + key).encode("utf-8", "surrogateescape")).hexdigest()
