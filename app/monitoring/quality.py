"""What traffic and feedback say about the service: counts, quantiles and shares. No texts are kept.

An answer is judged by the newest feedback that names its response id; one that says nothing takes an earlier one
back. It is one pass over the exchanges: what stays in memory is eight bytes a latency and a few hundred a feedback.
"""

import datetime
import math
import re
from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from app.storage import Storage
from app.traffic import Exchange, Feedback, read_exchanges, read_feedback

QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
OTHER = "other"
MAX_LABELS = 100
"""Distinct values a label may take in metrics and reports; the rarest beyond it are added up as `other`."""

# What is counted, with its types: a damaged line can still be JSON.
_EXCHANGE: dict[str, Any] = {
    **dict.fromkeys(("response_id", "variant", "status"), str),
    **dict.fromkeys(("intent", "handover"), str | None),
    **dict.fromkeys(("prompt_tokens", "completion_tokens"), int),
    "time_to_first_token_s": float | int | None,
    "end_to_end_s": float | int,
}
_FEEDBACK: dict[str, Any] = {"response_id": str, "rating": int | None, "intent": str | None}
_LABEL = re.compile(r"[\w.:?/ -]{1,64}")


@dataclass(frozen=True)
class Verdict:
    """What feedback says about one answer; none where it says nothing."""

    rating: int | None
    intent: str | None


