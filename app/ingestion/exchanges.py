"""The product's own traffic as a source: what customers wrote and the bot answered, judged by their feedback.

An exchange carries the whole conversation so far, so of a conversation only its last exchange is taken. Left out are
exchanges that did not end well, that a person took over, or that were rated down, those in which functions could be
called, and plain completions; where feedback names the intent,
that is the last question's label. A conversation counts once it has been silent for `settle_s`: before, it may go on
or be judged.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any

import orjson

from app import traffic
from app.conversation import normalised_hash
from app.ingestion.formats import Piece
from app.ingestion.parts import Read
from app.settings.ingestion import IngestionConfig, SourceConfig
from app.storage import Storage
from app.traffic import Exchange, Feedback
from app.versions import digest


@dataclass(frozen=True)
class TrafficPart:
    """All that has been logged and is settled."""

    uri: str
    source: int
    storage: Storage
    size_bytes: int
    """Of the log's files."""
    before_s: float
    """Conversations that were silent from then on, in seconds since 1970, count."""
    state: str
    """Another one once there is more to read."""

    @property
    def arrived_at(self) -> None:
        """Not known."""

    @property
    def mark(self) -> tuple[str, str]:
        """What was to be read."""
        return f"traffic:{self.uri}", self.state

    def reads(self, ingestion: IngestionConfig) -> Iterator[tuple[Read, int]]:
        """One task: a conversation's exchanges may lie in any of the files."""
        yield partial(read, self.storage, ingestion.batch_rows, self.before_s), self.size_bytes


def parts(source: SourceConfig, index: int, storage: Storage) -> list[TrafficPart]:
    """The log as a part; none while there is nothing to read.

    Raises:
        StorageError: It cannot be listed or read.
    """
    before_s = time.time() - source.settle_s
    state = [
        (exchange.response_id, feedback.received_at if feedback else None)
        for _, exchange, feedback in settled(storage, before_s)
    ]
    size_bytes = traffic.size_bytes(storage)
    return [TrafficPart(source.identity, index, storage, size_bytes, before_s, digest(state))] if state else []


def read(storage: Storage, batch_rows: int, before_s: float) -> Iterator[Piece]:
    """The last exchange of each conversation that is silent since `before_s` as a record; its position is its number
    in the log, from 0."""
    chosen = [(number, record(exchange, feedback)) for number, exchange, feedback in settled(storage, before_s)]
    for start in range(0, len(chosen), batch_rows):
        some = chosen[start : start + batch_rows]
        raw = [orjson.dumps(made) for _, made in some]
        yield Piece([number for number, _ in some], raw, None, identified=True)


def settled(storage: Storage, before_s: float) -> list[tuple[int, Exchange, Feedback | None]]:
    """The last exchanges, with their numbers and feedback, that a model should learn from and nothing has followed
    since `before_s`."""
    by_time = sorted(traffic.read_feedback(storage), key=lambda entry: entry.received_at)
    feedback = {entry.response_id: entry for entry in by_time}
    return [
        (number, exchange, feedback.get(exchange.response_id))
        for number, exchange in last_exchanges(storage)
        if datetime.fromisoformat(exchange.received_at).timestamp() <= before_s
        and wanted(exchange, feedback.get(exchange.response_id))
    ]


def last_exchanges(storage: Storage) -> list[tuple[int, Exchange]]:
    """Exchanges that no later one goes on from, with their numbers in the log."""
    open_ends: dict[str, tuple[int, Exchange]] = {}
    # Each replica logs into a file of its own, so only their times tell which came first.
    logged = sorted(enumerate(traffic.read_exchanges(storage)), key=lambda entry: entry[1].received_at)
    for number, exchange in logged:
        open_ends.pop(normalised_hash(exchange.messages[:-1]), None)
        reply = {"role": "assistant", "content": exchange.reply}
        open_ends[normalised_hash([*exchange.messages, reply])] = number, exchange  # type: ignore[list-item]
    return sorted(open_ends.values(), key=lambda entry: entry[0])


def wanted(exchange: Exchange, feedback: Feedback | None) -> bool:
    """Whether a model should learn from it."""
    rated_down = feedback is not None and feedback.rating is not None and feedback.rating < 0
    ended_well = exchange.status == "ok" and exchange.handover is None and bool(exchange.reply)
    return exchange.is_conversation and ended_well and not rated_down


def record(exchange: Exchange, feedback: Feedback | None) -> dict[str, Any]:
    """The exchange as a conversation record."""
    messages: list[dict[str, Any]] = [dict(message) for message in exchange.messages]
    if feedback is not None and feedback.intent and messages[-1]["role"] == "user":
        messages[-1]["intent"] = feedback.intent
    return {
        "conversation_id": exchange.response_id,
        "channel": "web",
        "started_at": exchange.received_at,
        "messages": [*messages, {"role": "assistant", "content": exchange.reply}],
    }
