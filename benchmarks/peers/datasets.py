"""Hugging Face datasets: `map(batched=True, num_proc=2)`, copies dropped by an index over the hash column.

Bytes that are not UTF-8 are replaced by its text reader, so that character refuses a line here.
"""

import logging
import os
from typing import Any

os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, List, Value, load_dataset

from benchmarks.peers.protocol import BATCH_ROWS, PROCESSES, Counts, Request, main
from benchmarks.peers.records import Packer, cleaned, row_of

MESSAGE = {"role": Value("string"), "content": Value("string"), "intent": Value("string")}
NAMES = ("conversation_id", "channel", "language", "started_at", "intent", "messages", "content_hash")
FEATURES = Features(
    {name: Value("string") for name in NAMES}
    | {"messages": List(MESSAGE), "started_at": Value("timestamp[us, tz=UTC]")}
)


def clean(batch: dict[str, list[str]], masks: bool) -> dict[str, list[Any]]:
    """The valid conversations of some lines."""
    found = [cleaned(line.encode(), masks) for line in batch["text"] if "\ufffd" not in line]
    rows = [row_of(entry) for entry in found if entry is not None]
    return {name: [row[name] for row in rows] for name in NAMES}


def pack(batch: dict[str, Any], request: Request) -> pa.Table:
    """Blocks of some conversations."""
    return Packer(request.tokenizer).blocks(batch["messages"])


def work(request: Request) -> Counts:
    """Read, map, select, map, write."""
    cache = str(request.output / "cache")
    lines = load_dataset(
        "text", data_files=[str(file) for file in request.files], split="train", cache_dir=cache,
        num_proc=PROCESSES, encoding_errors="replace",
    )  # fmt: skip
    common = {"batched": True, "batch_size": BATCH_ROWS, "num_proc": PROCESSES, "load_from_cache_file": False}
    rows = lines.map(clean, fn_kwargs={"masks": request.masks}, remove_columns=["text"], features=FEATURES, **common)
    hashes = rows.data.column("content_hash").combine_chunks()
    _, first = np.unique(np.asarray(hashes.to_pylist(), dtype="S64"), return_index=True)
    kept: Dataset = rows.select(np.sort(first))
    if request.task == "A":
        result = kept.select_columns(["messages"]).map(
            pack, fn_kwargs={"request": request}, remove_columns=["messages"], **common
        )
    else:
        result = kept
    result.to_parquet(str(request.result / "0.parquet"), batch_size=BATCH_ROWS)
    return Counts(len(kept), len(rows) - len(kept))


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    main(work)
