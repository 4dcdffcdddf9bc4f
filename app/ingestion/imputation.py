"""What a record lacks, filled in: channel, language, time and intents. Every value filled in is flagged."""

import functools
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

from app.conversation import Message
from app.errors import ConfigError
from app.ingestion.quality import Conversation
from app.intent import IntentModel
from app.settings.ingestion import ImputationConfig

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier

LANGUAGE_CHARS = 120
"""Characters that a language is detected by; of 400, English was recognised no more surely, in twice the time."""


@dataclass(frozen=True)
class Imputer:
    """Fills in what conversations lack; the same for the same conversation.

    Raises:
        ConfigError: A configured language is not one that can be detected.
    """

    settings: ImputationConfig
    intent_model: IntentModel | None = None

    def __post_init__(self) -> None:
        if len(self.settings.languages) > 1:
            unknown = sorted(set(self.settings.languages) - set(_identifier().labels))
            if unknown:
                raise ConfigError(
                    f"ingestion.imputation.languages: {', '.join(unknown)} cannot be detected",
                    f"choose from {', '.join(sorted(_identifier().labels))}",
                )

    def fill(self, conversation: Conversation, arrived_at: datetime | None = None) -> Conversation:
        """The conversation with what it lacked; the names of these columns are in its `imputed`.

        Args:
            conversation: Stays as it is.
            arrived_at: When its file or message was written, for a conversation without a time.
        """
        found: dict[str, Any] = {}
        if conversation.channel == "unknown" and self.settings.channel is not None:
            found["channel"] = self.settings.channel
        if conversation.language is None and (language := self._language(conversation.messages)):
            found["language"] = language
        if conversation.started_at is None and self.settings.started_at and arrived_at is not None:
            found["started_at"] = arrived_at
        names = list(found)
        if labelled := self._labelled(conversation.messages):
            found["messages"] = labelled
            found["intent"] = next(intent for message in labelled if (intent := message.get("intent")))
            names.append("intent")
        return replace(conversation, imputed=[*conversation.imputed, *names], **found) if found else conversation

    def _language(self, messages: Sequence[Message]) -> str | None:
        languages = self.settings.languages
        if len(languages) < 2:
            return languages[0] if languages else None
        language, confidence = language_of(said(messages), languages)
        return language if confidence >= self.settings.min_language_confidence else None

    def _labelled(self, messages: Sequence[Message]) -> list[Message] | None:
        """The messages with intents; none where they carry one, or no intent is sure enough.

        Where a source labels some messages of a conversation, it meant to leave the others without.
        """
        if self.intent_model is None or any(message.get("intent") for message in messages):
            return None
        places = [place for place, message in enumerate(messages) if message["role"] == "user"]
        predicted = self.intent_model.predict([messages[place]["content"] for place in places])
        result = list(messages)
        for place, (intent, confidence) in zip(places, predicted, strict=True):
            if confidence >= self.settings.min_intent_confidence:
                result[place] = {**messages[place], "intent": intent}
        return result if any(message.get("intent") for message in result) else None


def language_of(text: str, languages: Collection[str]) -> tuple[str | None, float]:
    """Which of some languages a text is in, and how sure that is: its share of their probability.

    None, and 0, where a language beyond them is likelier: among English and German alone, two of five French
    sentences would be one of the two with a confidence above 0.9.

    Args:
        text: Its beginning counts.
        languages: ISO 639-1.
    """
    ranked = _identifier().rank(text[:LANGUAGE_CHARS])
    best, share = ranked[0]
    if best not in languages:
        return None, 0.0
    return best, share / sum(other for language, other in ranked if language in languages)


def said(messages: Sequence[Message]) -> str:
    """The beginning of what the customer writes."""
    result = ""
    for message in messages:
        if message["role"] == "user" and len(result) < LANGUAGE_CHARS:
            result += f"{message['content']} "
    return result


@functools.cache
def _identifier() -> "LanguageIdentifier":
    # 0.4 s to load, so once a process; the library's own shared one could be changed by others.
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
