"""How Ray Data is set up for this stage, and how far it has come."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from app import cluster
from app.errors import StorageError
from app.ingestion.parts import BLOCK_BYTES
from app.ingestion.staging import Staging
from app.telemetry import INGEST_RETRIES, counter, progress


@contextmanager
def ray_data() -> Iterator[None]:
    """Ray Data set up for this stage; all but its start at once is put back afterwards."""
    from ray.data import ExecutionResources

    from app.datasource import start_at_once

    # Plans, warnings and tracebacks stay in Ray Data's own log file: what went wrong, the stage says in a sentence.
    # Others may listen to this logger too, so only its own is told.
    consoles = [handler for handler in logging.getLogger("ray.data").handlers if handler.name == "console"]
    levels = [console.level for console in consoles]
    for console in consoles:
        console.setLevel(logging.CRITICAL)
    context = start_at_once()
    options = context.execution_options
    before = context.enable_progress_bars, context.target_max_block_size, options.resource_limits
    context.enable_progress_bars = False
    context.target_max_block_size = BLOCK_BYTES
    options.resource_limits = ExecutionResources(cpu=cluster.cpus())
    try:
        yield
    finally:
        context.enable_progress_bars, context.target_max_block_size, options.resource_limits = before
        for console, level in zip(consoles, levels, strict=True):
            console.setLevel(level)


@contextmanager
def watched(what: str, staging: Staging) -> Iterator[None]:
    """Progress shown while the block runs, and blocks that are examined again counted; both by what is staged."""
    ended = threading.Event()
    retries, counted = counter(INGEST_RETRIES), 0

    def watch() -> None:
        nonlocal counted
        with progress(what, None, "records") as bar:
            last = False
            while not last:
                last = ended.wait(1.0)
                try:
                    records, again = staging.seen()
                except (OSError, StorageError):
                    continue  # seen again in a second; the tasks say what is wrong with the store
                bar.update(records)
                if again > counted:
                    retries.inc(again - counted)
                    counted = again

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join(timeout=10.0)
