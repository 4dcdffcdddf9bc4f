"""The newest quality figures as Ray gauges.

Ray 2.60 drops a gauge from its metrics endpoint when it was not set for two export intervals (20 s by default), and
so do we rely on it: a variant or an intent that left the window is no longer set and goes; what is still true has to
be set again at least every `REFRESH_S`, however rarely it is measured.
"""

from ray.util.metrics import Gauge

from app import telemetry
from app.monitoring.quality import Quality, most_frequent, quantiles

REFRESH_S = 5.0


class Gauges:
    """This process's rayloop_monitored_* gauges."""

    def __init__(self) -> None:
        self._exchanges = telemetry.gauge(telemetry.MONITORED_EXCHANGES)
        self._feedback_fraction = telemetry.gauge(telemetry.MONITORED_FEEDBACK_FRACTION)
        self._positive_fraction = telemetry.gauge(telemetry.MONITORED_POSITIVE_FRACTION)
        self._time_to_first_token = telemetry.gauge(telemetry.MONITORED_TIME_TO_FIRST_TOKEN)
        self._latency = telemetry.gauge(telemetry.MONITORED_LATENCY)
        self._intents = telemetry.gauge(telemetry.MONITORED_INTENTS)
        self._intent_accuracy = telemetry.gauge(telemetry.MONITORED_INTENT_ACCURACY)

    def set(self, quality: Quality) -> None:
        """Set every gauge that has a value; one without a value is left to vanish."""
        for variant, tally in quality.variants.items():
            _set(self._exchanges, tally.exchanges, variant=variant)
            _set(self._feedback_fraction, tally.feedback_fraction, variant=variant)
            _set(self._positive_fraction, tally.positive_fraction, variant=variant)
        for name, value in quantiles(quality.whole.time_to_first_token_s).items():
            _set(self._time_to_first_token, value, quantile=name)
        for name, value in quantiles(quality.whole.end_to_end_s).items():
            _set(self._latency, value, quantile=name)
        for intent, count in most_frequent(quality.whole.intents).items():
            _set(self._intents, count, intent=intent)
        _set(self._intent_accuracy, quality.whole.intent_accuracy)


def _set(gauge: Gauge, value: float | None, **tags: str) -> None:
    if value is not None:
        gauge.set(value, tags={key: _ascii(tag) for key, tag in tags.items()})


def _ascii(tag: str) -> str:
    # Ray 2.60 raises UnicodeEncodeError for a tag beyond ASCII; an escape keeps different names different.
    return tag.encode("ascii", "backslashreplace").decode()
