import json
import pickle
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.errors import ConfigError
from app.ingestion.imputation import LANGUAGE_CHARS, Imputer, language_of, said
from app.ingestion.quality import Conversation
from app.ingestion.sample import lines
from app.intent import IntentModel, labelled
from app.settings.ingestion import ImputationConfig

LANGUAGES = ("en", "de", "fr", "es", "it", "nl", "pt")
SPOKEN = {
    "de": ["Wo ist meine Bestellung?", "Guten Tag, wann wird mein Paket geliefert?", "Ich kann mich nicht anmelden."],
    "fr": ["Je voudrais être remboursé, s'il vous plaît.", "Bonjour, quand mon colis sera-t-il livré ?"],
    "es": ["Quiero que me devuelvan el dinero, por favor.", "Buenos días, ¿cuándo llega mi paquete?"],
    "it": ["La lampada è arrivata rotta.", "Buongiorno, quando arriva il mio pacco?"],
    "nl": ["Ik wil graag mijn geld terug.", "Goedendag, wanneer wordt mijn pakket bezorgd?"],
    "pt": ["Quero o meu dinheiro de volta, por favor.", "Bom dia, quando chega o meu pacote?"],
    "en": ["I want my money back, please.", "Hello, when will my parcel be delivered?", "I cannot log in."],
}
ARRIVED = datetime(2025, 6, 1, 12, tzinfo=UTC)


def conversation(*texts: str, **known: Any) -> Conversation:
    roles = ("user", "assistant")
    fields: dict[str, Any] = {"channel": "web", "language": "en", "started_at": ARRIVED, "intent": None}
    messages = [{"role": roles[at % 2], "content": text, "intent": None} for at, text in enumerate(texts)]
    return Conversation(**({"conversation_id": "c", "messages": messages} | fields | known))


def imputer(model: IntentModel | None = None, **settings: Any) -> Imputer:
    return Imputer(ImputationConfig(**settings), model)


@pytest.fixture(scope="module")
def intents() -> IntentModel:
    texts, labels = labelled([json.loads(line)["messages"] for line in lines(3, 0, 1_500, 0.0)])
    return IntentModel.fit(texts, labels, seed=3)


@pytest.mark.parametrize(("language", "text"), [(name, text) for name, texts in SPOKEN.items() for text in texts])
def test_a_language_is_recognised_among_others(language: str, text: str) -> None:
    found, confidence = language_of(text, LANGUAGES)
    assert found == language
    assert 1 / len(LANGUAGES) < confidence <= 1 + 1e-6


@pytest.mark.parametrize("text", [*SPOKEN["fr"], *SPOKEN["es"], *SPOKEN["it"], *SPOKEN["pt"], "Где мой заказ?"])
def test_a_language_beyond_the_configured_ones_is_not_taken_for_one_of_them(text: str) -> None:
    assert language_of(text, ("en", "de")) == (None, 0.0)


@given(st.text(max_size=300))
def test_any_text_has_a_language_with_a_confidence_or_none(text: str) -> None:
    language, confidence = language_of(text, LANGUAGES)
    assert language is None or language in LANGUAGES
    assert 0 <= confidence <= 1 + 1e-6
    assert language_of(text, LANGUAGES) == (language, confidence)


def test_the_shops_conversations_are_english() -> None:
    texts = [said(json.loads(line)["messages"]) for line in lines(3, 0, 300, 0.0)]
    found = [language_of(text, LANGUAGES) for text in texts]
    assert {language for language, confidence in found if confidence >= 0.9} == {"en"}
    assert sum(confidence >= 0.9 for _, confidence in found) >= 0.95 * len(found)


def test_the_language_is_the_customers() -> None:
    fill = imputer(languages=("en", "de"), min_language_confidence=0.8).fill
    assert fill(conversation("Wo ist meine Bestellung?", "It is on its way.", language=None)).language == "de"
    assert said([{"role": "system", "content": "Be kind."}, {"role": "user", "content": "x" * 500}]).startswith("x")
    long = [{"role": "user", "content": "x" * LANGUAGE_CHARS}, {"role": "user", "content": "never read"}]
    assert "read" not in said(long)


