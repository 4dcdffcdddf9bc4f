"""The response management deployment: hand-over to a person when unsure, and the durable log."""

import asyncio
import json
import logging
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

from app import traffic
from app.errors import ResponseNotFound, StorageError
from app.privacy import Detector, Mask
from app.serving.conversations import Conversations, Remembered, WentOn
from app.serving.handovers import Handovers, NotWaiting
from app.serving.schema import Conclusion, Draft, FeedbackRequest, Refused
from app.settings.serving import HandoverConfig, ServingConfig
from app.storage import Storage
from app.telemetry import FEEDBACK, HANDOVERS, counter, set_up_logging
from app.traffic import Exchange, Feedback
from app.why import why

logger = logging.getLogger(__name__)


SWEEP_S = 3_600.0
"""How often old conversations are looked for."""


class ResponseManagement:
    """Decides what the customer finally reads, and logs it before it is acknowledged."""

    def __init__(self, config: ServingConfig) -> None:
        set_up_logging(deployment="response")
        self._start = self._config = config
        self._detector = Detector.of(config.privacy.detector)
        self._storage = Storage(config.storage_uri)
        self._log = traffic.TrafficLog(self._storage, traffic.new_writer("response"))
        self._conversations = Conversations(self._storage, config.conversation_ttl_s)
        self._swept_s = -SWEEP_S
        self._sweeping: asyncio.Task[int] | None = None
        self._queue = Handovers(self._storage)
        self._handovers, self._feedback = counter(HANDOVERS), counter(FEEDBACK)

    def reconfigure(self, live: dict[str, Any]) -> None:
        """Called by Serve at the start, and when settings change that need no new replica."""
        self._config = self._start.with_live(live)
        self._detector = Detector.of(self._config.privacy.detector)

    async def conversation(self, owner: str, conversation_id: str) -> Remembered | Refused:
        """What has been said in a conversation so far."""
        try:
            return await asyncio.to_thread(self._conversations.remembered, owner, conversation_id)
        except StorageError as error:
            logger.error("conversations cannot be read: %s", error)
            return Refused(503, "the service cannot remember conversations at the moment", "log_unavailable")

    async def conclude(self, draft: Draft) -> Conclusion | Refused:
        """Settle an answer. It is on disk when this returns a Conclusion."""
        conclusion = concluded(draft, self._config.handover)
        try:
            await asyncio.to_thread(self._record, draft, conclusion)
        except StorageError as error:
            return _unlogged(error)
        except WentOn:
            what = "another request went on with this conversation meanwhile; send the message again"
            return Refused(409, what, "conversation_went_on", "conversation_id")
        if conclusion.handover:
            self._handovers.inc(tags={"reason": conclusion.handover})
        if draft.turn and time.monotonic() - self._swept_s > SWEEP_S:
            self._swept_s = time.monotonic()
            self._sweeping = asyncio.create_task(asyncio.to_thread(self._conversations.forget_old))
        return conclusion

    def _record(self, draft: Draft, conclusion: Conclusion) -> None:
        exchange = _exchange(draft, conclusion)
        if self._config.privacy.mask_log:
            exchange = masked(exchange, self._detector)
        turn = draft.turn if draft.status == "ok" and draft.rule is None and _is_whole(draft.message) else None
        nobody: AbstractContextManager[Remembered | None] = nullcontext()
        try:
            with self._conversations.going_on(turn) if turn else nobody as said:
                self._log.append(exchange)
                if conclusion.handover and draft.status == "ok":
                    self._queue.add(exchange.response_id, _for_a_person(exchange))
                if turn and said:
                    reply = draft.message
                    if not reply.get("tool_calls"):
                        reply = {**reply, "content": reply["content"] + conclusion.added}
                    self._conversations.add(turn, said, reply)
        except WentOn:  # who read it as a stream has read it
            self._log.append(replace(exchange, status="error"))
            raise

    async def waiting(self, limit: int) -> list[dict[str, Any]] | Refused:
        """Answers that wait for a person, oldest first."""
        try:
            return await asyncio.to_thread(self._queue.waiting, limit)
        except StorageError as error:
            return _unlogged(error)

    async def take(self, response_id: str, agent: str) -> dict[str, Any] | Refused:
        """Take an answer over."""
        if not traffic.is_response_id(response_id):
            return _unknown(response_id, None)
        try:
            return await asyncio.to_thread(self._queue.take, response_id, agent)
        except NotWaiting as error:
            if error.taken:
                return Refused(409, f"{response_id} was taken by somebody else", "already_taken")
            return _unknown(response_id, None)
        except StorageError as error:
            return _unlogged(error)

    async def feedback(self, request: FeedbackRequest) -> Feedback | Refused:
        """Log a judgement of an answer that was given. It is on disk when this returns a Feedback."""
        try:
            exchange = await asyncio.to_thread(traffic.find_exchange, self._storage, request.response_id)
            if exchange is None:
                return _unknown(request.response_id, "response_id")
            intent, comment = request.intent, request.comment
            if self._config.privacy.mask_log:
                mask = Mask(self._detector, [text for text in (intent, comment) if text])
                intent, comment = (text and mask.text(text) for text in (intent, comment))
            feedback = Feedback(request.response_id, traffic.now(), request.rating, intent, comment)
            await asyncio.to_thread(self._log.append, feedback)
        except StorageError as error:
            return _unlogged(error)
        self._feedback.inc(tags={"variant": exchange.variant, "rating": str(request.rating)})
        return feedback

    async def why(self, response_id: str) -> dict[str, Any] | Refused:
        """The chain behind an answer, see app/why.py."""
        try:
            return await asyncio.to_thread(why, self._storage, response_id)
        except ResponseNotFound:
            return _unknown(response_id, None)
        except StorageError as error:
            logger.error("the traffic log cannot be read: %s", error)
            return Refused(503, "the traffic log cannot be read at the moment; try again", "log_unavailable")


