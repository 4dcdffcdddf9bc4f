"""The dashboard push against a strict local server that speaks the used endpoints of Grafana's public HTTP API.

No Grafana server can be had here: what these tests know of one is its API description.
"""

import json
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from app.monitoring import grafana
from app.monitoring.grafana import push

TOKEN = "glsa_the-token-of-the-tests"
Answer = tuple[int, str, bytes]  # status, content type, body


def as_json(status: int, body: object) -> Answer:
    return status, "application/json", json.dumps(body).encode()


@dataclass
class StrictGrafana:
    """What the server holds, what it was asked, and answers that come before its own."""

    url: str = ""
    folders: dict[str, dict[str, Any]] = field(default_factory=dict)
    dashboards: dict[str, dict[str, Any]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    answers_first: list[Answer] = field(default_factory=list)

    def answer(self, method: str, path: str, headers: Any, body: bytes) -> Answer:
        self.asked.append(f"{method} {path}")
        if self.answers_first:
            return self.answers_first.pop(0)
        if headers["Authorization"] != f"Bearer {TOKEN}":
            return as_json(401, {"message": "Invalid API key"})
        if method == "GET" and path.startswith("/api/folders/"):
            folder = self.folders.get(path.removeprefix("/api/folders/"))
            return as_json(200, folder) if folder else as_json(404, {"message": "folder not found"})
        if method != "POST" or not headers["Content-Type"].startswith("application/json"):
            return as_json(404, {"message": "Not found"})
        content = json.loads(body)
        if path == "/api/folders":
            return self.make_folder(content)
        if path == "/api/dashboards/db":
            return self.save_dashboard(content)
        return as_json(404, {"message": "Not found"})

    def make_folder(self, content: dict[str, Any]) -> Answer:
        if set(content) - {"uid", "title", "parentUid"} or not content.get("title"):
            return as_json(400, {"message": "bad request data"})
        if content["uid"] in self.folders:
            return as_json(409, {"message": "a folder with the same name already exists in the current location"})
        folder = {"id": len(self.folders) + 1, **content, "url": f"/dashboards/f/{content['uid']}/rayloop"}
        self.folders[content["uid"]] = folder
        return as_json(200, folder)

    def save_dashboard(self, content: dict[str, Any]) -> Answer:
        dashboard = content.get("dashboard", {})
        if set(content) - {"dashboard", "folderId", "folderUid", "message", "overwrite"} or not dashboard.get("title"):
            return as_json(400, {"message": "bad request data"})
        if content.get("folderUid") and content["folderUid"] not in self.folders:
            return as_json(400, {"message": "folder not found"})
        uid, older = dashboard["uid"], self.dashboards.get(dashboard["uid"])
        if dashboard.get("id") is not None and (older is None or dashboard["id"] != older["id"]):
            return as_json(404, {"message": "Dashboard not found", "status": "not-found"})
        if older and not content.get("overwrite") and dashboard.get("version") != older["version"]:
            message = "The dashboard has been changed by someone else"
            return as_json(412, {"message": message, "status": "version-mismatch"})
        version = older["version"] + 1 if older else 1
        number = older["id"] if older else len(self.dashboards) + 1
        self.dashboards[uid] = {**dashboard, "id": number, "version": version, "folderUid": content.get("folderUid")}
        url = f"/d/{uid}/rayloop"
        answer = {"id": number, "uid": uid, "url": url, "status": "success", "version": version, "slug": "rayloop"}
        return as_json(200, answer)


@pytest.fixture
def server() -> Iterator[StrictGrafana]:
    state = StrictGrafana()

    class Handler(BaseHTTPRequestHandler):
        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, kind, content = state.answer(self.command, self.path, self.headers, body)
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = _serve  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{http.server_port}"
    threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
    yield state
    http.shutdown()
    http.server_close()


@pytest.fixture
def push_here(server: StrictGrafana) -> Callable[..., str]:
    def push_with(token: str | None = TOKEN, **arguments: Any) -> str:
        return push(server.url, token, first_pause_s=0.01, **arguments)

    return push_with


def test_first_push_makes_the_folder_and_the_dashboard(server: StrictGrafana, push_here: Callable[..., str]) -> None:
    assert push_here() == f"pushed: {server.url}/d/rayloop/rayloop"
    assert server.folders["rayloop"]["title"] == "Rayloop"
    saved = server.dashboards["rayloop"]
    assert saved["folderUid"] == "rayloop"
    assert saved["panels"] == grafana.read()["panels"]


def test_pushing_again_replaces_the_same_dashboard(server: StrictGrafana, push_here: Callable[..., str]) -> None:
    push_here()
    server.dashboards["rayloop"]["title"] = "Edited by hand"
    assert push_here().startswith("pushed: ")
    assert len(server.dashboards) == len(server.folders) == 1
    assert server.dashboards["rayloop"] | {"version": 0} == {
        **grafana.read(), "id": 1, "version": 0, "folderUid": "rayloop",
    }  # fmt: skip
    assert server.dashboards["rayloop"]["version"] == 2


def test_a_folder_made_by_another_push_in_between_is_no_error(
    server: StrictGrafana, push_here: Callable[..., str]
) -> None:
    server.folders["rayloop"] = {"id": 1, "uid": "rayloop", "title": "Rayloop"}
    server.answers_first = [as_json(404, {"message": "folder not found"})]
    assert push_here().startswith("pushed: ")
    assert "POST /api/folders" in server.asked


def test_an_address_with_a_path_and_a_slash_keeps_its_path(server: StrictGrafana) -> None:
    server.answers_first = [as_json(401, {"message": "Invalid API key"})]
    push(f"{server.url}/grafana/", TOKEN)
    assert server.asked == ["GET /grafana/api/folders/rayloop"]


@pytest.mark.parametrize(
    "trouble",
    [
        as_json(502, {"message": "bad gateway"}),
        as_json(429, {"message": "slow down"}),
        (200, "text/html", b"<html>starting</html>"),
        (503, "text/html", b'<html>no "message" for you</html>'),
        (204, "application/json", b""),
        (200, "application/json", b"[]"),
    ],
    ids=["502", "429", "html", "html-503", "204", "list"],
)
def test_passing_trouble_is_tried_again(trouble: Answer, server: StrictGrafana, push_here: Callable[..., str]) -> None:
    server.answers_first = [trouble, trouble]
    assert push_here().startswith("pushed: ")
    server.answers_first = [trouble] * 3
    before = len(server.asked)
    assert push_here().startswith("not pushed: ")
    assert len(server.asked) - before == grafana.ATTEMPTS


def test_a_wrong_token_is_said_at_once_and_shown_nowhere(
    server: StrictGrafana, push_here: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        said = push_here(token="glsa_wrong-secret")
    assert said.startswith("not pushed: Grafana answered 401: ")
    assert "RAYLOOP_GRAFANA_TOKEN" in said
    assert len(server.asked) == 1
    assert "wrong-secret" not in said + caplog.text
    assert server.dashboards == {}


def test_a_token_without_rights_names_the_role(server: StrictGrafana, push_here: Callable[..., str]) -> None:
    server.answers_first = [as_json(403, {"message": "Permission denied"})]
    assert push_here() == "not pushed: Grafana answered 403: Permission denied: the token needs the role Editor"


def test_an_error_page_is_not_repeated_in_the_reason(server: StrictGrafana, push_here: Callable[..., str]) -> None:
    server.answers_first = [(404, "text/plain", b"<html>" + b"x" * 5_000)] * 2
    assert push_here() == "not pushed: Grafana answered 404"


def test_an_answer_about_another_dashboard_is_not_taken_as_success(
    server: StrictGrafana, push_here: Callable[..., str]
) -> None:
    server.folders["rayloop"] = {"id": 1, "uid": "rayloop", "title": "Rayloop"}
    folder = as_json(200, {"uid": "rayloop"})
    server.answers_first = [folder, as_json(200, {"uid": "other", "status": "success"})]
    assert "does not confirm" in push_here()


def test_a_server_that_is_down_is_said() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        said = push(f"http://127.0.0.1:{taken.getsockname()[1]}", TOKEN, first_pause_s=0.01)
    assert said == "not pushed: Grafana cannot be reached (ConnectionError)"


@pytest.mark.parametrize("token", [None, ""])
def test_without_a_token_nothing_is_asked(
    token: str | None, server: StrictGrafana, push_here: Callable[..., str]
) -> None:
    assert "RAYLOOP_GRAFANA_TOKEN" in push_here(token=token)
    assert server.asked == []


@pytest.mark.parametrize("url", ["grafana.example.org", "ftp://grafana", "http://", "http://admin:pass@grafana:3000"])
def test_an_address_that_cannot_be_one_is_said(url: str) -> None:
    said = push(url, TOKEN)
    assert said.startswith("not pushed: monitoring.grafana_url must read http://host:port")
    assert "pass" not in said


def test_a_missing_dashboard_file_is_said(push_here: Callable[..., str], tmp_path: Path) -> None:
    assert push_here(dashboard=tmp_path / "none.json").startswith("not pushed: cannot read the dashboard")