@dataclass
class Tally:
    """Sums over a set of exchanges."""

    exchanges: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    intents: Counter[str] = field(default_factory=Counter)
    """By the intent that the intent model chose."""
    handovers: Counter[str] = field(default_factory=Counter)
    """By reason."""
    with_feedback: int = 0
    positive: int = 0
    negative: int = 0
    labelled: Counter[str] = field(default_factory=Counter)
    """Exchanges whose right intent is known, by the intent that the model chose."""
    right: Counter[str] = field(default_factory=Counter)
    """Those of them that the model had right."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    time_to_first_token_s: "array[float]" = field(default_factory=lambda: array("d"))
    """Of every exchange that got as far as a first token."""
    end_to_end_s: "array[float]" = field(default_factory=lambda: array("d"))
    """Of exchanges with status `ok`."""

    def add(self, exchange: Exchange, verdict: Verdict | None) -> None:
        """Count one exchange and what feedback says about it."""
        self.exchanges += 1
        self.statuses[label(exchange.status)] += 1
        self.prompt_tokens += exchange.prompt_tokens
        self.completion_tokens += exchange.completion_tokens
        if exchange.intent is not None:
            self.intents[label(exchange.intent)] += 1
        if exchange.handover is not None:
            self.handovers[label(exchange.handover)] += 1
        _append(self.time_to_first_token_s, exchange.time_to_first_token_s)
        if exchange.status == "ok":
            _append(self.end_to_end_s, exchange.end_to_end_s)
        if verdict is not None:
            self._judge(exchange, verdict)

    def _judge(self, exchange: Exchange, verdict: Verdict) -> None:
        self.with_feedback += 1
        if verdict.rating is not None:
            self.positive += verdict.rating > 0
            self.negative += verdict.rating < 0
        if verdict.intent is not None and exchange.intent is not None:
            chosen = label(exchange.intent)
            self.labelled[chosen] += 1
            self.right[chosen] += verdict.intent == exchange.intent

    @property
    def feedback_fraction(self) -> float | None:
        """Share of exchanges with feedback; none without exchanges."""
        return _share(self.with_feedback, self.exchanges)

    @property
    def positive_fraction(self) -> float | None:
        """Share of rated exchanges whose rating is positive; none without ratings."""
        return _share(self.positive, self.positive + self.negative)

    @property
    def intent_accuracy(self) -> float | None:
        """Share of labelled exchanges whose intent the model had right; none without labels."""
        return _share(self.right.total(), self.labelled.total())

    def figures(self) -> dict[str, Any]:
        """Every number of the tally, flat, as it stands in last lines and reports."""
        return {
            "exchanges": self.exchanges,
            "errors": self.statuses["error"],
            "cancelled": self.statuses["cancelled"],
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "with_feedback": self.with_feedback,
            "feedback_fraction": self.feedback_fraction,
            "positive_fraction": self.positive_fraction,
            "intent_labels": self.labelled.total(),
            "intent_accuracy": self.intent_accuracy,
            "handovers": most_frequent(self.handovers),
            "intents": most_frequent(self.intents),
            **{f"time_to_first_token_s_{name}": value for name, value in quantiles(self.time_to_first_token_s).items()},
            **{f"end_to_end_s_{name}": value for name, value in quantiles(self.end_to_end_s).items()},
        }


@dataclass(frozen=True)
class Quality:
    """The service in a window: as a whole and by variant."""

    whole: Tally
    variants: dict[str, Tally]
    feedback: int
    """Feedback received, whether or not its exchange is in the window."""
    unreadable: int
    """Records left out because a field has a wrong type."""

    def figures(self) -> dict[str, Any]:
        """The whole's figures with the number of feedback records and each variant's figures."""
        variants = {name: tally.figures() for name, tally in sorted(self.variants.items())}
        counts = {"feedback": self.feedback, "unreadable": self.unreadable}
        return {**self.whole.figures(), **counts, "variants": variants}


def measure(exchanges: Iterable[Exchange], feedback: Iterable[Feedback]) -> Quality:
    """Count all exchanges, whole and by variant, each with the feedback it got."""
    whole, variants = Tally(), dict[str, Tally]()
    verdicts, received, unreadable = _verdicts(feedback)
    for exchange in exchanges:
        if not _is_sound(exchange, _EXCHANGE):
            unreadable += 1
            continue
        verdict = verdicts.get(exchange.response_id)
        whole.add(exchange, verdict)
        variants.setdefault(label(exchange.variant), Tally()).add(exchange, verdict)
    return Quality(whole, variants, received, unreadable)


def read(storage: Storage, window_s: float) -> Quality:
    """Measure what was logged in the last `window_s` seconds."""
    since = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=window_s)
    return measure(read_exchanges(storage, since), read_feedback(storage, since))


def _verdicts(feedback: Iterable[Feedback]) -> tuple[dict[str, Verdict], int, int]:
    """What the newest feedback on each response id says; the records counted and left out."""
    received = unreadable = 0
    newest: dict[str, tuple[str, Verdict | None]] = {}
    for record in feedback:
        if not _is_sound(record, _FEEDBACK):
            unreadable += 1
            continue
        received += 1
        if record.received_at >= newest.get(record.response_id, ("",))[0]:
            says_something = record.rating is not None or record.intent is not None or record.comment
            verdict = Verdict(record.rating, record.intent) if says_something else None
            newest[record.response_id] = (record.received_at, verdict)
    verdicts = {response_id: verdict for response_id, (_, verdict) in newest.items() if verdict}
    return verdicts, received, unreadable


def _is_sound(record: Exchange | Feedback, types: dict[str, Any]) -> bool:
    return all(isinstance(getattr(record, name), kind) for name, kind in types.items())


def quantiles(values: "array[float]") -> dict[str, float | None]:
    """p50, p95 and p99 with linear interpolation; none without values."""
    if not values:
        return dict.fromkeys(QUANTILES)
    found = np.quantile(np.frombuffer(values), list(QUANTILES.values()))
    return {name: round(float(value), 6) for name, value in zip(QUANTILES, found, strict=True)}


def label(text: str) -> str:
    """The text if it can stand as a label, else `other`: labels are names, never what a customer wrote."""
    return text if _LABEL.fullmatch(text) else OTHER


def most_frequent(counts: Counter[str], limit: int = MAX_LABELS) -> dict[str, int]:
    """The `limit` largest counts, largest first, ties by name; what is left over is added up as `other`."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    kept = dict(ordered[:limit])
    if left := sum(count for _, count in ordered[limit:]):
        kept[OTHER] = kept.get(OTHER, 0) + left
    return kept


def _append(values: "array[float]", value: float | None) -> None:
    if value is not None and math.isfinite(value) and value >= 0:
        values.append(value)


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
