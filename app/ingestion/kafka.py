"""Kafka topics: each partition from the offset that was committed with its records to the end, in micro-batches.

Offsets are committed with the rows, in the table's snapshot, never to Kafka: a consumer group would be a second
truth. What cannot be read any more (a topic or partition that is gone, offsets older than the log start, a topic that
was made anew) stops the stage with a sentence that names it.

A topic that was made anew is known by being shorter than what was committed, or by another message in the place of the
last one that was: beside each offset the place and the time of that message are committed. A topic's id would say the
same, but librdkafka gives it to its admin client alone, which its own test brokers do not answer.
"""

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from app.errors import ConfigError, SourceError, SourceUnavailable
from app.ingestion.formats import CHUNK_BYTES, Piece
from app.ingestion.parts import Marks, Read
from app.settings.ingestion import FollowConfig, IngestionConfig, SourceConfig

if TYPE_CHECKING:
    from confluent_kafka import Consumer

MESSAGE_BYTES = 1_000
"""What a message is taken to hold before it is read."""
MAX_MESSAGE_BYTES = 64 << 20
POLL_S = 0.5
CLOCKS_APART_S = 86_400.0
"""A producer's clock may be ahead by so much."""
GLANCE = {"fetch.message.max.bytes": 64 << 10, "fetch.wait.max.ms": 20}
"""How little is fetched of a partition where only the times of some messages are asked for."""
LOOKED_BACK = 2
"""Offsets before the end among which the last message is looked for: a transaction ends with one that is none."""
PREFIX = "RAYLOOP_KAFKA_"

Sent = tuple[int, int]
"""The offset of a message, and its time in milliseconds."""


@dataclass(frozen=True)
class KafkaPart:
    """One partition from one offset to, not including, another."""

    uri: str
    source: int
    topic: str
    partition: int
    start: int
    end: int
    mark_key: str
    last: Sent | None = None
    """The last message before `end`, if there is one near."""

    @property
    def size_bytes(self) -> int:
        """About what its messages hold."""
        return (self.end - self.start) * MESSAGE_BYTES

    @property
    def arrived_at(self) -> None:
        """Each message has its own time."""

    @property
    def mark(self) -> tuple[str, int | list[int]]:
        """The offset to go on from, and what its topic is known by."""
        return self.mark_key, self.end if self.last is None else [self.end, *self.last]

    def reads(self, ingestion: IngestionConfig) -> Iterator[tuple[Read, int]]:
        """One task a partition; none for one whose end is only to be remembered."""
        if self.end > self.start:
            yield partial(read, self, ingestion.sources[self.source], ingestion.batch_rows), self.size_bytes


class Span(NamedTuple):
    """What is to be read of a partition, and where its log begins."""

    low: int
    start: int
    end: int

    @property
    def waiting(self) -> int:
        """Messages in it, at most."""
        return self.end - self.start


def address(source: SourceConfig) -> tuple[str, str]:
    """Bootstrap servers and topic of a source's URI."""
    servers, _, topic = source.uri.removeprefix("kafka://").partition("/")
    return servers, topic


def mark_key(source: SourceConfig, partition: int) -> str:
    """What the committed offset of a partition is called."""
    return f"kafka:{source.identity}/{partition}"


def parts(source: SourceConfig, index: int, marks: Marks, follow: FollowConfig) -> list[KafkaPart]:
    """What is new in each partition, at most `follow.max_rows` messages in all when following.

    Raises:
        SourceError: The brokers do not answer, the topic is not there, or offsets that come next are gone.
    """
    consumer = _consumer(source, more=GLANCE)
    try:
        partitions = _partitions(consumer, source)
        _check_known(source, partitions, marks)
        spans = {partition: _span(consumer, source, partition, marks) for partition in partitions}
        _check_same(consumer, source, spans, marks)
        ends = _ends(source, spans, marks, follow)
        last = _sent(consumer, source, {
            partition: (max(spans[partition].low, end - LOOKED_BACK), end) for partition, end in ends.items()
        })  # fmt: skip
    finally:
        consumer.close()
    _, topic = address(source)
    return [
        KafkaPart(
            f"kafka://{topic}/{partition}" if source.name is None else f"{source.name}/{partition}",
            index, topic, partition, spans[partition].start, end, mark_key(source, partition),
            last.get(partition) or _last(marks, source, partition),
        )
        for partition, end in ends.items()
    ]  # fmt: skip


