"""Ray Serve applications, deployed by configuration through the dashboard's REST API.

An application outlives the job that deployed it. Ray deletes the code that a job was submitted with some time
after nobody refers to it any more, and a replica that is replaced after that could not start. So the code is
packaged into `code/<digest>.zip` below the storage root, and the application's runtime environment names that.
"""

import contextlib
import io
import re
import socket
import time
import zipfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

from app.errors import ClusterError, ConfigError, StageFailed
from app.storage import Storage
from app.versions import APP

POLL_S = 0.5
RETRY_S = (0.5, 1.0, 2.0, 4.0)
"""Waits before the dashboard is asked again where it could not reach Serve's controller."""
T = TypeVar("T")
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_PACKAGED = (".py", ".c", ".html", ".css", ".js")
_SCHEMES = {"s3": "s3", "gs": "gs", "abfs": "abfss", "abfss": "abfss"}


class _Unreachable(StageFailed):
    """The dashboard cannot reach Serve's controller; it may have done what it was told to."""


def package_code(storage: Storage) -> str:
    """Put a zip of `app/` below the storage root, if it is not there yet; returns its URI for a runtime environment.

    The same code gives the same bytes and the same name.

    Raises:
        ConfigError: Ray cannot fetch code from that kind of storage.
    """
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as package:
        for file in sorted(file for file in APP.rglob("*") if file.suffix in _PACKAGED):
            # Ray takes a single top-level folder away when it unpacks, so there is one to be taken away.
            entry = zipfile.ZipInfo(f"rayloop/app/{file.relative_to(APP).as_posix()}")
            entry.external_attr = 0o644 << 16
            package.writestr(entry, file.read_bytes())
    name = f"{sha256(content.getvalue()).hexdigest()[:32]}.zip"
    if not storage.exists("code", name):
        storage.write(content.getvalue(), "code", name)
    if storage.is_local:
        return Path(storage.path("code", name)).as_uri()
    scheme, _, path = storage.uri("code", name).partition("://")
    if scheme not in _SCHEMES:
        raise ConfigError(
            f"Ray cannot fetch code from {scheme}://", f"storage.uri must be local or {', '.join(_SCHEMES)}"
        )
    return f"{_SCHEMES[scheme]}://{path}"


def deploy(application: dict[str, Any], http: dict[str, Any] | None = None, timeout_s: float = 180.0) -> float:
    """Deploy one application beside those that run, and wait until it does; returns the seconds that took.

    Args:
        application: As in Serve's configuration: name, route_prefix, import_path, runtime_env, args.
        http: `host` and `port` to listen on. Serve listens on one address only: it must be the one in use, if any.

    Raises:
        StageFailed: It did not become healthy; what Serve says is in the message. What ran under that name
            before is deployed again (or the message says why not); where nothing did, nothing is left.
        ClusterError: The dashboard cannot be reached, or the address cannot be listened on.
    """
    begun_s = time.monotonic()
    details = _details()
    options = _http_options(details, http)
    before = _configs(details)
    name = application["name"]
    try:
        _put({**before, name: application}, options)
        _wait_until_running(name, timeout_s)
    except StageFailed as failure:
        try:
            _put(before, options)
            if name in before:
                _wait_until_running(name, timeout_s)
        except (StageFailed, ClusterError) as second:
            what = f"{failure.what}. What ran before could not be deployed again: {second.what}"
            raise StageFailed(what, failure.remedy) from failure
        if name not in before:
            raise
        raise StageFailed(f"{failure.what}. What ran before is serving again", failure.remedy) from None
    return time.monotonic() - begun_s


def remove(name: str) -> None:
    """Take an application that was deployed by configuration away; the others stay."""
    details = _details()
    left = {key: value for key, value in _configs(details).items() if key != name}
    _put(left, _http_options(details, None))


def status(name: str) -> str:
    """NOT_STARTED, DEPLOYING, RUNNING, DEPLOY_FAILED, UNHEALTHY or DELETING."""
    return str(_details().get("applications", {}).get(name, {}).get("status", "NOT_STARTED"))


def deployed(name: str) -> dict[str, Any] | None:
    """The configuration of an application that runs now, or none."""
    application = _details().get("applications", {}).get(name, {})
    return application.get("deployed_app_config") if application.get("status") == "RUNNING" else None


def replicas(name: str) -> list[dict[str, Any]]:
    """The replicas of an application: deployment, state, node, process id."""
    deployments = _details().get("applications", {}).get(name, {}).get("deployments", {})
    return [
        {"deployment": deployment, **replica}
        for deployment, details in deployments.items()
        for replica in details.get("replicas", [])
    ]


def _client() -> Any:
    from ray.dashboard.modules.serve.sdk import ServeSubmissionClient
    from ray.dashboard.utils import get_address_for_submission_client

    # Its address is RAY_API_SERVER_ADDRESS, else that of the cluster at RAY_ADDRESS or on this machine.
    return ServeSubmissionClient(get_address_for_submission_client(None))


