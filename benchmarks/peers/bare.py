"""The product's own functions in a pool of 2 processes: no Ray, no commit. What is slower than this is our plumbing.

Every file that the product writes is written here too: staged blocks, the data files of the table, packed blocks.
"""

import multiprocessing
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache, partial
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from app.conversation import SCHEMA
from app.ingestion import batch, examination, files
from app.ingestion.decision import decided
from app.ingestion.finalisation import Finaliser, Outcome, Target, finalise
from app.ingestion.imputation import Imputer
from app.ingestion.parts import block
from app.ingestion.quality import Rules
from app.ingestion.quarantine import QUARANTINE
from app.ingestion.staging import BlockName, Staging, hash_below
from app.privacy import Detector
from app.settings.ingestion import IngestionConfig
from app.storage import Storage
from app.training import data
from benchmarks.peers.product import copies_in, settings
from benchmarks.peers.protocol import BATCH_ROWS, BLOCK_TOKENS, PROCESSES, Counts, Request, main


def ingestion(request: Request) -> IngestionConfig:
    """The configuration that the product gets as well."""
    return settings(request).ingestion


def examine(part: int, found: Sequence[files.FilePart], examiner: examination.Examiner) -> list[pa.Table]:
    """A file read, examined and staged: tables of keys."""
    source = examiner.sources[0]
    return [examination.examine(block(part, piece), examiner) for piece in files.read(found[part], source, BATCH_ROWS)]


def finish(task: tuple[int, list[BlockName], pa.Table], finaliser: Finaliser, request: Request) -> Outcome:
    """A share of the blocks made into a data file, and that one into packed blocks."""
    number, blocks, verdicts = task
    outcome = finalise(blocks, verdicts, number, finaliser)
    if request.task == "A":
        tokenizer = load_tokenizer(request.tokenizer.parent)
        for uri in outcome.kept_files:
            _pack(uri.removeprefix("file://"), tokenizer, request.result / f"{number}.parquet")
    return outcome


@cache
def workers() -> Pool:
    """The processes: they stay for the next run, as Ray's do."""
    return multiprocessing.get_context("spawn").Pool(PROCESSES)


@cache
def load_tokenizer(folder: Path) -> Any:
    """Once a process, as a worker does."""
    from app import model

    return model.load_tokenizer(str(folder))


def _pack(path: str, tokenizer: Any, target: Path) -> None:
    writer = None
    for rows in pq.ParquetFile(path).iter_batches(BATCH_ROWS, columns=["messages"]):
        columns = data._pack_batch(pa.table(rows), tokenizer, BLOCK_TOKENS, "assistant")
        arrays = [pa.FixedSizeListArray.from_arrays(column.ravel(), BLOCK_TOKENS) for column in columns.values()]
        table = pa.table(arrays, names=list(columns))
        writer = writer or pq.ParquetWriter(target, table.schema, **data.PARQUET)
        writer.write_table(table)
    if writer is not None:
        writer.close()


def work(request: Request) -> Counts:
    """Examine, decide, finalise and pack."""
    config = ingestion(request)
    staging = Staging(Storage(str(request.output)), "run")
    found = files.parts(config.sources[0], 0)
    examiner = examination.Examiner(
        [(file.uri, 0, file.arrived_at) for file in found], config.sources, Rules.of(config, datetime.now(UTC)),
        config.checks, Detector.of(config.privacy) if config.privacy.mask else None, Imputer(config.imputation),
        config.validation_fraction, False, False, staging,
    )  # fmt: skip
    kept = f"file://{request.result if request.task == 'B' else request.output / 'table'}"
    targets = (Target(kept, {}, SCHEMA), Target(f"file://{request.output}/refused", {}, QUARANTINE))
    pool = workers()
    each = pool.map(partial(examine, found=found, examiner=examiner), range(len(found)), chunksize=1)
    keys = [table for tables in each for table in tables]
    verdicts = decided(keys, [])
    chars: dict[BlockName, int] = {}
    for table in keys:
        name = BlockName(*(table[column][0].as_py() for column in ("part", "start", "rows")))
        chars[name] = sum(table["chars"].to_pylist())
    names = sorted(chars)
    shares = list(batch._shares(names, [chars[name] for name in names], PROCESSES))
    finaliser = Finaliser(
        staging, *targets, config, None, _no_hashes(), hash_below(batch.SKETCHED / sum(name.rows for name in names))
    )
    tasks = [(number, share, batch._verdicts_on(share, verdicts)) for number, share in enumerate(shares)]
    outcome = Outcome.sum(pool.map(partial(finish, finaliser=finaliser, request=request), tasks, chunksize=1))
    return Counts(outcome.kept, copies_in(outcome))


def _no_hashes() -> Any:
    import numpy as np

    return np.empty(0, np.uint64)


if __name__ == "__main__":
    main(work)
