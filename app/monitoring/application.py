"""The monitor that stays: a Ray Serve application without a route that measures traffic again and again.

A job's own metrics vanish with its process, so the gauges live here. `jobs.monitor` deploys it.
"""

import logging
import threading
import time
import traceback
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from ray import serve

from app import telemetry
from app.errors import RayloopError
from app.monitoring.gauges import REFRESH_S, Gauges
from app.monitoring.quality import Quality, read
from app.storage import Storage

logger = logging.getLogger(__name__)

APPLICATION = "monitor"
FAILURES_ALLOWED = 3
"""Passes that may fail in a row before the health check does and Serve starts a new replica."""


class MonitorArgs(BaseModel):
    """What the monitor watches."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    storage_uri: str
    window_s: float = Field(gt=0)
    interval_s: float = Field(gt=0)


class Watch:
    """Measures the window every `interval_s` and keeps the gauges set in between."""

    def __init__(self, args: MonitorArgs) -> None:
        self.args = args
        self.storage = Storage(args.storage_uri)
        self.passes = 0
        self.failures = 0
        """Passes that failed since the last one that did not."""
        self.quality: Quality | None = None
        """What the latest pass found; none before the first and after one that failed."""
        self._logged: dict[str, int] = {}
        self._gauges = Gauges()
        self._outcomes = telemetry.counter(telemetry.MONITOR_PASSES)

    def run(self, stopped: threading.Event) -> None:
        """Go on until `stopped` is set. A pass never takes more than half of the time."""
        due_s = 0.0
        while True:
            started_s = time.monotonic()
            if started_s >= due_s:
                self.look()
                took_s = time.monotonic() - started_s
                due_s = started_s + max(self.args.interval_s, 2 * took_s)
            else:
                self.show()
            if stopped.wait(min(REFRESH_S, max(0.0, due_s - time.monotonic()))):
                return

    def look(self) -> None:
        """One pass; whatever goes wrong is counted and logged, never raised."""
        started_s = time.monotonic()
        self.passes += 1
        try:
            self.quality = read(self.storage, self.args.window_s)
            self._gauges.set(self.quality)
        except Exception as error:  # the watch outlives every pass
            self._fail(error)
            return
        self.failures = 0
        self._outcomes.inc(tags={"outcome": "done"})
        found = {"exchanges": self.quality.whole.exchanges, "feedback": self.quality.feedback}
        if found != self._logged:
            self._logged = found
            fields = found | {"seconds": round(time.monotonic() - started_s, 3)}
            logger.info("traffic has changed", extra={"fields": fields})

    def show(self) -> None:
        """Set the gauges again, so that they do not vanish before the next pass."""
        try:
            if self.quality is not None:
                self._gauges.set(self.quality)
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self.quality = None
        self.failures += 1
        self._outcomes.inc(tags={"outcome": "failed"})
        fields = {"why": explain(error), "failures": self.failures}
        logger.warning("a pass over the traffic failed", extra={"fields": fields})


def explain(error: Exception) -> str:
    """What went wrong and where, without the message of a library's error: that may quote a customer."""
    if isinstance(error, RayloopError):
        return str(error)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {frame.name} ({frame.filename}:{frame.lineno})"


class Monitor:
    """The one replica: a watch in a thread of its own."""

    def __init__(self, args: MonitorArgs) -> None:
        telemetry.set_up_logging(application=APPLICATION)
        self._watch = Watch(args)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch.run, args=(self._stopped,), daemon=True, name="watch")
        self._thread.start()

    def check_health(self) -> None:
        """Raises when passes keep failing or the watch has ended."""
        if not self._thread.is_alive():
            raise RuntimeError("the watch has ended: see the replica's log")
        if self._watch.failures >= FAILURES_ALLOWED:
            raise RuntimeError(f"the last {self._watch.failures} passes over the traffic failed: see the replica's log")

    def figures(self) -> dict[str, Any]:
        """What the latest pass found, for callers with a handle."""
        quality = self._watch.quality
        return {
            "passes": self._watch.passes,
            "failures": self._watch.failures,
            **(quality.figures() if quality else {}),
        }

    def stop(self) -> None:
        """End the watch."""
        self._stopped.set()
        self._thread.join()


def build_app(args: MonitorArgs) -> serve.Application:
    """The application; Serve's configuration file and REST API call this with the arguments checked."""
    deployment = serve.deployment(
        name=APPLICATION,
        num_replicas=1,
        # It reads a little now and then: it must find a place on a cluster that training has filled.
        ray_actor_options={"num_cpus": 0},
        health_check_period_s=5,
    )(Monitor)
    return deployment.bind(args)
