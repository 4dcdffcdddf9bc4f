"""What a support desk needs of the application: conversations, rules, personal data, hand-over, settings at run time.

One more application beside the suite's, with rules and a second variant.
"""

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml

from app import deployment, traffic
from app.storage import Storage
from tests.answering_model import ANSWERS, CANCEL, CANCEL_ORDER, CANCELLED, CONFIRMED, UNSURE
from tests.conftest import ROOT, RunningCluster, Service
from tests.integration.test_serve import asked, eventually, rayloop

CARD = "4111 1111 1111 1111"
RULES = [
    {"name": "weapons", "patterns": [r"\bbombs?\b"], "message": "I cannot help with that."},
    {"name": "off_topic", "intents": ["smalltalk"], "message": "I can help with orders and refunds."},
]


@dataclasses.dataclass(frozen=True)
class Desk:
    """The application."""

    service: Service
    settings: dict[str, Any]

    def configured(self, **changes: Any) -> dict[str, Any]:
        """Deploy it anew with other settings, as `jobs.serve` does; returns the job's last line, and all of them."""
        config = self.service.config.with_name("desk.yaml")
        content = yaml.safe_load(self.service.config.read_text())
        config.write_text(yaml.safe_dump({**content, "serving": {**self.settings, **changes}}))
        command = [sys.executable, "-m", "jobs.serve", "--config", str(config)]
        run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
        assert run.returncode == 0, run.stdout + run.stderr
        return dict(json.loads(run.stdout.splitlines()[-1]), printed=run.stdout.splitlines())


@pytest.fixture(scope="module")
def desk(service: Service, cluster: RunningCluster, model_folder: Path) -> Iterator[Desk]:
    settings = yaml.safe_load(service.config.read_text())["serving"]
    desk = Desk(service, {**settings, "rules": RULES})
    desk.configured()
    yield desk
    desk.configured(rules=[])


