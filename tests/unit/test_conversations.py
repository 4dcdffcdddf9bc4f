"""What the service remembers of a conversation, and the queue of those that a person takes over."""

import json
import threading
import time
from pathlib import Path

import pytest

from app.errors import StorageError
from app.serving.conversations import MAX_BYTES, MAX_MESSAGES, Conversations, Remembered, Turn, WentOn
from app.serving.handovers import Handovers, NotWaiting
from app.storage import Storage
from app.traffic import new_response_id

HELLO = {"role": "user", "content": "hello"}
HI = {"role": "assistant", "content": "hi"}


def said(conversations: Conversations, turn: Turn) -> None:
    with conversations.going_on(turn) as before:
        conversations.add(turn, before, HI)


def test_a_conversation_is_what_was_said_in_it_and_belongs_to_its_owner(store: str) -> None:
    conversations = Conversations(Storage(store), 60)
    assert conversations.remembered("shop", "c1") == Remembered([], 0)
    said(conversations, Turn("shop", "c1", 0, (HELLO,)))
    said(conversations, Turn("shop", "c1", 1, (HELLO, HELLO)))
    assert Conversations(Storage(store), 60).remembered("shop", "c1").messages == [HELLO, HI, HELLO, HELLO, HI]
    assert conversations.remembered("other", "c1").messages == []
    assert conversations.remembered("shop", "c2").messages == []
    assert conversations.remembered("sho", "p c1").messages == []


def test_of_two_that_go_on_at_once_one_is_told_so_in_other_replicas_too(store: str) -> None:
    conversations = Conversations(Storage(store), 60)
    said(conversations, Turn("shop", "c1", 0, (HELLO,)))
    with pytest.raises(WentOn):
        said(conversations, Turn("shop", "c1", 0, (HELLO,)))
    assert len(conversations.remembered("shop", "c1").messages) == 2
    outcomes: list[bool] = []

    def go_on() -> None:
        try:
            said(Conversations(Storage(store), 60), Turn("shop", "c1", 1, (HELLO,)))
            outcomes.append(True)
        except WentOn:
            outcomes.append(False)

    threads = [threading.Thread(target=go_on) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == [False] * 7 + [True]


def test_of_a_long_conversation_the_system_text_and_the_last_whole_turns_are_kept(store: str) -> None:
    conversations = Conversations(Storage(store), 60)
    system = {"role": "system", "content": "Be kind."}
    said(conversations, Turn("shop", "c1", 0, (system, HELLO)))
    for place in range(80):
        said(conversations, Turn("shop", "c1", place + 1, ({"role": "user", "content": str(place)},)))
    kept = conversations.remembered("shop", "c1").messages
    assert len(kept) <= MAX_MESSAGES
    with pytest.raises(WentOn):  # though there are no more messages than before
        said(conversations, Turn("shop", "c1", 80, (HELLO,)))
    assert (kept[0], kept[1]["role"], kept[-2]["content"]) == (system, "user", "79")
    large = {"role": "user", "content": "x" * MAX_BYTES}
    said(conversations, Turn("shop", "c1", 81, (large,)))
    assert conversations.remembered("shop", "c1").messages == [system, large, HI]


def test_old_conversations_are_forgotten(store: str) -> None:
    conversations = Conversations(Storage(store), 0.2)
    said(conversations, Turn("shop", "c1", 0, (HELLO,)))
    assert conversations.forget_old() == 0
    time.sleep(0.3)
    assert conversations.remembered("shop", "c1") == Remembered([], 0)
    said(conversations, Turn("shop", "c2", 0, (HELLO,)))
    assert conversations.forget_old() == 1
    assert conversations.remembered("shop", "c2").messages == [HELLO, HI]


def test_one_that_was_begun_before_turns_were_counted_goes_on(store: str) -> None:
    conversations = Conversations(Storage(store), 60)
    said(conversations, Turn("shop", "c1", 0, (HELLO,)))
    (file,) = Path(Storage(store).path("serving", "conversations")).glob("*.json")
    file.write_text(json.dumps({"updated_at": time.time(), "messages": [HELLO, HI]}))
    said(conversations, Turn("shop", "c1", conversations.remembered("shop", "c1").turns, (HELLO,)))
    assert conversations.remembered("shop", "c1").messages == [HELLO, HI, HELLO, HI]


def test_a_damaged_conversation_is_said_so(store: str) -> None:
    conversations = Conversations(Storage(store), 60)
    said(conversations, Turn("shop", "c1", 0, (HELLO,)))
    (file,) = Path(Storage(store).path("serving", "conversations")).glob("*.json")
    file.write_bytes(file.read_bytes()[:10])
    with pytest.raises(StorageError, match="damaged"):
        conversations.remembered("shop", "c1")


def test_the_queue_is_in_the_order_of_the_questions_and_one_taker_gets_an_answer(store: str) -> None:
    queue = Handovers(Storage(store))
    ids = []
    for place in range(5):
        ids.append(new_response_id())
        queue.add(ids[-1], {"reason": "intent", "place": place})
        time.sleep(0.002)
    assert [told["place"] for told in queue.waiting(3)] == [0, 1, 2]
    got: list[str] = []
    late: list[bool] = []

    def take(agent: str) -> None:
        try:
            got.append(queue.take(ids[1], agent)["taken_by"])
        except NotWaiting as error:
            late.append(error.taken)

    threads = [threading.Thread(target=take, args=(str(agent),)) for agent in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(got), late) == (1, [True] * 7)
    assert [told["place"] for told in queue.waiting(10)] == [0, 2, 3, 4]
    with pytest.raises(NotWaiting) as caught:
        queue.take(new_response_id(), "anna")
    assert not caught.value.taken
