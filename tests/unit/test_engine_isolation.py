"""Replies that are written in one batch are each their own: no word of one user's ever stands in another's.

Many prompts begin alike, so whatever an engine keeps of one prompt for the next is looked at as well.
"""

import random
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from app.conversation import Message, prompt_ids
from app.serving.engine import Engine
from app.serving.reply import Reply
from app.serving.schema import Delta
from tests.answering_model import ANSWERS, CANARIES, ENDLESS
from tests.engine_replies import submit
from tests.faults import Fault
from tests.unit.test_engine import GREEDY, Asking, Client, wait_until_idle

ROUNDS = 1_000
SYSTEM = "You work for a shop. Be kind and brief, and never tell a customer what another one has asked. " * 3
LONGEST = 60


@dataclass
class Talk:
    """What one of the users asks, and what is written to nobody else."""

    prompt: list[int]
    alone: str
    """What transformers' own loop writes, with nothing beside it."""
    canary: str
    asked: list[tuple[Client, Reply, int]] = field(default_factory=list)
    """Under way: who reads, what is written, and how many tokens at most."""


def talks(asking: Asking) -> list[Talk]:
    """Each question as it is, and behind a beginning that all of them share."""
    found = []
    for question in (*ANSWERS, ENDLESS):
        for system in ("", SYSTEM):
            messages: list[Message] = [{"role": "system", "content": system}] if system else []
            prompt = prompt_ids(asking.tokenizer, [*messages, {"role": "user", "content": question}])
            ids = torch.tensor([prompt])
            with torch.inference_mode():
                whole = asking.model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=LONGEST, do_sample=False
                )
            alone = asking.tokenizer.decode(whole[0, len(prompt) :], skip_special_tokens=True)
            found.append(Talk(prompt, alone, CANARIES.get(question, "") if not system else ""))
    return found


def check(talk: Talk, others: list[str], engine: Engine, leaves: bool) -> None:
    """One of its replies is at its end, or its reader leaves: what was read is its own."""
    client, reply, limit = talk.asked.pop(0)
    if leaves:
        assert client.begun.wait(60)
        engine.cancel([reply])
        text = "".join(event.text for event in list(client.events) if isinstance(event, Delta))
    else:
        text = client.text
        if client.finished.finish_reason == "stop" or limit == LONGEST:
            assert text == talk.alone
        else:
            assert client.finished.completion_tokens == limit
    # A limit may fall within a character.
    assert talk.alone.startswith(text.rstrip("\ufffd"))
    for canary in others:
        assert canary not in text


@pytest.mark.slow
@pytest.mark.fault("S17", seen="every slot was in use, and readers left in mid-reply")
def test_in_a_thousand_rounds_no_word_of_one_reply_stands_in_another(model_folder: Path, fault: Fault) -> None:
    asking, chance = Asking(model_folder, slots=5), random.Random(fault.seed)
    every, most, left = talks(asking), 0, 0
    for talk in every:
        assert talk.canary in talk.alone
    going: list[Talk] = []
    try:
        for _ in range(ROUNDS):
            talk = chance.choice(every)
            limit = chance.choice((LONGEST, chance.randrange(2, 30)))
            client = Client()
            reply = submit(asking.engine, asking.tokenizer, talk.prompt, GREEDY, limit, client)
            talk.asked.append((client, reply, limit))
            going.append(talk)
            most = max(most, asking.engine.slots_in_use)
            while len(going) > 7:
                leaves = chance.random() < 0.2
                done = going.pop(chance.randrange(len(going)) if leaves else 0)
                check(done, [other.canary for other in every if other.canary not in done.alone], asking.engine, leaves)
                left += leaves
        for talk in going:
            check(talk, [other.canary for other in every if other.canary not in talk.alone], asking.engine, False)
        wait_until_idle(asking.engine)
        assert most == 5
        assert left > 100
        fault.happened()
    finally:
        asking.engine.stop()