def _ends(source: SourceConfig, spans: dict[int, Span], marks: Marks, follow: FollowConfig) -> dict[int, int]:
    """How far each partition is to be read now, for those of which there is something to say."""
    waiting = sum(span.waiting for span in spans.values())
    share = min(1.0, follow.max_rows / waiting) if follow.enabled and waiting else 1.0
    return {
        partition: span.start + -int(-span.waiting * share // 1)
        for partition, span in spans.items()
        if span.waiting or (source.start == "latest" and mark_key(source, partition) not in marks)
    }


def lag(source: SourceConfig, marks: Marks) -> dict[int, int]:
    """Messages that are in each partition and have not been committed.

    Raises:
        SourceError: As `parts`.
    """
    consumer = _consumer(source)
    try:
        spans = {number: _span(consumer, source, number, marks) for number in _partitions(consumer, source)}
    finally:
        consumer.close()
    return {partition: span.waiting for partition, span in spans.items()}


def _consumer(
    source: SourceConfig, errors: "list[Any] | None" = None, more: Mapping[str, Any] | None = None
) -> "Consumer":  # fmt: skip
    from confluent_kafka import Consumer, KafkaException

    servers, _ = address(source)
    settings: dict[str, Any] = {
        "bootstrap.servers": servers,
        "group.id": "rayloop-never-committed",
        "enable.auto.commit": False,
        "enable.auto.offset.store": False,
        "auto.offset.reset": "error",
        "isolation.level": "read_committed",
        "enable.partition.eof": True,
        "allow.auto.create.topics": False,
        "fetch.message.max.bytes": MAX_MESSAGE_BYTES,
        "receive.message.max.bytes": MAX_MESSAGE_BYTES + (1 << 20),
        "socket.timeout.ms": int(min(source.timeout_s, 60) * 1_000),
        "log_level": 0,
        "error_cb": (errors.append if errors is not None else lambda error: None),
    }
    try:
        return Consumer(settings | dict(more or {}) | _secrets())
    except KafkaException as error:
        raise ConfigError(
            f"the RAYLOOP_KAFKA_* variables are no configuration of librdkafka ({error.args[0].str()})",
            f"set are {', '.join(sorted(_variables())) or 'none'}: RAYLOOP_KAFKA_SASL_PASSWORD is sasl.password",
        ) from None


def _secrets() -> dict[str, str]:
    """Credentials and transport, from the environment alone: RAYLOOP_KAFKA_SASL_PASSWORD is `sasl.password`."""
    return {name.removeprefix(PREFIX).lower().replace("_", "."): value for name, value in _variables().items()}


def _variables() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(PREFIX)}


def _partitions(consumer: "Consumer", source: SourceConfig) -> list[int]:
    from confluent_kafka import KafkaError, KafkaException

    servers, topic = address(source)
    try:
        found = consumer.list_topics(topic, timeout=source.timeout_s).topics[topic]
    except KafkaException as error:
        raise SourceUnavailable(
            f"the Kafka brokers {servers} do not answer ({error.args[0].str()})",
            "start them, or correct ingestion.sources and the RAYLOOP_KAFKA_* variables",
        ) from None
    gone = (KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC)
    if (found.error is not None and found.error.code() in gone) or not found.partitions:
        raise SourceError(
            f"topic {topic!r} does not exist on {servers}",
            "if it was deleted, remove the source; what was committed from it stays in the table",
        )
    if found.error is not None:
        raise SourceError(f"topic {topic!r} cannot be read ({found.error.str()})", "check its access rights")
    return sorted(found.partitions)


