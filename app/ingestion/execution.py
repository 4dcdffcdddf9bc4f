"""How Ray Data is set up for this stage, and how far it has come."""

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from app.telemetry import progress

BLOCK_BYTES = 16 << 20
"""Size of the blocks that pass between tasks."""


@contextmanager
def ray_data() -> Iterator[None]:
    """Ray Data set up for this stage, and for nothing else in the process."""
    from ray.data import DataContext, ExecutionResources

    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.ERROR)  # plans and warnings stay in Ray Data's own log file
    context = DataContext.get_current()
    options = context.execution_options
    before = context.enable_progress_bars, context.target_max_block_size, options.resource_limits
    context.enable_progress_bars = False
    context.target_max_block_size = BLOCK_BYTES
    options.resource_limits = ExecutionResources(cpu=cpus())
    try:
        yield
    finally:
        context.enable_progress_bars, context.target_max_block_size, options.resource_limits = before


def cpus() -> float:
    """CPUs to work on: no more than there are.

    A local head advertises more than it has, so that Serve's replicas fit; each one used starts a process of
    2 s. Staging 20,000 records on a machine of two CPUs took 22 s with six, 15 s with two.
    """
    import ray

    advertised = float(ray.cluster_resources().get("CPU", 1))
    alone = sum(node["Alive"] for node in ray.nodes()) == 1
    return min(advertised, os.cpu_count() or 1) if alone else advertised


class _Count:
    """An actor that adds up how many records have been checked; a task that is tried again counts again."""

    def __init__(self) -> None:
        self._total = 0

    def add(self, records: int) -> None:
        self._total += records

    def total(self) -> int:
        return self._total


@contextmanager
def counted(what: str) -> Iterator[Any]:
    """A counter for tasks to add to, shown while the block runs."""
    import ray

    count: Any = ray.remote(num_cpus=0)(_Count).remote()
    ended = threading.Event()

    def watch() -> None:
        with progress(what, None, "records") as bar:
            while not ended.wait(1.0):
                bar.update(ray.get(count.total.remote()))
            bar.update(ray.get(count.total.remote()))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield count
    finally:
        ended.set()
        watcher.join(timeout=10.0)
