"""One batch as tasks: every record examined, all of them compared, data files written that nobody sees yet."""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from app import cluster, tables
from app.config import Config
from app.errors import RayloopError, StageFailed
from app.ingestion import sources
from app.ingestion.checks import rule_of
from app.ingestion.decision import REPEATED_ID, VERDICTS, decided
from app.ingestion.examination import Examiner, examine
from app.ingestion.execution import ray_data, watched
from app.ingestion.finalisation import Finaliser, Outcome, Target, finalise
from app.ingestion.history import History, held_refusals
from app.ingestion.parts import Part
from app.ingestion.quality import Rules
from app.ingestion.similarity import near_duplicates
from app.ingestion.staging import BlockName, Staging, hash_below
from app.ingestion.streams import first_line
from app.privacy import Detector
from app.storage import Storage

if TYPE_CHECKING:
    from pyiceberg.table import Table

SHARE_CHARS = 128 << 20
"""Text that one data file holds at most, about."""
LEAST_SHARE_CHARS = 8 << 20
"""Less is not worth a task of its own."""
SKETCHED = 10_000
"""Conversations that the new version is described by."""


def process(
    config: Config, parts: Sequence[Part], kept_table: "Table", refused_table: "Table", history: History
) -> Outcome:
    """All records of the parts as data files of the two tables, not committed yet.

    Raises:
        SourceError: A part cannot be read to its end; no data file has been written.
    """
    import ray

    staging = Staging(Storage(config.storage.uri), tables.fresh_name())
    try:
        keys = _examined(config, parts, staging, history)
        held = history.keys(kept_table)
        refuse = rule_of(config.ingestion, REPEATED_ID).severity != "warn"
        verdicts, chars = cluster.collect(
            [cluster.submit(_decided, keys, held, refuse), cluster.submit(_blocks_of, keys)]
        )
        if config.ingestion.near_duplicates.detect:
            gone = verdicts if refuse else verdicts.filter(pc.not_equal(verdicts["verdict"], REPEATED_ID))
            similar = near_duplicates(keys, held, gone, staging, config.ingestion.near_duplicates.threshold)
            verdicts = pa.concat_tables([verdicts, similar.cast(VERDICTS)])
        shares = list(_shares(sorted(chars), [chars[block] for block in sorted(chars)], int(cluster.cpus())))
        common = ray.put(
            Finaliser(
                staging, Target.of(kept_table), Target.of(refused_table), config.ingestion,
                history.baseline(kept_table, staging, shares), held_refusals(refused_table),
                hash_below(SKETCHED / max(1, sum(block.rows for share in shares for block in share))),
            )
        )  # fmt: skip
        tasks = [
            cluster.submit(finalise, share, _verdicts_on(share, verdicts), number, common)
            for number, share in enumerate(shares)
        ]
        return Outcome.sum(cluster.collect(tasks))
    finally:
        staging.remove()


def _examined(config: Config, parts: Sequence[Part], staging: Staging, history: History) -> list[Any]:
    """References to tables of `KEYS`: every record is examined and staged."""
    from ray.exceptions import RayError

    ingestion = config.ingestion
    examiner = Examiner(
        parts=[(part.uri, part.source, part.arrived_at) for part in parts],
        sources=ingestion.sources,
        rules=Rules.of(ingestion, datetime.now(UTC)),
        checks=ingestion.checks,
        detector=Detector.of(ingestion.privacy) if ingestion.privacy.mask else None,
        imputer=history.imputer(),
        validation_fraction=ingestion.validation_fraction,
        sign=ingestion.near_duplicates.detect,
        score=ingestion.anomalies.detect,
        staging=staging,
    )
    try:
        with ray_data(), watched("ingest", staging):
            rows = sources.read(ingestion, parts)
            keys = rows.map_batches(partial(examine, examiner=examiner), batch_size=None, batch_format="pyarrow")
            return list(keys.to_arrow_refs())
    except RayError as error:
        raise _cause(error) from None


def _decided(keys: list[Any], held: list[Any], refuse_repeated_ids: bool) -> pa.Table:
    import ray

    before = [table.drop_columns(["minhash"]) for table in ray.get(held)]
    return decided(ray.get(keys), before, refuse_repeated_ids)


def _blocks_of(keys: list[Any]) -> dict[BlockName, int]:
    """The staged blocks, and how many characters each holds."""
    import ray

    chars: dict[BlockName, int] = {}
    for table in ray.get(keys):
        grouped = table.group_by(["part", "start", "rows"]).aggregate([("chars", "sum")]).to_pylist()
        for row in grouped:
            chars[BlockName(row["part"], row["start"], row["rows"])] = row["chars_sum"] or 0
    return chars


def _shares(blocks: Sequence[BlockName], chars: Sequence[int], cpus: int) -> Iterator[list[BlockName]]:
    """The blocks in shares for one task each: large enough for a data file, enough of them for the CPUs."""
    rounds = max(1, -(-sum(chars) // (SHARE_CHARS * max(1, cpus))))
    limit = max(LEAST_SHARE_CHARS, -(-sum(chars) // (rounds * max(1, cpus))))
    share: list[BlockName] = []
    size = 0
    for block, count in zip(blocks, chars, strict=True):
        share.append(block)
        size += count
        if size >= limit:
            yield share
            share, size = [], 0
    if share:
        yield share


def _verdicts_on(blocks: Sequence[BlockName], verdicts: pa.Table) -> pa.Table:
    wanted = {(block.part, block.start) for block in blocks}
    pairs = zip(verdicts["part"].to_pylist(), verdicts["start"].to_pylist(), strict=True)
    return verdicts.filter(pa.array([pair in wanted for pair in pairs], pa.bool_()))


def _cause(error: Exception) -> Exception:
    """Our own error that a task ended with, or what its loss means."""
    inner: BaseException | None = error
    while inner is not None:
        for found in (getattr(inner, "cause", None), inner):
            if isinstance(found, RayloopError) and type(found).__module__ == RayloopError.__module__:
                return found
        inner = inner.__cause__
    return StageFailed(f"a task was lost ({type(error).__name__}: {first_line(error)})", "submit the job again")
