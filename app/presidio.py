"""Presidio's recognizers beside our own patterns: an optional extra, `pip install .[presidio]`.

Without a spaCy pipeline only its patterns work (crypto addresses, numbers of other countries' papers); names and places
need one, installed beside it and named by `ingestion.privacy.presidio_model`.
"""

import functools
import importlib.util
from collections.abc import Iterator, Sequence
from typing import Any

from app.errors import ConfigError
from app.personal_data import Finding

LANGUAGE = "en"


def check(model: str | None) -> None:
    """Whether it can be used at all, which is to be known before any record is read.

    Raises:
        ConfigError: Presidio or the spaCy pipeline is not installed.
    """
    if importlib.util.find_spec("presidio_analyzer") is None:
        raise ConfigError(
            "ingestion.privacy.engine=presidio, but Presidio is not installed",
            "install the extra (pip install '.[presidio]') wherever tasks run, or set the engine to patterns",
        )
    if model is not None and importlib.util.find_spec(model) is None:
        raise ConfigError(
            f"ingestion.privacy.presidio_model: the spaCy pipeline {model} is not installed",
            "install it wherever tasks run, or leave it out: then only Presidio's patterns work",
        )


def recognised(text: str, entities: Sequence[str], model: str | None, least_score: float) -> Iterator[Finding]:
    """What Presidio takes for one of some entities, named as it names them, in lower case."""
    found = _analyzer(model).analyze(text, LANGUAGE, entities=list(entities), score_threshold=least_score)
    yield from (Finding(entry.entity_type.lower(), entry.start, entry.end) for entry in found)


@functools.lru_cache(maxsize=1)
def _analyzer(model: str | None) -> Any:
    from presidio_analyzer import AnalyzerEngine, RecognizerRegistry
    from presidio_analyzer.nlp_engine import NoOpNlpEngine, SpacyNlpEngine

    registry = RecognizerRegistry(supported_languages=[LANGUAGE])
    registry.load_predefined_recognizers(languages=[LANGUAGE])
    pipeline = [{"lang_code": LANGUAGE, "model_name": model or "none"}]
    if model is None:
        registry.remove_recognizer("SpacyRecognizer")
    engine = NoOpNlpEngine(pipeline) if model is None else SpacyNlpEngine(pipeline)
    return AnalyzerEngine(registry=registry, nlp_engine=engine, supported_languages=[LANGUAGE])
