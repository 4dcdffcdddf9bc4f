"""Where conversations come from: the parts behind `ingestion.sources`, what is new of them, and their reading.

Positions: the byte at which a line of JSONL or text begins (unpacked); the number of the row, from 0, in CSV,
Parquet, Arrow, Avro, a query and the embedded shop; the offset of a Kafka message.
"""

import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from app import cluster
from app.config import Config
from app.ingestion import exchanges, files, iceberg, kafka, queries
from app.ingestion.formats import Piece
from app.ingestion.parts import Marks, Part, Read, blocks, is_stream
from app.settings.ingestion import FILE_FORMATS, IngestionConfig, SampleConfig
from app.storage import Storage
from app.versions import APP, digest

if TYPE_CHECKING:
    from ray.data import Dataset

SAMPLE_RECORD_BYTES = 800  # about 760 in 5,000 records
FUSED_TASKS_A_CPU = 4
"""With so many parts, or pieces of parts, each is read and examined by one task."""
SPARE_TASKS_A_CPU = 8
"""With so many, one task more than there are CPUs is under way: none waits while Ray Data decides what comes next."""


@dataclass(frozen=True)
class SamplePart:
    """The embedded shop."""

    uri: str
    source: int
    settings: SampleConfig

    @property
    def size_bytes(self) -> int:
        """About what its records take as JSON."""
        return self.settings.conversations * SAMPLE_RECORD_BYTES

    @property
    def arrived_at(self) -> None:
        """Not known."""

    @property
    def mark(self) -> tuple[str, Any]:
        """Settings and code decide what its records are."""
        return f"sample:{self.uri}", [self.settings.model_dump(), sample_code()]

    def reads(self, ingestion: IngestionConfig) -> Iterator[tuple[Read, int]]:
        """Any position can be begun at, so many tasks share it."""
        total = self.settings.conversations
        step = max(ingestion.batch_rows, -(-total // 1_000))
        for start in range(0, total, step):
            stop = min(total, start + step)
            yield partial(_sample, self.settings, start, stop), (stop - start) * SAMPLE_RECORD_BYTES


def _sample(settings: SampleConfig, start: int, stop: int) -> Iterator[Piece]:
    from app.ingestion import sample

    lines = list(sample.lines(settings.seed, start, stop, settings.defect_fraction))
    yield Piece(range(start, stop), lines, None, identified=True)


def parts_of(config: Config, marks: Marks) -> list[Part]:
    """All that is new in every source: sources in their order.

    Args:
        config: Its `ingestion.sources` are looked at.
        marks: How far everything has been read already.

    Raises:
        SourceError: A source is missing, does not answer, or has lost what was to be read next.
    """
    found = [part for index in range(len(config.ingestion.sources)) for part in _parts(config, index, marks)]
    return [part for part in found if (mark := mark_of(config, part)) is None or marks.get(mark[0]) != mark[1]]


def mark_of(config: Config, part: Part) -> tuple[str, Any] | None:
    """What is committed with a part's records: where a mark does not say what comes next, also how they were read."""
    if part.mark is None or is_stream(part):
        return part.mark
    source = config.ingestion.sources[part.source]
    key, value = part.mark
    return key, [value, digest([source.format, source.columns.model_dump()])]


def _parts(config: Config, index: int, marks: Marks) -> Sequence[Part]:
    source = config.ingestion.sources[index]
    if source.format in FILE_FORMATS:
        return files.parts(source, index, may_be_none=config.ingestion.follow.enabled)
    if source.format == "kafka":
        return kafka.parts(source, index, marks, config.ingestion.follow)
    if source.format == "sql":
        return queries.parts(source, index, marks)
    if source.format == "iceberg":
        return iceberg.parts(source, index, config.storage)
    if source.format == "traffic":
        return exchanges.parts(source, index, Storage(config.serving.storage_uri or config.storage.uri))
    return [SamplePart(source.uri, index, config.ingestion.sample)]


def state(config: Config) -> list[dict[str, Any]]:
    """What would be read if nothing had been, one entry a source: it changes when the source has.

    Raises:
        SourceError: A source is missing or does not answer.
    """
    entries: list[dict[str, Any]] = []
    for index, source in enumerate(config.ingestion.sources):
        parts = _parts(config, index, {})
        size = sum(part.size_bytes for part in parts)
        # What has no mark is read each time, so it is never the same as before.
        marks = digest([mark_of(config, part) or uuid.uuid4().hex for part in parts])
        entries.append({"uri": source.uri, "parts": len(parts), "bytes": size, "digest": marks})
    return entries


def sample_code() -> str:
    """Digest of what the embedded shop's records are made by."""
    return digest([module.read_text() for module in sorted((APP / "ingestion").glob("sample*.py"))])


def read(ingestion: IngestionConfig, parts: Sequence[Part]) -> "Dataset":
    """All records of the parts as a streaming dataset of `RAW` rows."""
    import ray.data

    from app.datasource import Planned

    cpus = cluster.cpus()
    tasks: list[tuple[Callable[[], Any], int]] = [
        (partial(blocks, index, call), size) for index, part in enumerate(parts) for call, size in part.reads(ingestion)
    ]
    # With reservations that are equal Ray Data fuses reading with what follows, so that raw records never pass between
    # tasks; with half a CPU it does not, so that what one large file holds is examined by many.
    share = 1.0 if len(tasks) >= FUSED_TASKS_A_CPU * cpus else 0.5
    records: Dataset = ray.data.read_datasource(
        Planned("RawRecords", tasks), num_cpus=share, override_num_blocks=len(tasks)
    )
    if len(tasks) >= SPARE_TASKS_A_CPU * cpus:
        records.context.execution_options.resource_limits = ray.data.ExecutionResources(cpu=cpus + 1)
    return records
