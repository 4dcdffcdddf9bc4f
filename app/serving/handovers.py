"""Answers that a person takes over, as a queue.

    handovers/open/<response id>.json                       waits for a person
    handovers/taken/<response id>~<agent>~<time>.json       was taken

Taking one is a rename that says who did: of two people who take the same one at once only one gets it, and what was
taken has an owner whatever is killed. On an object store, where a rename is a copy and a removal, both may get it,
within the same fraction of a second.
"""

import json
from typing import Any

from app.errors import StorageError
from app.storage import Storage
from app.traffic import now

_OPEN, _TAKEN = ("handovers", "open"), ("handovers", "taken")


class NotWaiting(Exception):
    """No such answer waits for a person; `taken` says whether it did."""

    def __init__(self, taken: bool) -> None:
        super().__init__(taken)
        self.taken = taken


class Handovers:
    """Those below one storage root."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def add(self, response_id: str, told: dict[str, Any]) -> None:
        """Put an answer into the queue; on disk when this returns.

        Raises:
            StorageError: It cannot be written.
        """
        content = json.dumps({"response_id": response_id, **told}, ensure_ascii=True)
        self._storage.write(content.encode(), *_OPEN, f"{response_id}.json")

    def waiting(self, limit: int) -> list[dict[str, Any]]:
        """The first ones of the queue, oldest first: ids begin with their time.

        Raises:
            StorageError: The queue cannot be read.
        """
        found: list[dict[str, Any]] = []
        for name in sorted(info.base_name for info in self._storage.files(*_OPEN) if info.base_name.endswith(".json")):
            if len(found) == limit:
                break
            if (one := self._read(*_OPEN, name)) is not None:  # none: just taken
                found.append(one)
        return found

    def take(self, response_id: str, agent: str) -> dict[str, Any]:
        """Take an answer out of the queue.

        Args:
            agent: Letters, digits and `._@-`.

        Raises:
            NotWaiting: It is not there.
            StorageError: The queue cannot be written.
        """
        name, at = f"{response_id}.json", now()
        taken = f"{response_id}~{agent}~{at}.json"
        try:
            self._storage.filesystem.create_dir(self._storage.path(*_TAKEN), recursive=True)
            self._storage.filesystem.move(self._storage.path(*_OPEN, name), self._storage.path(*_TAKEN, taken))
        except FileNotFoundError:
            names = self._storage.list(*_TAKEN)
            raise NotWaiting(any(one.startswith(f"{response_id}~") for one in names)) from None
        except OSError as error:
            raise StorageError(f"cannot take {self._storage.uri(*_OPEN, name)} ({error})") from error
        return {**(self._read(*_TAKEN, taken) or {}), "taken_by": agent, "taken_at": at}

    def _read(self, *parts: str) -> dict[str, Any] | None:
        if not self._storage.exists(*parts):
            return None
        try:
            content: dict[str, Any] = json.loads(self._storage.read(*parts))
        except StorageError:
            return None
        except ValueError as error:
            raise StorageError(f"{self._storage.uri(*parts)} is damaged ({error})", "remove it") from error
        return content
