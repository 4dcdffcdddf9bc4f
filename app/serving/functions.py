"""Small functions beside the language model: what a question is about, how the customer feels.

Each is a deployment of its own that may scale to zero. They work while the reply is written, and an answer that is
complete does not wait for them beyond a deadline.
"""

import asyncio
import contextvars
import logging
import time
from collections.abc import Mapping
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from app.conversation import normalised
from app.intent import IntentModel
from app.serving.schema import Insight, Intent
from app.settings.serving import ServingConfig, VariantConfig
from app.storage import Storage, local_folder
from app.telemetry import FUNCTION_MISSES, counter, set_up_logging

logger = logging.getLogger(__name__)


class IntentFunction:
    """Says what a question is about, by the model that belongs to the variant that answers, or to its base."""

    def __init__(self, config: ServingConfig) -> None:
        set_up_logging(deployment="intent")
        self._models = {variant.name: _intent_model(variant) for variant in config.variants}
        for variant in config.variants:
            if variant.adapter_of and self._models[variant.name] is None:
                self._models[variant.name] = self._models[variant.adapter_of]

    async def __call__(self, question: str, variant: str) -> Intent | None:
        """What it is about; none if the variant has no model that says so."""
        model = self._models.get(variant)  # while versions change, a replica may not know the newest variant
        if model is None:
            return None
        label, confidence = model.predict([normalised(question)])[0]
        return Intent(str(label), float(confidence))


class SentimentFunction:
    """Says how a customer feels, by a lexicon of English. Source: Hutto and Gilbert 2014, VADER."""

    def __init__(self) -> None:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

        set_up_logging(deployment="sentiment")
        self._analyzer = SentimentIntensityAnalyzer()

    async def __call__(self, question: str, variant: str) -> float:
        """From -1 (furious) to 1 (delighted)."""
        return float(self._analyzer.polarity_scores(normalised(question))["compound"])


class Functions:
    """Asks them, and waits no longer than it may.

    Args:
        handles: By name, `intent` and `sentiment`.
    """

    def __init__(self, handles: Mapping[str, "DeploymentHandle[Any]"], deadline_s: float) -> None:
        self._handles, self._deadline_s = handles, deadline_s
        self._misses = counter(FUNCTION_MISSES)

    def ask(self, question: str, variant: str) -> "asyncio.Task[Insight]":
        """Begin to find out about a question; the task ends when all is known, or at the deadline."""
        # An empty context: an answer that is written is recorded with what they say, also if its client has left.
        working = self._asked(question, variant)
        return asyncio.get_running_loop().create_task(working, context=contextvars.Context())

    async def _asked(self, question: str, variant: str) -> Insight:
        deadline_s = time.monotonic() + self._deadline_s
        calls = {name: handle.remote(question, variant) for name, handle in self._handles.items()}
        found: dict[str, Any] = {}
        for name, call in calls.items():
            try:
                async with asyncio.timeout(max(0.0, deadline_s - time.monotonic())):
                    found[name] = await call
            except Exception as error:  # over gRPC what a function raises arrives as it is; no answer breaks off for it
                cancel: Any = call.cancel
                cancel()
                self._misses.inc(tags={"function": name})
                if not isinstance(error, TimeoutError | RayError | RayServeException):
                    logger.error("function %s failed: %s", name, type(error).__name__)
        return Insight(found.get("intent"), found.get("sentiment"))


def _intent_model(variant: VariantConfig) -> IntentModel | None:
    storage = Storage(variant.uri)
    if storage.exists("intent"):
        with local_folder(storage.uri("intent")) as folder:
            return IntentModel.load(folder)
    if variant.adapter_of is None:
        logger.warning("variant %s has no intent model: hand-over by intent is off for it", variant.name)
    return None