def test_one_configured_language_is_taken_as_given_and_none_fills_nothing_in() -> None:
    unspoken = conversation("Wo ist meine Bestellung?", language=None)
    assert imputer(languages=("en",)).fill(unspoken).language == "en"
    assert imputer(languages=()).fill(unspoken) is unspoken


def test_an_unsure_language_stays_missing() -> None:
    unsure = conversation("42?", language=None)
    assert imputer(languages=("en", "de")).fill(unsure) is unsure
    sure = conversation("Hello, when will my parcel be delivered?", language=None)
    assert imputer(languages=("en", "de")).fill(sure).imputed == ["language"]


def test_a_language_that_cannot_be_detected_is_refused_before_anything_is_read() -> None:
    with pytest.raises(ConfigError, match=r"klingon cannot be detected.*choose from .*en"):
        imputer(languages=("en", "klingon"))
    assert imputer(languages=("klingon",)).fill(conversation("nuqneH", language=None)).language == "klingon"


def test_channel_and_time_are_filled_in_where_configured() -> None:
    bare = conversation("hello", channel="unknown", started_at=None)
    assert imputer().fill(bare, ARRIVED) is bare
    found = imputer(channel="email", started_at=True).fill(bare, ARRIVED)
    assert (found.channel, found.started_at, found.imputed) == ("email", ARRIVED, ["channel", "started_at"])
    assert imputer(started_at=True).fill(bare) is bare  # its file has no time


def test_what_is_there_stays() -> None:
    known = conversation("hello", channel="web", language="fr", started_at=datetime(2024, 1, 1, tzinfo=UTC))
    assert imputer(channel="email", started_at=True).fill(known, ARRIVED) is known


def test_unlabelled_questions_get_the_intent_that_the_model_is_sure_of(intents: IntentModel) -> None:
    texts = ("I want my money back for order 12345", "We have refunded it.", "hmm", "Anything else?")
    unlabelled = conversation(*texts)
    [refund, unsure] = intents.predict([texts[0], texts[2]])
    between = (refund[1] + unsure[1]) / 2
    assert refund[1] > unsure[1]
    found = imputer(intents, min_intent_confidence=between).fill(unlabelled)
    assert (found.intent, found.imputed) == (refund[0], ["intent"])
    assert [message["intent"] for message in found.messages] == [refund[0], None, None, None]
    assert [message["intent"] for message in unlabelled.messages] == [None] * 4
    assert imputer(intents, min_intent_confidence=1.0).fill(unlabelled) is unlabelled
    assert imputer(None, min_intent_confidence=0.0).fill(unlabelled) is unlabelled


def test_a_conversation_with_a_label_gets_no_other(intents: IntentModel) -> None:
    partly = conversation("where is my order 12345", "On its way.", "cancel it", "Done.", intent="track")
    partly.messages[0]["intent"] = "track"
    assert imputer(intents, min_intent_confidence=0.0).fill(partly) is partly


def test_imputed_intents_are_as_right_as_their_confidence_says(intents: IntentModel) -> None:
    records = [json.loads(line) for line in lines(3, 2_000, 2_300, 0.0)]
    fill = imputer(intents, min_intent_confidence=0.9).fill
    right = total = 0
    for record in records:
        bare = [message | {"intent": None} for message in record["messages"]]
        filled = zip(fill(conversation("x", messages=bare)).messages, record["messages"], strict=True)
        judged = [now["intent"] == then["intent"] for now, then in filled if now["intent"]]
        total += len(judged)
        right += sum(judged)
    assert total > 200
    assert right / total > 0.95


def test_all_that_is_filled_in_is_named_and_the_same_again_after_pickling(intents: IntentModel) -> None:
    bare = conversation(
        "Where is my order 12345? I have been waiting.", "On its way.", channel="unknown", language=None,
        started_at=None, imputed=["other"],
    )  # fmt: skip
    first = imputer(intents, channel="web", started_at=True, languages=("en", "de"), min_intent_confidence=0)
    found = first.fill(bare, ARRIVED)
    assert found.imputed == ["other", "channel", "language", "started_at", "intent"]
    assert pickle.loads(pickle.dumps(first)).fill(bare, ARRIVED) == found
    assert bare.imputed == ["other"]
    assert first.fill(found, ARRIVED) is found