def _with_retries(request: Callable[[Any], T]) -> T:
    """What the dashboard answers to a request that may be made twice.

    Raises:
        ClusterError: It cannot be reached, or refused the token.
        StageFailed: Serve refused, or its controller cannot be reached.
    """
    for wait_s in RETRY_S:
        try:
            return _answer(request)
        except _Unreachable:
            time.sleep(wait_s)
    return _answer(request)


def _answer(request: Callable[[Any], T]) -> T:
    from ray.exceptions import AuthenticationError
    from requests import RequestException

    try:
        return request(_client())
    except (ConnectionError, RequestException) as error:
        raise ClusterError(
            f"the Ray dashboard cannot be reached ({error})", "check that the cluster runs and RAY_API_SERVER_ADDRESS"
        ) from error
    except AuthenticationError as error:
        raise ClusterError(f"the Ray dashboard refused the token ({error})", "set RAY_AUTH_TOKEN_PATH") from error
    except RuntimeError as error:
        said = str(error)
        if "ActorUnavailableError" in said:
            raise _Unreachable(f"Ray Serve's controller cannot be reached: {_brief(said)}", "try again") from error
        raise StageFailed(f"Ray Serve refused: {_brief(said) if 'Traceback' in said else said}") from error


def _details() -> dict[str, Any]:
    details: dict[str, Any] = _with_retries(lambda client: client.get_serve_details())
    return details


def _configs(details: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The configurations of all applications that were deployed by one; a deployment replaces them all at once."""
    return {
        name: application["deployed_app_config"]
        for name, application in details.get("applications", {}).items()
        if application.get("deployed_app_config")
        and application.get("source") == "declarative"
        and application.get("status") != "DELETING"
    }


def _put(applications: dict[str, dict[str, Any]], options: dict[str, Any]) -> None:
    local = options["host"] in ("127.0.0.1", "localhost", "::1")
    wanted = {
        "applications": list(applications.values()),
        "http_options": options,
        "proxy_location": "HeadOnly" if local else "EveryNode",
        # Paths and statuses are in our own log; bodies and headers are nowhere.
        "logging_config": {"enable_access_log": False},
    }
    _with_retries(lambda client: client.deploy_applications(wanted))


def _http_options(details: dict[str, Any], http: dict[str, Any] | None) -> dict[str, Any]:
    """The address to listen on.

    Raises:
        ClusterError: Serve listens elsewhere already, or another program does there.
    """
    current = details.get("http_options") if details.get("controller_info") else None
    if current:
        wanted = http or current
        if (wanted["host"], wanted["port"]) != (current["host"], current["port"]):
            raise ClusterError(
                f"Ray Serve listens on {current['host']}:{current['port']} and cannot move to "
                f"{wanted['host']}:{wanted['port']} while it runs",
                f"set serving.port={current['port']}, or `serve shutdown` first",
            )
        return {"host": current["host"], "port": current["port"]}
    wanted = http or {"host": "127.0.0.1", "port": 8000}
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((wanted["host"], wanted["port"]))
        except OSError as error:
            raise ClusterError(
                f"cannot listen on {wanted['host']}:{wanted['port']} ({error.strerror})",
                "end the program that does, or set serving.port to a free one",
            ) from error
    return wanted


def _wait_until_running(name: str, timeout_s: float) -> None:
    deadline_s = time.monotonic() + timeout_s
    application: dict[str, Any] = {}
    while time.monotonic() < deadline_s:
        # Without its controller nothing is known yet; one that is unhealthy gets another replica from Serve.
        with contextlib.suppress(_Unreachable, ClusterError):
            application = _details().get("applications", {}).get(name, {})
        if application.get("status") == "RUNNING":
            return
        if application.get("status") == "DEPLOY_FAILED":
            raise StageFailed(f"application {name} could not be deployed: {_said(application)}")
        time.sleep(POLL_S)
    raise StageFailed(
        f"application {name} is {application.get('status', 'not there')} after {timeout_s:.0f} s: {_said(application)}",
        "see whether the cluster has the CPUs the replicas reserve, or raise serving.deploy_timeout_s",
    )


def _said(application: dict[str, Any]) -> str:
    """What Serve says about an application and those of its deployments that are not healthy."""
    parts = [_brief(str(application.get("message", "")))]
    for name, deployment in application.get("deployments", {}).items():
        if deployment.get("status") != "HEALTHY" and deployment.get("message"):
            parts.append(f"{name}: {_brief(deployment['message'])}")
    return "; ".join(part.strip() for part in parts if part.strip()) or "Serve gives no reason"


def _brief(message: str) -> str:
    """The first line of a message and, where a traceback follows, the error it ends with."""
    message = _ANSI.sub("", message).replace("Traceback (most recent call last):", "")
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Failed|Refused)\b", line)]
    return " ".join(dict.fromkeys([*lines[:1], *errors[-1:]]))
