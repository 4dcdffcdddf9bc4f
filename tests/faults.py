"""Faults that tests make: where one lands follows from a seed, that it happened is asked for, and its end is timed.

    @pytest.mark.fault("F8", seen="the read under way failed")
    def test_a_server_that_stops_is_named(fault: Fault) -> None:
        read(fault.random.randrange(20_000))
        stop()
        fault.happened()
        ...
        fault.recovered()

A test makes its fault once, with seed 0; `RAYLOOP_FAULT_SEEDS=3` makes it with the seeds 0, 1 and 2. A test that takes
`fault` fails where no fault happened. `python -m benchmarks.faults` makes a table of them all.
"""

import os
import random
import time
from collections.abc import Callable

SEEDS = range(int(os.environ.get("RAYLOOP_FAULT_SEEDS", "1")))


class Fault:
    """One fault, and what is told of it."""

    def __init__(self, seed: int, tell: Callable[[str, object], None]) -> None:
        self.seed = seed
        self.random = random.Random(seed)
        """Says where and when it lands."""
        self.has_happened = False
        self._tell = tell
        self._since_s = 0.0

    def happened(self, ago_s: float = 0.0) -> None:
        """It was seen. For an outage: it was, and is over. Recovery counts from here."""
        self.has_happened = True
        self._since_s = time.monotonic() - ago_s

    def recovered(self) -> None:
        """The right result is there."""
        assert self.has_happened
        self._tell("recovery_s", round(time.monotonic() - self._since_s, 2))
