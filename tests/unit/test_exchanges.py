"""The product's own traffic as a source, from a log that was written as serving writes it."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from app.config import Config
from app.ingestion.sources import mark_of, parts_of
from app.storage import Storage
from app.traffic import Exchange, Feedback, TrafficLog, new_writer
from tests.traffic_records import exchange, feedback


def said(*contents: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[number % 2], "content": content} for number, content in enumerate(contents)]


def logged(store: str, *records: Exchange | Feedback, writer: str = "w") -> None:
    log = TrafficLog(Storage(store), new_writer(writer))
    for record in records:
        log.append(record)


def config(store: str, settle_s: float = 0.0) -> Config:
    source = {"uri": "traffic:", "format": "traffic", "settle_s": settle_s}
    return Config().with_overrides({"storage.uri": store, "ingestion.sources": [source]})


def read(store: str, serving: str = "") -> list[dict[str, Any]]:
    found = config(store).with_overrides({"serving.storage_uri": serving})
    return [
        {**json.loads(raw), "position": position}
        for part in parts_of(found, {})
        for call, _ in part.reads(found.ingestion)
        for piece in call()
        for position, raw in zip(piece.positions, piece.raw, strict=True)
    ]


def texts(record: dict[str, Any]) -> list[str]:
    return [message["content"] for message in record["messages"]]


def turn(number: int, *contents: str, **changes: Any) -> Exchange:
    """An exchange whose last content is the reply."""
    return exchange(number, messages=said(*contents[:-1]), reply=contents[-1], **changes)


def test_of_a_conversation_only_its_last_exchange_is_taken(store: str) -> None:
    logged(
        store,
        turn(1, "hello", "hi"),
        turn(2, "other", "yes?"),
        turn(3, "hello", "hi", "where is it?", "on its way"),
        turn(4, "hello", "hi", "where is it?", "on its way", "thanks", "bye"),
    )
    other, last = read(store)
    assert texts(other) == ["other", "yes?"]
    assert texts(last) == ["hello", "hi", "where is it?", "on its way", "thanks", "bye"]
    assert (last["conversation_id"], last["position"]) == ("chatcmpl-w-1-4", 3)
    assert last["started_at"] == "2026-01-01T00:00:04+00:00"


def test_the_last_exchange_is_the_latest_whichever_replica_logged_it(store: str) -> None:
    logged(store, turn(2, "hello", "hi", "where is it?", "on its way"), writer="first")
    logged(store, turn(1, "hello", "hi"), writer="second")
    (last,) = read(store)
    assert len(last["messages"]) == 4


def test_answers_that_a_model_should_not_learn_from_are_left_out(store: str) -> None:
    logged(
        store,
        turn(1, "rated down", "x"),
        turn(2, "rated up", "x"),
        turn(3, "taken over", "x", handover="unsure"),
        turn(4, "failed", "x", status="error"),
        turn(5, "cancelled", "x", status="cancelled"),
        turn(6, "no answer", ""),
        turn(7, "rated down and then up", "x"),
        turn(8, "rated up and then down", "x"),
        turn(9, "not rated", "x"),
        feedback(1, rating=-1),
        feedback(2, rating=1),
        feedback(7, at=1, rating=-1),
        feedback(7, at=2, rating=1),
        feedback(8, at=4, rating=-1),
        feedback(8, at=3, rating=1),
    )
    assert [texts(record)[0] for record in read(store)] == ["rated up", "rated down and then up", "not rated"]


def test_a_conversation_whose_last_answer_was_rated_down_is_left_out_whole(store: str) -> None:
    logged(store, turn(1, "hello", "hi"), turn(2, "hello", "hi", "a", "b"), feedback(2, rating=-1))
    assert read(store) == []


def test_the_intent_that_feedback_names_is_the_last_questions_label(store: str) -> None:
    refund = turn(1, "hello", "hi", "money back", "done", intent="greeting")
    logged(store, refund, feedback(1, intent="refund"), turn(2, "and mine?", "no", intent="greeting"))
    labelled, plain = read(store)
    assert [message.get("intent") for message in labelled["messages"]] == [None, None, "refund", None]
    assert [message.get("intent") for message in plain["messages"]] == [None, None]


def test_the_log_is_read_again_when_it_has_grown_by_an_exchange_or_a_judgement(store: str) -> None:
    logged(store, turn(1, "hello", "hi"))
    marks = dict(mark for part in parts_of(config(store), {}) if (mark := mark_of(config(store), part)))
    assert parts_of(config(store), marks) == []
    logged(store, turn(2, "other", "hi", received_at=datetime.now(UTC).isoformat()), writer="later")
    assert parts_of(config(store, settle_s=600), marks) == [], "nothing more is to be read"
    assert len(parts_of(config(store), marks)) == 1
    logged(store, feedback(1, intent="refund"), writer="last")
    assert len(parts_of(config(store, settle_s=600), marks)) == 1


@pytest.mark.parametrize("records", [[], [feedback(1, rating=1)]])
def test_a_log_without_exchanges_holds_no_record(store: str, records: list[Feedback]) -> None:
    logged(store, *records)
    assert read(store) == []


def test_the_log_is_looked_for_where_serving_writes_it(store: str, tmp_path: Path) -> None:
    logged(str(tmp_path / "elsewhere"), turn(1, "hello", "hi"))
    assert read(store) == []
    assert len(read(store, serving=str(tmp_path / "elsewhere"))) == 1


def test_a_conversation_counts_once_it_has_been_silent_for_a_while(store: str) -> None:
    now = datetime.now(UTC)
    logged(
        store,
        turn(1, "hello", "hi", received_at=(now - timedelta(minutes=30)).isoformat()),
        turn(2, "where?", "there", received_at=(now - timedelta(minutes=30)).isoformat()),
        turn(3, "hello", "hi", "thanks", "bye", received_at=(now - timedelta(minutes=2)).isoformat()),
    )
    settings = config(store, settle_s=600)
    (part,) = parts_of(settings, {})
    [(call, _)] = part.reads(settings.ingestion)
    assert [texts(json.loads(raw)) for piece in call() for raw in piece.raw] == [["where?", "there"]]
    marks = dict(mark for part in parts_of(settings, {}) if (mark := mark_of(settings, part)))
    assert len(marks) == 1
    logged(store, turn(4, "later", "yes", received_at=now.isoformat()), writer="later")
    assert parts_of(settings, marks) == [], "nothing more is silent for long enough"
    assert len(parts_of(config(store, settle_s=60), marks)) == 1, "what waited would be lost"


def test_a_log_of_conversations_that_go_on_is_not_read_yet(store: str) -> None:
    logged(store, turn(1, "hello", "hi", received_at=datetime.now(UTC).isoformat()))
    assert parts_of(config(store, settle_s=600), {}) == []
