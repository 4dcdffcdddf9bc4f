"""datatrove: LocalPipelineExecutor with 2 workers; its own exact dedup, of 64-bit hashes, in three stages.

Its JSONL reader gives up a file at the first byte that is not UTF-8, so lines are read by a reader of our own.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

os.environ["DATATROVE_COLORIZE_LOGS"] = "0"

import pyarrow.parquet as pq
from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup import ExactDedupConfig, ExactDedupFilter, ExactDedupSignature, ExactFindDedups
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.readers.base import BaseDiskReader
from datatrove.pipeline.writers import JsonlWriter, ParquetWriter
from datatrove.utils.logging import logger

from benchmarks.peers.protocol import BATCH_ROWS, PROCESSES, Counts, Request, main
from benchmarks.peers.records import Packer, cleaned, row_of


class Conversations(BaseDiskReader):
    """Lines to valid, normalised, masked conversations."""

    name = "conversations"

    def __init__(self, folder: str, masks: bool) -> None:
        super().__init__(folder, glob_pattern="*.jsonl", add_file_path=False)
        self.masks = masks

    def read_file(self, filepath: str) -> Iterator[Document]:
        with self.data_folder.open(filepath, "rb") as lines:
            for line in lines:
                found = cleaned(line, self.masks)
                if found is not None:
                    row = row_of(found)
                    row["started_at"] = row["started_at"] and row["started_at"].isoformat()
                    yield Document(text=row["content_hash"], id=row["conversation_id"], metadata=row)


class Pack(PipelineStep):
    """Documents to Parquet files of packed blocks."""

    name = "pack"

    def __init__(self, request: Request) -> None:
        super().__init__()
        self.request = request

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> None:
        packer = Packer(self.request.tokenizer)
        batch: list[Any] = []
        writer = None
        for document in data:
            batch.append(document.metadata["messages"])
            if len(batch) == BATCH_ROWS:
                writer = self._write(packer, batch, writer, rank)
                batch = []
        if batch:
            writer = self._write(packer, batch, writer, rank)
        if writer is not None:
            writer.close()

    def _write(self, packer: Packer, batch: list[Any], writer: Any, rank: int) -> Any:
        table = packer.blocks(batch)
        writer = writer or pq.ParquetWriter(self.request.result / f"{rank}.parquet", table.schema)
        writer.write_table(table)
        return writer


def key(document: Document) -> bytes:
    """What copies share."""
    return document.text.encode()


def run(pipeline: list[Any], output: Path, stage: str) -> Any:
    """A stage with 2 workers; returns its statistics."""
    folder = str(output / "logs" / stage)
    # forkserver, its default, imports everything again in each worker of each stage.
    return LocalPipelineExecutor(
        pipeline, tasks=PROCESSES, workers=PROCESSES, logging_dir=folder, start_method="fork"
    ).run()


def work(request: Request) -> Counts:
    """All three stages."""
    output = request.output
    config = ExactDedupConfig(content_getter=key)
    clean, signatures, copies = (str(output / name) for name in ("clean", "signatures", "copies"))
    reader = Conversations(str(request.files[0].parent), request.masks)
    writer = JsonlWriter(clean, compression=None)
    run([reader, writer, ExactDedupSignature(signatures, config, finder_workers=PROCESSES)], output, "1")
    run([ExactFindDedups(signatures, copies, config, lines_to_buffer=10_000)], output, "2")
    last = (
        Pack(request)
        if request.task == "A"
        else ParquetWriter(str(request.result), batch_size=BATCH_ROWS, use_content_defined_chunking=False)
    )
    stats = run([JsonlReader(clean, add_file_path=False), ExactDedupFilter(copies, config), last], output, "3")
    figures = next(entry.stats for entry in stats.stats if "stage 3" in entry.name)
    kept, dropped = (int(figures[name].total) if name in figures else 0 for name in ("forwarded", "dropped"))
    return Counts(kept, dropped)


if __name__ == "__main__":
    logger.remove()
    main(work)
