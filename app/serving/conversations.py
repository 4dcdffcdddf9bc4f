"""Conversations that the service remembers, so that a follow-up needs only the new message.

    serving/conversations/<digest>.json  {"conversation_id", "updated_at", "turns", "messages"}, these in OpenAI's form

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

from pyarrow import fs

from app.errors import StorageError
from app.storage import Storage

MAX_MESSAGES, MAX_BYTES = 100, 100_000
"""Of a conversation that are kept; more than any context takes."""
_FOLDER = ("serving", "conversations")


class WentOn(Exception):
    """Another request went on with the conversation meanwhile."""


@dataclass(frozen=True)
class Remembered:
    """A conversation so far; nothing was said in a new or forgotten one."""

    messages: list[dict[str, Any]]
    """In OpenAI's form; of a long conversation the last ones."""
    turns: int
    """All that there ever were, by which it is noticed that somebody went on with it."""


@dataclass(frozen=True)
class Turn:
    """What a request adds to a conversation."""

    owner: str
    """Name of the API key."""
    conversation_id: str
    begun: int
    """Turns there were when the request came in."""
    messages: tuple[dict[str, Any], ...]
    """The new ones, in OpenAI's form."""


class Conversations:
    """Those below one storage root. Safe to call from many threads of one process."""

    def __init__(self, storage: Storage, ttl_s: float) -> None:
        self._storage, self._ttl_s = storage, ttl_s
        self._lock = threading.Lock()

    def remembered(self, owner: str, conversation_id: str) -> Remembered:
        """What has been said so far.

        Raises:
            StorageError: It cannot be read.
        """
        name = _name(owner, conversation_id)
        if not self._storage.exists(*_FOLDER, name):
            return Remembered([], 0)
        try:
            content = json.loads(self._storage.read(*_FOLDER, name))
            age_s = time.time() - content["updated_at"]
            # One that was begun before turns were counted goes on.
            found = Remembered(content["messages"], content.get("turns", len(content["messages"])))
        except (ValueError, KeyError, TypeError) as error:
            raise StorageError(f"{self._storage.uri(*_FOLDER, name)} is damaged ({error})", "remove it") from error
        return found if age_s <= self._ttl_s else Remembered([], 0)

    @contextmanager
    def going_on(self, turn: Turn) -> Iterator[Remembered]:
        """What was said before. While this is open, nobody else goes on with a conversation: of replicas on one
        machine, too.

        On an object store, which has no locks, two replicas may go on with one at the same moment.

        Raises:
            WentOn: Another request went on with it meanwhile.
            StorageError: It cannot be read.
        """
        with self._lock, self._storage.alone(*_FOLDER, ".lock"):
            said = self.remembered(turn.owner, turn.conversation_id)
            if said.turns != turn.begun:
                raise WentOn
            yield said

    def add(self, turn: Turn, said: Remembered, reply: dict[str, Any]) -> None:
        """Remember a turn and its reply after what `going_on` gave, while that is open; on disk when this returns.

        Raises:
            StorageError: It cannot be written.
        """
        content = {
            "conversation_id": turn.conversation_id,
            "updated_at": time.time(),
            "turns": said.turns + 1,
            "messages": _recent([*said.messages, *turn.messages, reply]),
        }
        name = _name(turn.owner, turn.conversation_id)
        self._storage.write(json.dumps(content, ensure_ascii=True).encode(), *_FOLDER, name)

    def forget_old(self) -> int:
        """Remove those that nobody went on with for too long; returns how many."""
        removed = 0
        for info in self._storage.files(*_FOLDER):
            if info.base_name.endswith(".json") and self._is_old(info):
                # Somebody may have gone on with it since it was listed, or another replica been faster.
                with self._lock, self._storage.alone(*_FOLDER, ".lock"), suppress(StorageError, OSError):
                    if self._is_old(self._storage.filesystem.get_file_info(info.path)):
                        self._storage.remove_file(*_FOLDER, info.base_name)
                        removed += 1
        return removed

    def _is_old(self, info: fs.FileInfo) -> bool:
        return info.mtime_ns is not None and time.time() - info.mtime_ns / 1e9 > self._ttl_s


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
