"""Who may ask: API keys, kept as salted hashes.

Keys come from RAYLOOP_API_KEY, or one is made when the application is first deployed. Either way
`serving/api_keys.json` below the storage root holds only `SHA-256(salt + key)` with a salt of its own each.
A made key has 192 random bits, which no search of any hash reaches, so a slow password hash would buy nothing
and would let anyone keep a replica busy with wrong keys. RAYLOOP_API_KEY should be as random.
"""

import hashlib
import hmac
import json
import os
import secrets
from dataclasses import asdict, dataclass

from app.errors import StageFailed, StorageError
from app.storage import Storage
from app.traffic import now

VARIABLE = "RAYLOOP_API_KEY"
PREFIX = "sk-rayloop-"
_FILE = ("serving", "api_keys.json")


@dataclass(frozen=True)
class StoredKey:
    """A key as it is kept."""

    source: str
    """environment, or made"""
    salt: str
    hash: str
    created_at: str

    def matches(self, key: str) -> bool:
        """Whether this is the key; takes as long for any other."""
        return hmac.compare_digest(self.hash, _hash(self.salt, key))


class Access:
    """Says who is let in. Reads the keys once; a check is one SHA-256 a key, some microseconds.

    Raises:
        StageFailed: There is no key at all: the application does not start open.
    """

    def __init__(self, storage: Storage) -> None:
        self._keys, self._user_salt = _read(storage)
        environment = os.environ.get(VARIABLE)
        if environment and not any(key.matches(environment) for key in self._keys):
            self._keys = (*self._keys, _stored("environment", environment))
        if not self._keys:
            raise StageFailed(
                f"no API key is in {storage.uri(*_FILE)} or {VARIABLE}",
                "deploy with `python -m jobs.serve`, which makes one, or set the variable",
            )

    def allows(self, authorization: str | None) -> bool:
        """Whether an Authorization header carries a key that is known. Every key is tried, whichever matches."""
        scheme, _, key = (authorization or "").partition(" ")
        matches = [stored.matches(key.strip()) for stored in self._keys]
        return scheme.lower() == "bearer" and any(matches)

    def pseudonym(self, user: str) -> str:
        """A stable stand-in for a user's name in the traffic log; without the salt it cannot be guessed."""
        return hmac.digest(self._user_salt.encode(), user.encode(), "sha256").hex()[:24]


def ensure_key(storage: Storage) -> str | None:
    """See to it that there is a key; returns a newly made one, to be shown this once.

    A changed RAYLOOP_API_KEY takes the place of the one before.
    """
    keys, user_salt = _read(storage)
    environment = os.environ.get(VARIABLE)
    if environment:
        if not any(key.matches(environment) for key in keys):
            kept = (key for key in keys if key.source != "environment")
            _write(storage, (*kept, _stored("environment", environment)), user_salt)
        return None
    if keys:
        return None
    made = PREFIX + secrets.token_hex(24)
    _write(storage, (_stored("made", made),), user_salt)
    return made


def _stored(source: str, key: str) -> StoredKey:
    salt = secrets.token_hex(16)
    return StoredKey(source, salt, _hash(salt, key), now())


def _hash(salt: str, key: str) -> str:
    return hashlib.sha256((salt + key).encode("utf-8", "surrogateescape")).hexdigest()


def _read(storage: Storage) -> tuple[tuple[StoredKey, ...], str]:
    """The keys, and the salt of users' pseudonyms: of the file, or none and a new one."""
    if not storage.exists(*_FILE):
        return (), secrets.token_hex(16)
    try:
        content = json.loads(storage.read(*_FILE))
        return tuple(StoredKey(**key) for key in content["keys"]), str(content["user_salt"])
    except (ValueError, TypeError, KeyError) as error:
        raise StorageError(
            f"{storage.uri(*_FILE)} is damaged ({error})", "restore it, or remove it to make a new key"
        ) from error


def _write(storage: Storage, keys: tuple[StoredKey, ...], user_salt: str) -> None:
    content = {"user_salt": user_salt, "keys": [asdict(key) for key in keys]}
    storage.write(json.dumps(content, indent=2).encode(), *_FILE)
