"""`--follow`: micro-batches without end, each an ingest of what has come since the last commit.

A micro-batch that is killed at any point has committed its rows together with its offsets, or neither; the next one
goes on from what the table says. SIGTERM ends the loop: a micro-batch that is nearly done is finished, any other is
left, to be read again.
"""

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import FrameType
from typing import Any

from app import openlineage, tables, telemetry
from app.config import Config
from app.errors import SourceUnavailable, TableChanged, TableFilesGone
from app.ingestion import kafka, marks, report, sources
from app.ingestion.finalisation import Outcome
from app.ingestion.history import History
from app.ingestion.parts import Marks
from app.ingestion.pipeline import (
    JUDGED_RECORDS,
    Ingested,
    check_refused,
    check_rules,
    ingest_parts,
    open_tables,
    settings_digest,
)
from app.versions import TableVersion, as_json, digest

logger = logging.getLogger(__name__)

STOP_GRACE_S = 2.0
"""`ray job stop` kills 3 s after it has asked."""
FIRST_RETRY_S, LAST_RETRY_S = 1.0, 30.0


@dataclass
class Followed:
    """What a loop has done."""

    version: TableVersion | None = None
    batches: int = 0
    total: Outcome = field(default_factory=Outcome)
    unjudged: Outcome = field(default_factory=Outcome)
    """Of the last micro-batches, too small to be judged yet."""
    lag_messages: int = 0

    def judge(self, config: Config, outcome: Outcome) -> None:
        """Look at a micro-batch before it is committed.

        Raises:
            StageRefused: A rule of severity stop is broken in it, or the share that broke a rule, or that was refused,
            is too large in it and those before it that were too small to be judged.
        """
        with_it = Outcome.sum([self.unjudged, outcome])
        check_rules(config, outcome, stop_only=True)
        if with_it.read >= JUDGED_RECORDS:
            check_rules(config, with_it)
            check_refused(config, with_it)

    def count(self, ingested: Ingested) -> None:
        """Count a micro-batch that was committed."""
        self.batches += 1
        self.version = ingested.version
        self.total = _counts(self.total, ingested.outcome)
        self.unjudged = _counts(self.unjudged, ingested.outcome)
        if self.unjudged.read >= JUDGED_RECORDS:
            self.unjudged = Outcome()

    @property
    def figures(self) -> dict[str, Any]:
        """For the job's last line."""
        return {**report.counts(self.total), "batches": self.batches, "lag_messages": self.lag_messages}

    @property
    def outputs(self) -> dict[str, Any]:
        """For the job's last line."""
        return {"table": as_json(self.version)} if self.version else {}


def _counts(before: Outcome, outcome: Outcome) -> Outcome:
    """Of both together; what grows with every record is left out."""
    both = Outcome.sum([before, outcome])
    both.kept_files, both.refused_files, both.scores = [], [], []
    return both


def follow(config: Config) -> Followed:
    """Ingest micro-batches until SIGTERM, or until `follow.max_batches` have been committed.

    Raises:
        SourceError: A source has lost what comes next, or has been away for longer than `follow.max_outage_s`.
        TableFilesGone: For as long, no micro-batch could be compared with the table: a file of it is lost.
        StageRefused: Too many records broke a rule.
    """
    settings = config.ingestion.follow
    followed, history = Followed(), History(config)
    outage, loss = _Outage(settings.max_outage_s), _Outage(settings.max_outage_s)
    with _stopped_by_sigterm() as stop:
        while not stop.is_set():
            started_s = time.monotonic()
            try:
                more = _batch(config, followed, history)
                outage.over()
                loss.over()
            except SourceUnavailable as error:
                stop.wait(outage.wait_s(error))
                continue
            except TableFilesGone as error:
                history = History(config)
                stop.wait(loss.wait_s(error))
                continue
            except TableChanged:
                logger.info("another writer committed meanwhile: the micro-batch is read again")
                history = History(config)
                continue
            if settings.max_batches and followed.batches >= settings.max_batches:
                break
            if not more:
                stop.wait(max(0.0, settings.interval_s - (time.monotonic() - started_s)))
    return followed


def _batch(config: Config, followed: Followed, history: History) -> bool:
    """Ingest what is new; returns whether so much is waiting already that the next one begins at once."""
    started_s = time.monotonic()
    both = open_tables(config)
    settings = settings_digest(config)
    known = marks.committed(config, both[0], settings)
    parts = sources.parts_of(config, known)
    if parts:
        key = digest([settings, [sources.mark_of(config, part) for part in parts], dict(known)])
        judge = partial(followed.judge, config)
        ingested = ingest_parts(config, parts, known, key, both, judge, history)
        if ingested.version != followed.version:
            openlineage.running({"table": as_json(ingested.version)})
        followed.count(ingested)
        known = marks.committed(config, tables.open_table(config.storage, config.ingestion.table), settings)
    followed.lag_messages = _show_lag(config, known)
    if parts:
        print(
            f"ingest: batch {followed.batches}: {_brief(ingested.figures)}, lag {followed.lag_messages} messages, "
            f"{ingested.version}, {time.monotonic() - started_s:.1f} s",
            flush=True,
        )
    return bool(parts) and followed.lag_messages >= config.ingestion.follow.max_rows


def _show_lag(config: Config, known: Marks) -> int:
    """Messages that wait in all Kafka sources; also as metrics."""
    gauge = telemetry.gauge(telemetry.INGEST_LAG)
    total = 0
    for source in config.ingestion.sources:
        if source.format == "kafka":
            for partition, waiting in kafka.lag(source, known).items():
                gauge.set(waiting, tags={"topic": kafka.address(source)[1], "partition": str(partition)})
                total += waiting
    return total


def _brief(figures: dict[str, Any]) -> str:
    names = {"records_read": "read", "records_kept": "kept", "records_refused": "refused", "duplicates": "duplicates"}
    return ", ".join(f"{figures[name]:,} {word}" for name, word in names.items())


class _Outage:
    """How long no micro-batch has come about, and how long to wait before the next try: longer each time."""

    def __init__(self, most_s: float) -> None:
        self._most_s = most_s
        self._since_s: float | None = None
        self._next_s = FIRST_RETRY_S

    def over(self) -> None:
        self._since_s, self._next_s = None, FIRST_RETRY_S

    def wait_s(self, error: SourceUnavailable | TableFilesGone) -> float:
        """Raises the error once it has lasted too long."""
        now_s = time.monotonic()
        self._since_s = now_s if self._since_s is None else self._since_s
        if now_s - self._since_s > self._most_s:
            raise error
        logger.warning("%s; trying again in %.0f s", error.what, self._next_s)
        wait_s, self._next_s = self._next_s, min(LAST_RETRY_S, 2 * self._next_s)
        return wait_s


@contextmanager
def _stopped_by_sigterm() -> Iterator[threading.Event]:
    """An event that SIGTERM sets; a micro-batch that goes on for longer than the grace is left where it is."""
    stop = threading.Event()
    grace = threading.Timer(STOP_GRACE_S, os.kill, (os.getpid(), signal.SIGTERM))
    grace.daemon = True

    def ask(signum: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise _Left
        stop.set()
        grace.start()

    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield stop
    except _Left:
        logger.info("stopped within a micro-batch, which will be read again")
    finally:
        grace.cancel()
        signal.signal(signal.SIGTERM, before)


class _Left(BaseException):
    """The grace is over. Not an Exception, so that nothing on the way takes it for one of its own."""