def concluded(draft: Draft, settings: HandoverConfig) -> Conclusion:
    """Whether a person takes over and why, and what the customer then reads after the reply.

    The reasons, first match: `intent`, the customer asked for what only people do; `low_intent_confidence`, the
    question is unclear; `sentiment`, the customer is angry; `low_reply_confidence`, the model is unsure of its words,
    and the customer is told where words may follow. A plain completion is nobody's conversation, and
    what a rule refuses nobody takes over.
    """
    if draft.endpoint != "chat" or draft.rule:
        return Conclusion("", None)
    intent, sentiment = draft.insight.intent, draft.insight.sentiment
    if intent and intent.label in settings.intents:
        return Conclusion("", "intent")
    if intent and intent.confidence < settings.min_intent_confidence:
        return Conclusion("", "low_intent_confidence")
    if sentiment is not None and sentiment < settings.min_sentiment:
        return Conclusion("", "sentiment")
    if draft.status == "ok" and draft.confidence is not None and draft.confidence < settings.min_reply_confidence:
        told = f"\n\n{settings.message}" if draft.reply else settings.message
        return Conclusion(told if draft.takes_text else "", "low_reply_confidence")
    return Conclusion("", None)


def masked(exchange: Exchange, detector: Detector) -> Exchange:
    """An exchange without the personal data that the detector finds, a value having one placeholder wherever it is."""
    texts = [message["content"] for message in exchange.messages]
    mask = Mask(detector, [*texts, exchange.reply, *exchange.other_replies])
    return replace(
        exchange,
        messages=[
            {**message, "content": mask.text(text)} for message, text in zip(exchange.messages, texts, strict=True)
        ],
        reply=mask.text(exchange.reply),
        other_replies=[mask.text(reply) for reply in exchange.other_replies],
        metadata={mask.text(name): mask.text(value) for name, value in exchange.metadata.items()},
    )


def _is_whole(message: dict[str, Any]) -> bool:
    """Whether a conversation can go on after it: not after a call that was cut off."""
    try:
        for call in message.get("tool_calls", ()):
            json.loads(call["function"]["arguments"])
    except ValueError:
        return False
    return True


def _for_a_person(exchange: Exchange) -> dict[str, Any]:
    """What the queue tells of an answer."""
    return {
        "received_at": exchange.received_at,
        "reason": exchange.handover,
        "intent": exchange.intent,
        "sentiment": exchange.sentiment,
        "variant": exchange.variant,
        "messages": exchange.messages,
        "reply": exchange.reply,
    }


def _exchange(draft: Draft, conclusion: Conclusion) -> Exchange:
    intent = draft.insight.intent
    return Exchange(
        response_id=draft.response_id,
        received_at=draft.received_at,
        variant=draft.variant,
        model_version=draft.model_version,
        messages=list(draft.messages),
        reply=draft.reply + conclusion.added,
        intent=intent.label if intent else None,
        intent_confidence=intent.confidence if intent else None,
        sentiment=draft.insight.sentiment,
        rule=draft.rule,
        handover=conclusion.handover,
        finish_reason=draft.finish_reason,
        prompt_tokens=draft.prompt_tokens,
        completion_tokens=draft.completion_tokens,
        time_to_first_token_s=draft.time_to_first_token_s,
        end_to_end_s=draft.end_to_end_s,
        stream=draft.stream,
        user_hash=draft.user_hash,
        status=draft.status,
        model_uri=draft.model_uri,
        reply_confidence=draft.confidence,
        metadata=draft.metadata,
        endpoint=draft.endpoint,
        other_replies=[reply + conclusion.added for reply in draft.other_replies],
        tools=list(draft.tools),
    )


def _unknown(response_id: str, param: str | None) -> Refused:
    return Refused(404, f"there is no response {response_id!r}", "response_not_found", param)


def _unlogged(error: StorageError) -> Refused:
    logger.error("traffic is not being logged: %s", error)
    return Refused(503, "the service cannot log traffic at the moment, so it does not answer", "log_unavailable")
