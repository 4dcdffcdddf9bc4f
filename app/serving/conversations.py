"""Conversations that the service remembers, so that a follow-up needs only the new message.

    serving/conversations/<digest>.json  {"conversation_id": ..., "updated_at": ..., "messages": [...]} in OpenAI's form

One belongs to the API key's name that began it: nobody else can go on with it or read it. It is forgotten once
nothing was said for `conversation_ttl_s`.
"""

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from app.errors import StorageError
from app.storage import Storage

MAX_MESSAGES, MAX_BYTES = 100, 100_000
"""Of a conversation that are kept; more than any context takes."""
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

    @contextmanager
    def going_on(self, turn: Turn) -> Iterator[list[dict[str, Any]]]:
        """What was said before. While this is open, nobody else goes on with a conversation: of replicas on one
        machine, too.

        On an object store, which has no locks, two replicas may go on with one at the same moment.

        Raises:
            WentOn: Another request went on with it meanwhile.
            StorageError: It cannot be read.
        """
        with self._lock, self._storage.alone(*_FOLDER, ".lock"):
            said = self.messages(turn.owner, turn.conversation_id)
            if len(said) != turn.begun:
                raise WentOn
            yield said

    def add(self, turn: Turn, said: list[dict[str, Any]], reply: dict[str, Any]) -> None:
        """Remember a turn and its reply after what `going_on` gave, while that is open; on disk when this returns.

        Raises:
            StorageError: It cannot be written.
        """
        messages = _recent([*said, *turn.messages, reply])
        content = {"conversation_id": turn.conversation_id, "updated_at": time.time(), "messages": messages}
        name = _name(turn.owner, turn.conversation_id)
        self._storage.write(json.dumps(content, ensure_ascii=True).encode(), *_FOLDER, name)

    def forget_old(self) -> int:
        """Remove those that nobody went on with for too long; returns how many."""
        now_s, removed = time.time(), 0
        for info in self._storage.files(*_FOLDER):
            is_one = info.base_name.endswith(".json") and info.mtime_ns is not None
            if is_one and now_s - info.mtime_ns / 1e9 > self._ttl_s:
                with suppress(StorageError):  # another replica was faster
                    self._storage.remove_file(*_FOLDER, info.base_name)
                    removed += 1
        return removed


def _recent(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is kept of a long conversation: its system text and its last whole turns."""
    begin = 1 if messages[0]["role"] in ("system", "developer") else 0
    turns = [place for place, message in enumerate(messages) if message["role"] == "user"]
    for place in turns:
        kept = [*messages[:begin], *messages[place:]]
        if len(kept) <= MAX_MESSAGES and sum(len(json.dumps(message)) for message in kept) <= MAX_BYTES:
            return kept
    return [*messages[:begin], *messages[turns[-1] :]] if turns else messages


def _name(owner: str, conversation_id: str) -> str:
    return f"{hashlib.sha256(json.dumps([owner, conversation_id]).encode()).hexdigest()[:40]}.json"
