"""Every metric's name, unit and tags, once; structured logs; progress that people can read.

Metric names are `rayloop_<noun>_<unit>` in base units; Ray's exporter puts `ray_` before them. Labels never
hold user text, ids or keys.
"""

import datetime
import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from ray.util import metrics as ray_metrics

PROGRESS_INTERVAL_S = 10.0
LATENCY_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


@dataclass(frozen=True)
class Metric:
    """One metric's name, kind, help text and tag keys."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    tags: tuple[str, ...] = ()


REQUESTS = Metric("rayloop_requests_total", "counter", "HTTP requests.", ("route", "status"))
TIME_TO_FIRST_TOKEN = Metric(
    "rayloop_time_to_first_token_seconds", "histogram", "From request to first token.", ("variant",)
)
END_TO_END_LATENCY = Metric(
    "rayloop_end_to_end_latency_seconds", "histogram", "From request to last token.", ("variant",)
)
COMPLETION_TOKENS = Metric("rayloop_completion_tokens_total", "counter", "Generated tokens.", ("variant",))
PROMPT_TOKENS = Metric("rayloop_prompt_tokens_total", "counter", "Prompt tokens.", ("variant",))
SLOTS_IN_USE = Metric("rayloop_slots_in_use", "gauge", "Sequences being generated.", ("variant",))
HANDOVERS = Metric("rayloop_handovers_total", "counter", "Answers handed to a person.", ("reason",))
FEEDBACK = Metric("rayloop_feedback_total", "counter", "Feedback received.", ("variant", "rating"))

FUNCTION_MISSES = Metric(
    "rayloop_function_misses_total", "counter", "Answers given without what a function would have said.", ("function",)
)

INGEST_RECORDS = Metric(
    "rayloop_ingest_records_total", "counter", "Records read and committed, by what became of them.", ("outcome",)
)
INGEST_RETRIES = Metric("rayloop_ingest_retries_total", "counter", "Blocks that were examined again.")
INGEST_LAG = Metric(
    "rayloop_ingest_lag_messages", "gauge", "Messages that were not committed yet.", ("topic", "partition")
)

TRAINING_LOSS = Metric("rayloop_training_loss", "gauge", "Loss of the latest training step.", ("run",))
VALIDATION_LOSS = Metric("rayloop_validation_loss", "gauge", "Latest validation loss.", ("run",))
TRAINING_BAD_LOSSES = Metric(
    "rayloop_training_bad_losses_total", "counter", "Steps whose loss was not finite or jumped.", ("run", "action")
)
TRAINING_TOKENS_PER_SECOND = Metric("rayloop_training_tokens_per_second", "gauge", "Training throughput.", ("run",))
TRAINING_GRADIENT_NORM = Metric("rayloop_training_gradient_norm", "gauge", "Before clipping.", ("run",))
TRAINING_LEARNING_RATE = Metric("rayloop_training_learning_rate", "gauge", "Of the latest step.", ("run",))
TRAINING_DATA_STALL = Metric(
    "rayloop_training_data_stall_fraction", "gauge", "Share of the time spent waiting for data.", ("run",)
)
TRAINING_MFU = Metric("rayloop_training_mfu", "gauge", "Model FLOPs as a share of a matrix product's.", ("run",))
TRAINING_MEMORY = Metric("rayloop_training_memory_bytes", "gauge", "The most memory that worker 0 has held.", ("run",))

MONITORED_EXCHANGES = Metric("rayloop_monitored_exchanges", "gauge", "Exchanges in the window.", ("variant",))
MONITORED_FEEDBACK_FRACTION = Metric(
    "rayloop_monitored_feedback_fraction", "gauge", "Share of exchanges with feedback.", ("variant",)
)
MONITORED_POSITIVE_FRACTION = Metric(
    "rayloop_monitored_positive_fraction", "gauge", "Share of feedback that is positive.", ("variant",)
)
MONITORED_TIME_TO_FIRST_TOKEN = Metric(
    "rayloop_monitored_time_to_first_token_seconds",
    "gauge",
    "Quantile of time to first token.",
    ("quantile",),
)
MONITORED_LATENCY = Metric(
    "rayloop_monitored_end_to_end_latency_seconds", "gauge", "Quantile of end-to-end latency.", ("quantile",)
)
MONITORED_INTENTS = Metric("rayloop_monitored_intents", "gauge", "Exchanges in the window by intent.", ("intent",))
MONITORED_INTENT_ACCURACY = Metric(
    "rayloop_monitored_intent_accuracy",
    "gauge",
    "Accuracy of the intent model where feedback names the intent.",
)
MONITOR_PASSES = Metric("rayloop_monitor_passes_total", "counter", "Passes of the monitor.", ("outcome",))


def counter(metric: Metric) -> ray_metrics.Counter:
    """The metric as a Ray counter of this process."""
    return ray_metrics.Counter(metric.name, description=metric.help, tag_keys=metric.tags)


def gauge(metric: Metric) -> ray_metrics.Gauge:
    """The metric as a Ray gauge of this process."""
    return ray_metrics.Gauge(metric.name, description=metric.help, tag_keys=metric.tags)


def histogram(metric: Metric) -> ray_metrics.Histogram:
    """The metric as a Ray histogram of this process, in seconds."""
    return ray_metrics.Histogram(
        metric.name, description=metric.help, boundaries=list(LATENCY_BUCKETS_S), tag_keys=metric.tags
    )


class JsonFormatter(logging.Formatter):
    """One JSON object a record: time, level, logger, message, job, stage, and what `extra={'fields': ...}` adds."""

    def __init__(self, **context: str) -> None:
        super().__init__()
        self.context = context

    def format(self, record: logging.LogRecord) -> str:
        """Newlines and control characters come out escaped, so a record is always one line."""
        line: dict[str, Any] = {
            "time": datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **self.context,
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def set_up_logging(**context: str) -> None:
    """Send this process's `app` and `jobs` records to standard error as JSON with `context` in each."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(**context))
    for name in ("app", "jobs"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(logging.INFO)
        logger.propagate = False


class Progress:
    """Counts work done: a bar on a terminal, else one line every ten seconds."""

    def __init__(self, what: str, total: float | None, unit: str) -> None:
        self.what, self.total, self.unit = what, total, unit
        self.done = 0.0
        self.note = ""
        self._started_s = self._printed_s = time.monotonic()
        self._terminal = sys.stdout.isatty()

    def update(self, done: float, note: str = "") -> None:
        """Say that `done` of the total is done, and print if it is time to."""
        self.done, self.note = done, note
        now_s = time.monotonic()
        if now_s - self._printed_s >= (0.2 if self._terminal else PROGRESS_INTERVAL_S):
            self._printed_s = now_s
            self._print(end="\r" if self._terminal else "\n")

    def close(self) -> None:
        """Print the last state."""
        self._print(end="\n")

    def _print(self, end: str) -> None:
        elapsed_s = time.monotonic() - self._started_s
        share = f"{self.done:,.0f}"
        if self.total:
            filled = int(20 * min(1.0, self.done / self.total))
            bar = f"[{'#' * filled}{'.' * (20 - filled)}] " if self._terminal else ""
            share = f"{bar}{self.done:,.0f}/{self.total:,.0f}"
        print(f"{self.what}: {share} {self.unit} in {elapsed_s:.0f} s {self.note}".rstrip(), end=end, flush=True)


@contextmanager
def progress(what: str, total: float | None, unit: str) -> Iterator[Progress]:
    """A Progress that prints its last state on the way out."""
    bar = Progress(what, total, unit)
    try:
        yield bar
    finally:
        bar.close()
