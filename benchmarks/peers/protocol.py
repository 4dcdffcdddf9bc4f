"""How a script is told what to do, and how it tells what it did; the standard library alone.

Task A: read, validate, normalise, mask personal data, drop exact copies, tokenize, pack, write Parquet.
Task B: read, validate, normalise, drop exact copies, write Parquet; nothing is masked.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

BLOCK_TOKENS = 512
BATCH_ROWS = 2_048
PROCESSES = 2


@dataclass(frozen=True)
class Request:
    """One run."""

    task: str
    """A or B"""
    files: tuple[Path, ...]
    """JSONL"""
    tokenizer: Path
    """tokenizer.json"""
    output: Path
    """An empty folder; Parquet files go into its `result`, what else is needed beside it."""

    @property
    def masks(self) -> bool:
        """Whether personal data is masked."""
        return self.task == "A"

    @property
    def result(self) -> Path:
        """Where the Parquet files go."""
        return self.output / "result"


@dataclass(frozen=True)
class Counts:
    """What a run found."""

    kept: int
    """Conversations that are left."""
    duplicates: int
    """Valid ones that are copies of another one."""
    figures: dict[str, float] | None = None
    """What else there is to say."""


def main(work: Callable[[Request], Counts]) -> None:
    """Do the work as often as asked; after each run its seconds and counts are printed as a line of JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("task")
    parser.add_argument("input", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--runs", type=int, default=2)
    options = parser.parse_args()
    files = tuple(sorted(options.input.glob("*.jsonl")))
    for _ in range(options.runs):
        shutil.rmtree(options.output, ignore_errors=True)
        request = Request(options.task, files, options.tokenizer, options.output)
        request.result.mkdir(parents=True)
        started_s = time.monotonic()
        counts = work(request)
        print(json.dumps({"run": time.monotonic() - started_s, **asdict(counts)}), flush=True)
        if not sys.stdin.isatty():
            sys.stdin.readline()  # until what is measured of this run has been read: then processes may end
