"""OpenLineage events: each run of a job told to a catalogue of data as it starts, goes on and ends.

    with reporting(config, "ingest", job_id) as run:
        run.start(inputs)
        ...
        run.complete(outputs, figures)

A batch is START, then COMPLETE, FAIL (refusals too) or ABORT (SIGTERM). A stream is one run for as long as it goes on:
START, one RUNNING for each micro-batch that made a table version, then one of the three; so the specification has it
for long-running jobs, and a run for each micro-batch would be thousands of runs a day of what is one job.

Events hold no personal data and no secrets. A server that is down stops nothing: it is warned of, and waited for no
longer than `TIMEOUT_S`, then `IMPATIENT_S` for each further event.
"""

import logging
import os
import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import UTC, datetime
from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from app.config import Config
from app.errors import ConfigError, RayloopError
from app.openlineage_datasets import inputs, outputs
from app.openlineage_names import public
from app.storage import resolve

if TYPE_CHECKING:
    from openlineage.client import OpenLineageClient
    from openlineage.client.event_v2 import RunEvent
    from openlineage.client.facet_v2 import RunFacet

logger = logging.getLogger(__name__)

PRODUCER = "urn:rayloop"
TIMEOUT_S = 5.0
IMPATIENT_S = 1.0
"""After a failure, and at SIGTERM: `ray job stop` kills 3 s after it has asked."""
PARENT = "OPENLINEAGE_PARENT_ID"
"""Environment variable of the run that started this one, namespace/job/run id, as other integrations have it."""

_current: "ContextVar[Run | None]" = ContextVar("openlineage_run", default=None)


class Run:
    """One run of a job; without `lineage.openlineage_uri` it tells nobody."""

    def __init__(self, config: Config, job: str, job_id: str, enabled: bool = True) -> None:
        self._config, self._job, self._job_id = config, job, job_id
        self._streams = job == "ingest" and config.ingestion.follow.enabled
        self._within_s = TIMEOUT_S
        self._started = self._ended = False
        self._taken: Any = {}
        self._client = None
        if enabled and config.lineage.openlineage_uri:
            from openlineage.client.uuid import generate_new_uuid

            self._client = _client(config.lineage.openlineage_uri)
            self._run_id = str(generate_new_uuid())
            self._parent = _parent()

    def start(self, taken: Any) -> None:
        """The run begins, with these inputs, as the job's last line has them."""
        self._taken, self._started = taken, True
        self._emit("START")

    def running(self, given: Mapping[str, Any]) -> None:
        """A micro-batch has made these outputs."""
        self._emit("RUNNING", given)

    def complete(self, given: Mapping[str, Any], figures: Mapping[str, Any], written: bool = True) -> None:
        """The run has ended well, with these outputs; not `written`: they had been there before."""
        kept = figures.get("records_kept") if self._streams else None
        self._emit("COMPLETE", given, figures.get("records_read"), kept if written else 0)

    def end(self, state: str, message: str) -> None:
        """The run has ended otherwise: FAIL or ABORT, with a reason."""
        if self._client is None or self._ended:
            return
        from openlineage.client.facet_v2 import error_message_run

        if state == "ABORT":
            self._within_s = IMPATIENT_S
        if not self._started:
            self.start({})
        told = error_message_run.ErrorMessageRunFacet(_harmless(self._config, message), "python")
        self._emit(state, facets={"errorMessage": told})

    def child_environment(self) -> dict[str, str]:
        """What a job that this one starts is to have in its environment, to name this run as its parent."""
        return {PARENT: f"{self._config.lineage.namespace}/{self._job}/{self._run_id}"} if self._client else {}

    def _emit(
        self, state: str, given: Any = None, read: int | None = None, written: int | None = None,
        facets: "Mapping[str, RunFacet] | None" = None,
    ) -> None:  # fmt: skip
        if self._client is None:
            return
        from openlineage.client import event_v2

        self._ended = state in ("COMPLETE", "FAIL", "ABORT")
        event = event_v2.RunEvent(
            eventType=event_v2.RunState(state),
            eventTime=datetime.now(UTC).isoformat(),
            run=event_v2.Run(self._run_id, {**self._run_facets(), **(facets or {})}),
            job=event_v2.Job(self._config.lineage.namespace, self._job, self._job_facets()),
            inputs=inputs(self._config, self._taken, read),
            outputs=outputs(self._config, given, self._taken, written),
        )
        if problem := self._send(self._client, event):
            self._within_s = IMPATIENT_S
            logger.warning(
                "the %s event of %s was not delivered to %s (%s); the job goes on",
                state, self._job, self._config.lineage.openlineage_uri, problem,
            )  # fmt: skip

    def _send(self, client: "OpenLineageClient", event: "RunEvent") -> str | None:
        """Why the event was not delivered in time; none if it was."""
        problems = list[str]()

        def emit() -> None:
            try:
                client.emit(event)
            except (OSError, RuntimeError) as error:  # what requests and the file transport raise
                problems.append(public(str(error))[:300])

        # A timeout of the HTTP client alone bounds each wait for bytes, not their sum.
        sender = threading.Thread(target=emit, daemon=True)
        sender.start()
        sender.join(self._within_s)
        return f"no answer within {self._within_s:g} s" if sender.is_alive() else next(iter(problems), None)

    def _run_facets(self) -> "dict[str, RunFacet]":
        from openlineage.client.facet_v2 import external_query_run, parent_run, processing_engine_run

        versions = installed("ray"), "ray", installed("openlineage-python")
        facets: dict[str, RunFacet] = {"processing_engine": processing_engine_run.ProcessingEngineRunFacet(*versions)}
        if self._job_id != "local":
            facets["externalQuery"] = external_query_run.ExternalQueryRunFacet(self._job_id, "ray")
        if self._parent is not None:
            namespace, name, run_id = self._parent
            facets["parent"] = parent_run.ParentRunFacet(parent_run.Run(run_id), parent_run.Job(namespace, name))
        return facets

    def _job_facets(self) -> dict[str, Any]:
        from openlineage.client.facet_v2 import job_type_job

        kind = "STREAMING" if self._streams else "BATCH"
        return {"jobType": job_type_job.JobTypeJobFacet(processingType=kind, integration="RAYLOOP", jobType="JOB")}


