"""Conversations that the service remembers, so that a follow-up needs only the new message.

    serving/conversations/<digest>.json     {"updated_at": ..., "messages": [...]} in OpenAI's form

One belongs to the API key's name that began it: nobody else can go on with it or read it. It is forgotten once
nothing was said for `conversation_ttl_s`.
"""

import hashlib
import json
import logging
import threading
import time
from dataclasses import dataclass
from typing import Any

from app.errors import StorageError
from app.storage import Storage

logger = logging.getLogger(__name__)

_FOLDER = ("serving", "conversations")


class WentOn(Exception):
    """Another request went on with the conversation meanwhile."""


@dataclass(frozen=True)
class Turn:
    """What a request adds to a conversation."""

    owner: str
    """Name of the API key."""
    conversation_id: str
    begun: int
    """Messages there were when the request came in."""
    messages: tuple[dict[str, Any], ...]
    """The new ones, in OpenAI's form."""


class Conversations:
    """Those below one storage root. Safe to call from many threads of one process."""

    def __init__(self, storage: Storage, ttl_s: float) -> None:
        self._storage, self._ttl_s = storage, ttl_s
        self._lock = threading.Lock()

    def messages(self, owner: str, conversation_id: str) -> list[dict[str, Any]]:
        """What has been said so far; nothing if it is new or forgotten.

        Raises:
            StorageError: It cannot be read.
        """
        name = _name(owner, conversation_id)
        if not self._storage.exists(*_FOLDER, name):
            return []
        try:
            content = json.loads(self._storage.read(*_FOLDER, name))
            age_s = time.time() - content["updated_at"]
            messages: list[dict[str, Any]] = content["messages"]
        except (ValueError, KeyError, TypeError) as error:
            raise StorageError(f"{self._storage.uri(*_FOLDER, name)} is damaged ({error})", "remove it") from error
        return messages if age_s <= self._ttl_s else []

    def check(self, turn: Turn) -> None:
        """See that nobody else went on with it.

        Raises:
            WentOn: Somebody did.
            StorageError: It cannot be read.
        """
        if len(self.messages(turn.owner, turn.conversation_id)) != turn.begun:
            raise WentOn

    def add(self, turn: Turn, reply: dict[str, Any]) -> None:
        """Remember a turn and its reply; on disk when this returns.

        Raises:
            WentOn: Another request went on with it meanwhile; nothing is changed.
            StorageError: It cannot be written.
        """
        with self._lock:
            said = self.messages(turn.owner, turn.conversation_id)
            if len(said) != turn.begun:
                raise WentOn
            content = {"updated_at": time.time(), "messages": [*said, *turn.messages, reply]}
            encoded = json.dumps(content, ensure_ascii=True).encode()
            self._storage.write(encoded, *_FOLDER, _name(turn.owner, turn.conversation_id))

    def forget_old(self) -> int:
        """Remove those that nobody went on with for too long; returns how many."""
        now_s, removed = time.time(), 0
        for info in self._storage.files(*_FOLDER):
            if info.mtime_ns is not None and now_s - info.mtime_ns / 1e9 > self._ttl_s:
                self._storage.remove_file(*_FOLDER, info.base_name)
                removed += 1
        return removed


def _name(owner: str, conversation_id: str) -> str:
    return f"{hashlib.sha256(json.dumps([owner, conversation_id]).encode()).hexdigest()[:40]}.json"
