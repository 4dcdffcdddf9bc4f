"""The logged exchange and feedback: serving appends, monitoring and ingestion read.

    traffic/exchanges/<writer>-<n>.jsonl      one JSON object a line: {"kind": "exchange", ...}
    traffic/feedback/<writer>-<n>.jsonl       {"kind": "feedback", ...}

Every process writes files of its own. `TrafficLog.append` returns when the record is on disk (local roots) or
is an object of its own (object stores); several records that wait together share one fsync. A process that is
killed while it writes leaves a torn last line, which readers skip; it was never acknowledged.
"""

import dataclasses
import datetime
import json
import logging
import os
import re
import secrets
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from pyarrow import fs

from app.conversation import Message
from app.errors import StorageError
from app.storage import Storage, sync_folder

logger = logging.getLogger(__name__)

SEGMENT_BYTES = 8_000_000
LATEST_ANSWER_S = 3_600
"""An exchange is logged at most this long after its request came in; `find` looks no further."""
CLOCK_SKEW_S = 60
_ID = re.compile(r"^(?:chatcmpl|cmpl)-([0-9a-f]{11})[0-9a-f]{20}$")
_SEGMENT = re.compile(r"^([0-9a-f]{11}-[0-9a-z]+)-(\d{6})\.jsonl$")


@dataclass(frozen=True)
class Exchange:
    """One request and its answer."""

    response_id: str
    received_at: str
    """ISO 8601, UTC"""
    variant: str
    model_version: str
    messages: list[Message]
    reply: str
    """All that the customer read, a hand-over message included."""
    intent: str | None
    intent_confidence: float | None
    handover: str | None
    """Why a person takes over, or none."""
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    time_to_first_token_s: float | None
    end_to_end_s: float
    stream: bool
    user_hash: str | None
    status: Literal["ok", "cancelled", "error"]
    model_uri: str = ""
    """The model's folder, whose lineage tells where it came from."""
    reply_confidence: float | None = None
    """Mean probability of the reply's tokens."""
    sentiment: float | None = None
    """How the customer feels, from -1 to 1, if that is known."""
    rule: str | None = None
    """Name of the rule by which the question was refused; the model was not asked."""
    metadata: dict[str, str] = field(default_factory=dict)
    """What the caller attached to the request."""
    endpoint: Literal["chat", "completions"] = "chat"
    """Which of OpenAI's endpoints was asked."""
    other_replies: list[str] = field(default_factory=list)
    """Of the choices after the first, where several were asked for."""
    tools: list[str] = field(default_factory=list)
    """Names of the functions that the model might call."""

    @property
    def is_conversation(self) -> bool:
        """Whether a customer and the model talked with each other, in words alone."""
        return self.endpoint == "chat" and not self.tools and self.rule is None and bool(self.messages)


@dataclass(frozen=True)
class Feedback:
    """One judgement of an answer. The latest one on a response counts."""

    response_id: str
    received_at: str
    """ISO 8601, UTC"""
    rating: int | None
    """1, -1, or none: an earlier rating is withdrawn"""
    intent: str | None
    """What the question was really about, if the customer or agent says so."""
    comment: str | None


_KINDS: dict[str, type[Exchange] | type[Feedback]] = {"exchange": Exchange, "feedback": Feedback}
_FOLDERS = {Exchange: "exchanges", Feedback: "feedback"}


def now() -> str:
    """The present time as it stands in records."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


def new_response_id(prefix: Literal["chatcmpl", "cmpl"] = "chatcmpl") -> str:
    """An id that cannot be guessed and says when its request came in, so that `find` reads few files."""
    return f"{prefix}-{_milliseconds():011x}{secrets.token_hex(10)}"


def is_response_id(text: str) -> bool:
    """Whether it could be one that `new_response_id` gave."""
    return bool(_ID.match(text))


def new_writer(name: str) -> str:
    """The name under which one process writes; it begins with the time of its start."""
    return f"{_milliseconds():011x}-{re.sub('[^0-9a-z]', '', name.lower())}{secrets.token_hex(3)}"


class TrafficLog:
    """Appends records durably; safe to call from many threads.

    Args:
        writer: From `new_writer`; no two processes may share it.
    """

    def __init__(self, storage: Storage, writer: str) -> None:
        self._files = {kind: _Segments(storage, folder, writer) for kind, folder in _FOLDERS.items()}

    def append(self, record: Exchange | Feedback) -> None:
        """Log a record; returns when it would survive a kill -9 and, on a local root, a power cut.

        Raises:
            StorageError: It could not be written; it must not be acknowledged.
        """
        kind = "exchange" if isinstance(record, Exchange) else "feedback"
        line = json.dumps({"kind": kind, **dataclasses.asdict(record)}, ensure_ascii=True, allow_nan=False)
        self._files[type(record)].append(line.encode() + b"\n")


class _Batch:
    """Lines that go to disk together."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self.done = threading.Event()
        # Taken back once they are there, so that whatever cuts the writing short acknowledges nothing.
        self.error: StorageError | None = StorageError("the traffic log's writer failed", "see the replica's log")