@pytest.fixture(scope="module")
def client(desk: Desk) -> Iterator[openai.OpenAI]:
    url = f"{desk.service.url}/v1"
    with openai.OpenAI(base_url=url, api_key=desk.service.api_key, max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def http(desk: Desk) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {desk.service.api_key}"}
    with httpx.Client(base_url=desk.service.url, headers=headers, timeout=60) as client:
        yield client


def say(client: openai.OpenAI, conversation_id: str, *messages: Any, **options: Any) -> Any:
    return client.chat.completions.create(
        model="support", messages=list(messages), extra_body={"conversation_id": conversation_id}, **options
    )


def test_a_follow_up_needs_only_the_new_message(client: openai.OpenAI) -> None:
    first = say(client, "talk-1", *asked("thank you"))
    assert rayloop(first)["conversation_id"] == "talk-1"
    second = say(client, "talk-1", *asked("i want a refund"))
    said = [*asked("thank you"), {"role": "assistant", "content": ANSWERS["thank you"]}]
    whole = client.chat.completions.create(model="support", messages=[*said, *asked("i want a refund")])
    assert second.usage.prompt_tokens == whole.usage.prompt_tokens
    assert second.choices[0].message.content == whole.choices[0].message.content
    assert say(client, "talk-2", *asked("thank you")).usage.prompt_tokens == first.usage.prompt_tokens


def test_a_conversation_with_calls_goes_on_with_the_result_alone(client: openai.OpenAI) -> None:
    first = say(client, "calls", *asked(CANCEL), tools=[CANCEL_ORDER])
    (call,) = first.choices[0].message.tool_calls
    result = {"role": "tool", "tool_call_id": call.id, "content": CANCELLED}
    second = say(client, "calls", result, tools=[CANCEL_ORDER])
    assert second.choices[0].message.content == CONFIRMED


def test_a_long_conversation_loses_its_oldest_turns_and_says_so(client: openai.OpenAI) -> None:
    dropped = 0
    for _ in range(12):
        answer = say(client, "long", *asked("where is my order 4512? " + "please " * 12), max_tokens=60)
        assert answer.usage.prompt_tokens + 60 <= 512
        dropped = rayloop(answer)["dropped_messages"]
    assert dropped >= 2
    assert dropped % 2 == 0, "whole turns"
    with pytest.raises(openai.BadRequestError) as caught:
        say(client, "too-long", *asked("word " * 2_000))
    assert caught.value.code == "context_length_exceeded"


def test_rules_refuse_politely_and_the_model_is_not_asked(client: openai.OpenAI, desk: Desk) -> None:
    for question, rule in (("how do i build a BOMB?", "weapons"), (UNSURE, "off_topic")):
        answer = client.chat.completions.create(model="support", messages=asked(question))
        (choice,) = answer.choices
        wanted = next(one["message"] for one in RULES if one["name"] == rule)
        assert (choice.message.content, choice.finish_reason) == (wanted, "content_filter")
        assert (rayloop(answer)["rule"], rayloop(answer)["handover"]) == (rule, False)
        assert answer.usage
        assert answer.usage.total_tokens == 0
        exchange, _ = traffic.find(Storage(desk.service.store), answer.id)
        assert exchange
        assert (exchange.rule, exchange.is_conversation) == (rule, False)
    chunks = list(client.chat.completions.create(model="support", messages=asked("a bomb"), stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "I cannot help with that."
    fine = client.chat.completions.create(model="support", messages=asked("thank you"))
    assert fine.choices[0].message.content == ANSWERS["thank you"]


def test_personal_data_is_masked_in_the_log_and_the_queue(
    client: openai.OpenAI, http: httpx.Client, desk: Desk
) -> None:
    text = f"can i talk to a person? my card is {CARD}, write to anna@example.org"
    answer = client.chat.completions.create(
        model="support", messages=asked(text), metadata={"contact": "b@example.org"}
    )
    http.post("/v1/feedback", json={"response_id": answer.id, "rating": 1, "comment": f"{CARD} was charged"})
    exchange, feedback = traffic.find(Storage(desk.service.store), answer.id)
    assert exchange
    assert exchange.messages[0]["content"] == "can i talk to a person? my card is [CARD_1], write to [EMAIL_1]"
    assert exchange.metadata == {"contact": "[EMAIL_2]"}
    assert [given.comment for given in feedback] == ["[CARD_1] was charged"]
    stored = b"".join(
        file.read_bytes()
        for file in Path(desk.service.store).rglob("*")
        if file.is_file() and "conversations" not in file.parts
    )
    assert CARD.encode() not in stored
    assert b"anna@example.org" not in stored


def test_what_a_person_takes_over_waits_in_a_queue(client: openai.OpenAI, http: httpx.Client) -> None:
    answer = client.chat.completions.create(model="support", messages=asked("can i talk to a person?"))
    waiting = http.get("/v1/handovers", params={"limit": 100}).json()["data"]
    (mine,) = [one for one in waiting if one["response_id"] == answer.id]
    assert (mine["reason"], mine["intent"]) == ("intent", "human_handover")
    assert mine["messages"][-1]["content"] == "can i talk to a person?"
    taken = http.post(f"/v1/handovers/{answer.id}/take", json={"agent": "anna"})
    assert (taken.status_code, taken.json()["taken_by"]) == (200, "anna")
    again = http.post(f"/v1/handovers/{answer.id}/take", json={"agent": "bob"})
    assert (again.status_code, again.json()["error"]["code"]) == (409, "already_taken")
    for unknown in ("chatcmpl-" + "0" * 31, "..%2F..%2Fserving%2Fapi_keys", "x"):
        assert http.post(f"/v1/handovers/{unknown}/take", json={"agent": "bob"}).status_code == 404
    left = http.get("/v1/handovers", params={"limit": 100}).json()["data"]
    assert answer.id not in [one["response_id"] for one in left]
    for limit in ("0", "101", "x"):
        assert http.get("/v1/handovers", params={"limit": limit}).status_code == 400


def test_a_fallback_answers_while_a_variant_starts_from_zero(
    client: openai.OpenAI, http: httpx.Client, desk: Desk
) -> None:
    champion, _ = desk.settings["variants"]
    small = {**champion, "name": "student", "version": "4", "weight": 0.0}
    sleeping = {**champion, "fallback": "student", "size": {"replicas": [0, 1], "cpus": 0.2, "downscale_delay_s": 1.0}}
    desk.configured(variants=[sleeping, small], fallback_after_s=0.5)

    def replicas() -> int:
        return len([one for one in deployment.replicas("support") if one["deployment"] == "LanguageModel-1"])

    eventually(lambda: replicas() == 0, within_s=60)
    assert http.get("/ready").status_code == 200, "a variant that may sleep is not waited for"

    def ask() -> tuple[str, str, float]:
        begun_s = time.monotonic()
        response = http.post("/v1/chat/completions", json={"model": "support", "messages": asked("thank you")})
        told = response.json()
        assert told["choices"][0]["message"]["content"] == ANSWERS["thank you"]
        return response.headers["x-rayloop-variant"], told["model"], time.monotonic() - begun_s

    assert ask()[:2] == ("student", "support/4")
    eventually(lambda: ask()[:2] == ("champion", "support/3"), within_s=120)
    desk.configured()


@pytest.mark.slow
def test_a_conversation_stays_with_the_replica_that_has_read_it(client: openai.OpenAI, desk: Desk) -> None:
    def follow_ups(begin: str) -> list[int]:
        """Tokens that second turns found read, of conversations that begin differently."""
        found = []
        for talk in range(8):
            first = asked(f"{begin} {talk} " + "please " * 30)
            said = client.chat.completions.create(model="support", messages=first, max_tokens=4).choices[0].message
            messages = [*first, {"role": "assistant", "content": said.content or "-"}, *asked("thank you")]
            for _ in range(2):
                usage = client.chat.completions.create(model="support", messages=messages, max_tokens=4).usage
            assert usage
            assert usage.prompt_tokens_details
            found.append(usage.prompt_tokens_details.cached_tokens or 0)
        return found

    two = {"replicas": 2, "cpus": 0.2}
    desk.configured(routing="prefix", language_model=two, rules=[])
    assert min(follow_ups("one")) >= 64
    desk.configured()


def pids() -> set[int]:
    return {replica["pid"] for replica in deployment.replicas("support") if replica.get("pid")}


def test_settings_change_without_a_new_replica(client: openai.OpenAI, desk: Desk) -> None:
    before = pids()
    ended = desk.configured(system_prompt="Be kind.", handover={"min_reply_confidence": 0.0}, max_choices=2)
    told = {line for line in ended["printed"] if line.startswith("changes ")}
    assert told == {
        "changes serving.max_choices: 8 -> 2", 'changes serving.system_prompt: "" -> "Be kind."',
        "changes serving.handover.min_reply_confidence: 0.95 -> 0.0",
    }  # fmt: skip

    def changed() -> bool:
        try:
            client.chat.completions.create(model="support", messages=asked("thank you"), n=3)
        except openai.BadRequestError as error:
            return error.param == "n"
        return False

    eventually(changed, within_s=20)
    assert pids() == before
    with pytest.raises(openai.BadRequestError, match="system text of its own") as caught:
        client.chat.completions.create(
            model="support", messages=[{"role": "system", "content": "You are a pirate."}, *asked("hi")]
        )
    assert caught.value.param == "messages[0].role"
    desk.configured()
    eventually(lambda: not changed(), within_s=20)
    assert pids() == before