@contextmanager
def reporting(config: Config, job: str, job_id: str, enabled: bool = True) -> Iterator[Run]:
    """A run of a job; what ends the block early ends the run with FAIL or ABORT, and is raised on."""
    run = Run(config, job, job_id, enabled)
    token = _current.set(run)
    try:
        yield run
    except (SystemExit, KeyboardInterrupt):
        run.end("ABORT", "stopped by a signal")
        raise
    except RayloopError as error:
        run.end("FAIL", str(error))
        raise
    except Exception as error:
        # Its text may hold anything: what a record says, or what a library was called with.
        run.end("FAIL", f"unexpected {type(error).__name__}")
        raise
    finally:
        _current.reset(token)


def running(given: Mapping[str, Any]) -> None:
    """The run that this code is part of, if there is one, has made these outputs."""
    if run := _current.get():
        run.running(given)


def child_environment() -> dict[str, str]:
    """As `Run.child_environment`, of the run that this code is part of."""
    run = _current.get()
    return run.child_environment() if run else {}


def _parent() -> tuple[str, str, str] | None:
    """Namespace, job and run id of the run that started this one.

    Raises:
        ConfigError: What the environment says of it cannot be read.
    """
    named = os.environ.get(PARENT)
    if not named:
        return None
    match named.rsplit("/", 2):
        case [namespace, name, run_id] if _is_uuid(run_id):
            return namespace, name, run_id
    raise ConfigError(f"{PARENT} is {named!r}", "write it as namespace/job/run id, the last a UUID, or unset it")


def _is_uuid(text: str) -> bool:
    try:
        uuid.UUID(text)
    except ValueError:
        return False
    return True


def _client(uri: str) -> "OpenLineageClient":
    from openlineage.client import OpenLineageClient
    from openlineage.client.facet_v2 import set_producer
    from openlineage.client.transport.file import FileConfig, FileTransport
    from openlineage.client.transport.http import HttpConfig, HttpTransport

    set_producer(PRODUCER)
    if urlsplit(uri).scheme in ("http", "https"):
        key = os.environ.get("OPENLINEAGE_API_KEY")
        settings = {
            "url": uri.rstrip("/") + "/",  # without the slash a path would be replaced
            "timeout": TIMEOUT_S,
            "retry": {"total": 0, "connect": 0, "read": 0, "status_forcelist": []},
            **({"auth": {"type": "api_key", "apiKey": key}} if key else {}),
        }
        return OpenLineageClient(transport=HttpTransport(HttpConfig.from_dict(settings)))
    path = Path(resolve(uri.removeprefix("file://")))
    with suppress(OSError):  # writing to it will say so
        path.parent.mkdir(parents=True, exist_ok=True)
    return OpenLineageClient(transport=FileTransport(FileConfig(log_file_path=str(path), append=True)))


def _harmless(config: Config, message: str) -> str:
    """A reason without credentials and personal data."""
    from app.privacy import Detector, Mask

    # Numbers are left: most of them are snapshots and offsets.
    looked_for = config.ingestion.privacy.model_copy(update={"kinds": ("email", "iban", "secret")})
    try:
        return Mask(Detector.of(looked_for)).text(public(message))
    except ConfigError as error:
        return f"not told, since it cannot be searched for secrets ({error.what})"