class _Segments:
    """One writer's files of one kind. The thread that finds nobody writing writes for all who wait."""

    def __init__(self, storage: Storage, folder: str, writer: str) -> None:
        self._storage, self._folder, self._writer = storage, folder, writer
        self._number = -1
        self._file: Any = None
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._batch = _Batch()

    def append(self, line: bytes) -> None:
        with self._lock:
            batch = self._batch
            batch.lines.append(line)
        with self._writing:
            if not batch.done.is_set():
                with self._lock:
                    self._batch = _Batch()
                self._commit(batch)
        if batch.error:
            raise batch.error

    def _commit(self, batch: _Batch) -> None:
        try:
            content = b"".join(batch.lines)
            if self._storage.is_local:
                self._write_local(content)
            else:
                self._storage.write(content, "traffic", self._folder, self._next_name())
            batch.error = None
        except OSError as error:
            self._file = None  # what it holds now is unknown: go on in a new one
            batch.error = StorageError(f"cannot log traffic below {self._storage.root_uri} ({error})")
        except StorageError as error:
            batch.error = error
        finally:
            batch.done.set()

    def _write_local(self, content: bytes) -> None:
        if self._file is None or self._file.tell() >= SEGMENT_BYTES:
            path = self._storage.path("traffic", self._folder, self._next_name())
            os.makedirs(os.path.dirname(path), exist_ok=True)
            self._file = open(path, "xb", buffering=0)  # noqa: SIM115 - stays open for the next record
            sync_folder(os.path.dirname(path))
        written = self._file.write(content)
        if written != len(content):
            raise OSError(f"wrote {written} of {len(content)} bytes")
        os.fsync(self._file.fileno())

    def _next_name(self) -> str:
        self._number += 1
        return f"{self._writer}-{self._number:06d}.jsonl"


def read_exchanges(storage: Storage, since: datetime.datetime | None = None) -> Iterator[Exchange]:
    """Every logged exchange whose request came in at `since` or later, file by file."""
    for record in _read(storage, Exchange, since):
        assert isinstance(record, Exchange)
        yield record


def read_feedback(storage: Storage, since: datetime.datetime | None = None) -> Iterator[Feedback]:
    """Every feedback received at `since` or later, file by file."""
    for record in _read(storage, Feedback, since):
        assert isinstance(record, Feedback)
        yield record


def size_bytes(storage: Storage) -> int:
    """Of the log's files.

    Raises:
        StorageError: The log cannot be listed.
    """
    found = (info for folder in _FOLDERS.values() for info in _listed(storage, folder))
    return sum(info.size for info in found if _SEGMENT.match(info.base_name))


def _listed(storage: Storage, folder: str) -> list[fs.FileInfo]:
    selector = fs.FileSelector(storage.path("traffic", folder), allow_not_found=True)
    try:
        return list(storage.filesystem.get_file_info(selector))
    except OSError as error:
        raise StorageError(f"cannot list {storage.uri('traffic', folder)} ({error})") from error


def _asked_s(response_id: str) -> float:
    match = _ID.match(response_id)
    assert match
    return int(match[1], 16) / 1000


def find_exchange(storage: Storage, response_id: str) -> Exchange | None:
    """The exchange with an id. The id says when the request came in, so only files of about then are read."""
    if not is_response_id(response_id):
        return None
    asked_s = _asked_s(response_id)
    exchanges = _matching(storage, Exchange, response_id, asked_s, asked_s + LATEST_ANSWER_S)
    return next((record for record in exchanges if isinstance(record, Exchange)), None)


def find(storage: Storage, response_id: str) -> tuple[Exchange | None, list[Feedback]]:
    """The exchange with an id and all feedback on it, oldest first.

    The id says when the request came in, so only files that were written to about then are read.
    """
    if not is_response_id(response_id):
        return None, []
    exchange = find_exchange(storage, response_id)
    feedback = _matching(storage, Feedback, response_id, _asked_s(response_id), None)
    return exchange, sorted(
        (record for record in feedback if isinstance(record, Feedback)), key=lambda record: record.received_at
    )


def _read(
    storage: Storage, kind: type[Exchange] | type[Feedback], since: datetime.datetime | None
) -> Iterator[Exchange | Feedback]:
    since_s = since.timestamp() if since else 0.0
    for name in _files_between(storage, _FOLDERS[kind], since_s, None):
        for line in _lines(storage, _FOLDERS[kind], name):
            record = _parse(line)
            if record and datetime.datetime.fromisoformat(record.received_at).timestamp() >= since_s:
                yield record


def _matching(
    storage: Storage, kind: type[Exchange] | type[Feedback], response_id: str, from_s: float, to_s: float | None
) -> Iterator[Exchange | Feedback]:
    wanted = response_id.encode()
    for name in _files_between(storage, _FOLDERS[kind], from_s, to_s):
        for line in _lines(storage, _FOLDERS[kind], name):
            if wanted in line and (record := _parse(line)) and record.response_id == response_id:
                yield record


def _files_between(storage: Storage, folder: str, from_s: float, to_s: float | None) -> list[str]:
    """The files that were written to between two times, oldest writer first."""
    found: list[str] = []
    begun: dict[str, float] = {}
    for info in sorted(_listed(storage, folder), key=lambda info: info.base_name):
        match = _SEGMENT.match(info.base_name)
        if not match:
            continue
        # A file was begun when the writer's one before it was last written to, the first one when it started.
        begun_s = begun.get(match[1], int(match[1].split("-")[0], 16) / 1000)
        ended_s = begun[match[1]] = info.mtime_ns / 1e9
        if ended_s >= from_s - CLOCK_SKEW_S and (to_s is None or begun_s <= to_s + CLOCK_SKEW_S):
            found.append(info.base_name)
    return found


def _lines(storage: Storage, folder: str, name: str) -> list[bytes]:
    """The whole lines of a file; one that a kill cut off is left out."""
    return storage.read("traffic", folder, name).split(b"\n")[:-1]


def _parse(line: bytes) -> Exchange | Feedback | None:
    try:
        values = json.loads(line)
        record = _KINDS[values.pop("kind")](**values)
        datetime.datetime.fromisoformat(record.received_at)
        return record
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        logger.warning("skipped a damaged line of %d bytes in the traffic log", len(line))
        return None


def _milliseconds() -> int:
    return int(datetime.datetime.now(datetime.UTC).timestamp() * 1000)
