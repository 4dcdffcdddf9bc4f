import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from app.serving.conversations import Turn
from app.serving.response import ResponseManagement, concluded
from app.serving.schema import Conclusion, Draft, FeedbackRequest, Insight, Intent, Refused
from app.settings.serving import HandoverConfig, ServingConfig
from app.storage import Storage
from app.traffic import Feedback, new_response_id, new_writer, read_exchanges

SETTINGS = HandoverConfig(
    intents=("human_handover",),
    min_intent_confidence=0.3,
    min_reply_confidence=0.5,
    min_sentiment=-0.8,
    message="A colleague comes.",
)
DRAFT = Draft(
    response_id="r", received_at="t", variant="v", model_version="m/1", model_uri="u", messages=(), reply="Sure.",
    insight=Insight(Intent("refund_request", 0.9)), status="ok", finish_reason="stop", prompt_tokens=1,
    completion_tokens=1, confidence=0.9, time_to_first_token_s=0.1, end_to_end_s=0.2, stream=False, user_hash=None,
)  # fmt: skip
GIVEN = replace(DRAFT, received_at="2026-11-26T12:00:00+00:00")
TOLD = "\n\nA colleague comes."


@pytest.mark.parametrize(
    ("draft", "conclusion"),
    [
        (DRAFT, Conclusion("", None)),
        (replace(DRAFT, insight=Insight()), Conclusion("", None)),
        (replace(DRAFT, insight=Insight(Intent("human_handover", 0.9))), Conclusion("", "intent")),
        (replace(DRAFT, insight=Insight(Intent("refund_request", 0.2))), Conclusion("", "low_intent_confidence")),
        (replace(DRAFT, confidence=0.4), Conclusion(TOLD, "low_reply_confidence")),
        (replace(DRAFT, confidence=0.4, reply=""), Conclusion("A colleague comes.", "low_reply_confidence")),
        (replace(DRAFT, confidence=0.4, insight=Insight(Intent("human_handover", 0.9))), Conclusion("", "intent")),
        (replace(DRAFT, insight=Insight(None, -0.9)), Conclusion("", "sentiment")),
        (replace(DRAFT, insight=Insight(None, -0.7)), Conclusion("", None)),
        (replace(DRAFT, confidence=0.4, takes_text=False), Conclusion("", "low_reply_confidence")),
        (replace(DRAFT, confidence=0.4, endpoint="completions"), Conclusion("", None)),
        (replace(DRAFT, confidence=None, status="cancelled"), Conclusion("", None)),
    ],
)
def test_a_person_takes_over_when_asked_for_or_when_the_bot_is_unsure(draft: Draft, conclusion: Conclusion) -> None:
    assert concluded(draft, SETTINGS) == conclusion


def test_limits_of_zero_never_hand_over() -> None:
    never = SETTINGS.model_copy(update={"min_intent_confidence": 0.0, "min_reply_confidence": 0.0})
    draft = replace(DRAFT, insight=Insight(Intent("refund_request", 0.0)), confidence=0.0)
    assert concluded(draft, never) == Conclusion("", None)


def test_an_id_that_was_never_given_is_not_found_and_a_log_that_cannot_be_read_is_said_so(store: str) -> None:
    management = ResponseManagement(ServingConfig(storage_uri=store))
    asked = new_response_id()
    unknown = asyncio.run(management.why(asked))
    assert isinstance(unknown, Refused)
    assert (unknown.status, unknown.code) == (404, "response_not_found")
    # A folder where a file of the log should be: it is listed and cannot be read.
    Path(Storage(store).path("traffic", "exchanges", f"{new_writer('response')}-000000.jsonl")).mkdir(parents=True)
    unreadable = asyncio.run(management.why(asked))
    assert isinstance(unreadable, Refused)
    assert (unreadable.status, unreadable.code) == (503, "log_unavailable")
    refused = asyncio.run(management.feedback(FeedbackRequest(asked, 1, None, None)))
    assert isinstance(refused, Refused)
    assert (refused.status, refused.code) == (503, "log_unavailable")


def test_who_was_overtaken_in_a_conversation_is_logged_and_can_be_judged(store: str) -> None:
    management = ResponseManagement(ServingConfig(storage_uri=store))
    turn = Turn("web", "c1", 0, ({"role": "user", "content": "hello"},))
    first, second = new_response_id(), new_response_id()
    message = {"role": "assistant", "content": "Sure."}

    async def both() -> list[Conclusion | Refused]:
        return [
            await management.conclude(replace(GIVEN, response_id=each, turn=turn, message=message))
            for each in (first, second)
        ]

    concluded_, refused = asyncio.run(both())
    assert isinstance(concluded_, Conclusion)
    assert isinstance(refused, Refused)
    assert (refused.status, refused.code) == (409, "conversation_went_on")
    logged = {exchange.response_id: exchange.status for exchange in read_exchanges(Storage(store))}
    assert logged == {first: "ok", second: "error"}
    assert isinstance(asyncio.run(management.feedback(FeedbackRequest(second, -1, None, None))), Feedback)


def test_no_field_that_a_client_writes_is_logged_with_personal_data(store: str) -> None:
    management = ResponseManagement(ServingConfig(storage_uri=store))
    asked, mail = new_response_id(), "jane.doe@example.com"
    messages = ({"role": "user", "content": f"i am {mail}"},)
    draft = replace(GIVEN, response_id=asked, messages=messages, reply=f"Hello {mail}", metadata={mail: f"of {mail}"})
    assert isinstance(asyncio.run(management.conclude(draft)), Conclusion)
    judged = FeedbackRequest(asked, 1, f"{mail} wants a refund", f"call {mail}")
    assert isinstance(asyncio.run(management.feedback(judged)), Feedback)
    written = b"".join(file.read_bytes() for file in Path(Storage(store).path("traffic")).rglob("*.jsonl"))
    assert written.count(b"response_id") == 2
    assert mail.encode() not in written