def _check_known(source: SourceConfig, partitions: list[int], marks: Marks) -> None:
    """Stop where a partition has gone that something was committed of.

    Raises:
        SourceError: It has.
    """
    for key in marks:
        name, _, number = key.rpartition("/")
        if name == f"kafka:{source.identity}" and int(number) not in partitions:
            raise SourceError(
                f"{address(source)[1]}/{number} does not exist any more, but offsets up to {offset(marks[key])} were "
                f"committed: the topic was made anew",
                "give the source another ingestion.sources name to read it from the beginning",
            )


def offset(mark: Any) -> int | None:
    """The offset that comes next by a partition's mark."""
    found: int | None = mark[0] if isinstance(mark, list) else mark
    return found


def _last(marks: Marks, source: SourceConfig, partition: int) -> Sent | None:
    """The last message that was committed of a partition, if it is known."""
    mark = marks.get(mark_key(source, partition))
    return (mark[1], mark[2]) if isinstance(mark, list) else None


def _check_same(consumer: "Consumer", source: SourceConfig, partitions: Iterable[int], marks: Marks) -> None:
    """Stop where another message has the place of the last one that was committed.

    Where retention or compaction took that message nothing is said.

    Raises:
        SourceError: The topic was made anew.
    """
    known = {partition: last for partition in partitions if (last := _last(marks, source, partition))}
    found = _sent(consumer, source, {partition: (at, at + 1) for partition, (at, _) in known.items()})
    for partition, message in found.items():
        if message != known[partition]:
            raise SourceError(
                f"{address(source)[1]}/{partition} has another message at offset {message[0]} than the one that was "
                f"committed: the topic was made anew or has lost messages",
                "give the source another ingestion.sources name to read it from the beginning",
            )


def _sent(consumer: "Consumer", source: SourceConfig, spans: dict[int, tuple[int, int]]) -> dict[int, Sent]:
    """The last message between two offsets of each partition; none where there is none, or it has no time.

    Raises:
        SourceUnavailable: The brokers keep silent.
    """
    from confluent_kafka import TIMESTAMP_NOT_AVAILABLE, KafkaError, TopicPartition

    nothing = (KafkaError._PARTITION_EOF, KafkaError.OFFSET_OUT_OF_RANGE, KafkaError._AUTO_OFFSET_RESET)
    _, topic = address(source)
    found: dict[int, Sent] = {}
    left = {partition: end for partition, (_, end) in spans.items()}
    consumer.assign([TopicPartition(topic, partition, start) for partition, (start, _) in spans.items()])
    until_s = time.monotonic() + source.timeout_s
    while left:
        for message in consumer.consume(len(left), timeout=POLL_S):
            partition, at, error = message.partition() or 0, message.offset() or 0, message.error()
            end = left.get(partition, 0)
            kind, sent_ms = message.timestamp()
            if error is None and at < end and kind != TIMESTAMP_NOT_AVAILABLE:
                found[partition] = at, sent_ms
            if error.code() in nothing if error is not None else at >= end - 1:
                left.pop(partition, None)
        if left and time.monotonic() > until_s:
            raise SourceUnavailable(
                f"{topic}/{min(left)} gave nothing for {source.timeout_s:g} s",
                "check the brokers and run the job again",
            )
    consumer.unassign()
    return found


def _span(consumer: "Consumer", source: SourceConfig, partition: int, marks: Marks) -> Span:
    """The offsets to read: from the committed one, else from where the source is to begin, to the end."""
    _, topic = address(source)
    low, high = _watermarks(consumer, source, partition)
    committed = offset(marks.get(mark_key(source, partition)))
    if committed is None:
        # A partition that was added later is read from its beginning: its first messages are new.
        begun = any(key.startswith(f"kafka:{source.identity}/") for key in marks)
        return Span(low, high if source.start == "latest" and not begun else low, high)
    if committed > high:
        raise SourceError(
            f"{topic}/{partition} ends at offset {high}, but offsets up to {committed} were committed: the topic was "
            f"made anew or has lost messages",
            "give the source another ingestion.sources name to read it from the beginning",
        )
    if committed < low:
        if not source.accept_lost_offsets:
            raise SourceError(
                f"{topic}/{partition} begins at offset {low}, but {committed} comes next: {low - committed} messages "
                f"are gone",
                "raise the topic's retention; to go on without them set accept_lost_offsets on this source",
            )
        return Span(low, low, high)
    return Span(low, committed, high)


