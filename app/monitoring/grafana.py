"""The dashboard in Grafana, through `grafana-api`: a folder made if it is missing, a dashboard replaced by its uid.

A Grafana that is down, refuses or answers nonsense never fails the stage: the outcome is a sentence.
"""

import json
import logging
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from app.versions import APP

logger = logging.getLogger(__name__)

DASHBOARD = APP.parent / "cluster" / "monitoring" / "dashboard.json"
FOLDER_UID, FOLDER_TITLE = "rayloop", "Rayloop"
TOKEN_VARIABLE = "RAYLOOP_GRAFANA_TOKEN"
ATTEMPTS = 3
FIRST_PAUSE_S = 1.0
TIMEOUT_S = 5.0


class NotPushed(Exception):
    """Why the dashboard is not in Grafana, and whether trying again may help."""

    def __init__(self, reason: str, again: bool = False) -> None:
        super().__init__(reason, again)
        self.reason = reason
        self.again = again


def push(url: str, token: str | None, dashboard: Path = DASHBOARD, first_pause_s: float = FIRST_PAUSE_S) -> str:
    """Put the dashboard into Grafana, replacing an older one; returns `pushed: <address>` or `not pushed: <why>`.

    A server that cannot be reached, is overloaded or does not answer in JSON is asked three times.
    """
    for attempt in range(ATTEMPTS):
        try:
            return f"pushed: {_push_once(url, token, dashboard)}"
        except NotPushed as failure:
            reason = failure.reason
            if not failure.again or attempt == ATTEMPTS - 1:
                break
            time.sleep(first_pause_s * 2**attempt)
    logger.warning("the dashboard is not in Grafana: %s", reason)
    return f"not pushed: {reason}"


def _push_once(url: str, token: str | None, path: Path) -> str:
    """One attempt; returns the address of the dashboard."""
    from grafana_api.grafana_face import GrafanaFace

    address = urlsplit(url)
    if address.scheme not in ("http", "https") or not address.hostname or address.username:
        raise NotPushed("monitoring.grafana_url must read http://host:port or https://host/prefix, without credentials")
    if not token:
        raise NotPushed(f"the environment variable {TOKEN_VARIABLE} holds no service account token")
    prefix = address.path.strip("/")
    grafana = GrafanaFace(
        auth=token,
        host=address.netloc,
        url_path_prefix=f"{prefix}/" if prefix else "",
        protocol=address.scheme,
        timeout=TIMEOUT_S,
    )
    dashboard = read(path)
    _make_folder(grafana)
    body = {"dashboard": {**dashboard, "id": None}, "folderUid": FOLDER_UID, "overwrite": True}
    answer = _ask(grafana.dashboard.update_dashboard, body)
    if answer.get("uid") != dashboard["uid"]:
        raise NotPushed(f"Grafana's answer does not confirm the dashboard {dashboard['uid']!r}")
    return f"{address.scheme}://{address.netloc}{answer.get('url', '')}"


def read(path: Path = DASHBOARD) -> dict[str, Any]:
    """The dashboard as Grafana takes it."""
    try:
        dashboard: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise NotPushed(f"cannot read the dashboard ({error})") from error
    return dashboard


def _make_folder(grafana: Any) -> None:
    try:
        _ask(grafana.folder.get_folder, FOLDER_UID)
    except _Refused as refusal:
        if refusal.status != 404:
            raise
        try:
            _ask(grafana.folder.create_folder, FOLDER_TITLE, FOLDER_UID)
        except _Refused as late:
            # Another push made it in between.
            if late.status not in (409, 412):
                raise


class _Refused(NotPushed):
    """Grafana answered with an error status."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason, again=status >= 500 or status == 429)
        self.args = (status, reason)
        self.status = status


def _ask(method: Any, *arguments: Any) -> dict[str, Any]:
    """Call one method of grafana-api; whatever it raises becomes NotPushed."""
    import requests
    from grafana_api.grafana_api import GrafanaException

    try:
        answer = method(*arguments)
    except GrafanaException as error:
        raise _Refused(error.status_code, _explain(error.status_code, error.response)) from error
    except (requests.ConnectionError, requests.Timeout) as error:
        raise NotPushed(f"Grafana cannot be reached ({type(error).__name__})", again=True) from error
    # grafana-api 1.0.3 parses every answer as JSON: a 204 or an HTML page ends in ValueError, and an HTML error
    # page with the word "message" in it in TypeError.
    except (requests.RequestException, ValueError, TypeError) as error:
        raise NotPushed("the answer is not Grafana's: is monitoring.grafana_url right?", again=True) from error
    if not isinstance(answer, dict):
        raise NotPushed("the answer is not Grafana's: is monitoring.grafana_url right?", again=True)
    return answer


def _explain(status: int, response: object) -> str:
    # Only what Grafana itself says: an error page of a proxy is of no help here.
    said = str(response.get("message", ""))[:200] if isinstance(response, dict) else ""
    remedy = {401: f"check {TOKEN_VARIABLE}", 403: "the token needs the role Editor"}.get(status, "")
    return ": ".join(part for part in (f"Grafana answered {status}", said, remedy) if part)