def _watermarks(consumer: "Consumer", source: SourceConfig, partition: int) -> tuple[int, int]:
    """The first offset of a partition, and the one after its last."""
    from confluent_kafka import KafkaException, TopicPartition

    _, topic = address(source)
    try:
        low, high = consumer.get_watermark_offsets(TopicPartition(topic, partition), timeout=source.timeout_s)
    except KafkaException as error:
        raise SourceUnavailable(
            f"partition {topic}/{partition} does not answer ({error.args[0].str()})", "check the brokers"
        ) from None
    return low, high


def read(part: KafkaPart, source: SourceConfig, batch_rows: int) -> Iterator[Piece]:
    """The messages of one partition between two offsets. A message without a value is a record with a problem.

    Raises:
        SourceError: The broker kept silent for `timeout_s`, or offsets disappeared meanwhile.
    """
    from confluent_kafka import TopicPartition

    errors: list[Any] = []
    consumer = _consumer(source, errors)
    try:
        consumer.assign([TopicPartition(part.topic, part.partition, part.start)])
        position, silent_since_s = part.start, time.monotonic()
        waiting: list[Any] = []
        size_bytes = 0
        while position < part.end:
            messages = consumer.consume(batch_rows, timeout=POLL_S)
            # Pieces end where the messages say so, not where a poll did: a read that is tried again gives the same.
            for message in messages:
                if not message.error() and (message.offset() or 0) < part.end:
                    waiting.append(message)
                    size_bytes += len(message.value() or b"")
                    if len(waiting) >= batch_rows or size_bytes > CHUNK_BYTES:
                        yield _piece(waiting)
                        waiting, size_bytes = [], 0
            reached = _reached(messages, part, position)
            if reached > position:
                position, silent_since_s = reached, time.monotonic()
            elif time.monotonic() - silent_since_s > source.timeout_s:
                said = f" ({errors[-1].str()})" if errors else ""
                raise SourceUnavailable(
                    f"{part.topic}/{part.partition} gave nothing after offset {position} for "
                    f"{source.timeout_s:g} s{said}",
                    "check the brokers and run the job again: it goes on from the committed offsets",
                )
        if waiting:
            yield _piece(waiting)
    finally:
        consumer.close()


def _reached(messages: list[Any], part: KafkaPart, position: int) -> int:
    """The offset that comes next; control records of transactions have offsets and are no messages.

    Raises:
        SourceError: An offset of the span is not there any more.
    """
    from confluent_kafka import KafkaError

    for message in messages:
        error = message.error()
        if error is None or error.code() == KafkaError._PARTITION_EOF:
            position = max(position, (message.offset() or 0) + (error is None))
        elif error.code() in (KafkaError.OFFSET_OUT_OF_RANGE, KafkaError._AUTO_OFFSET_RESET):
            raise SourceError(
                f"offset {position} of {part.topic}/{part.partition} is gone", "raise the topic's retention"
            )
    return position


def _piece(messages: list[Any]) -> Piece:
    """Messages as records; one without an id gets its place as such."""
    values = [message.value() for message in messages]
    return Piece(
        [message.offset() for message in messages],
        [value or b"" for value in values],
        ["null_value" if value is None else None for value in values],
        identified=False,
        arrived_ms=[_sent_ms(message) for message in messages],
    )


def _sent_ms(message: Any) -> int | None:
    """When it was sent; not known where the producer's time cannot be true, such as microseconds in place of these."""
    from confluent_kafka import TIMESTAMP_NOT_AVAILABLE

    kind, sent_ms = message.timestamp()
    is_known = kind != TIMESTAMP_NOT_AVAILABLE and 0 < sent_ms < (time.time() + CLOCKS_APART_S) * 1_000
    return sent_ms if is_known else None
