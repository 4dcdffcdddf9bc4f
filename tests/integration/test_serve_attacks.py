"""Requests that are made to hurt: each is refused at once, in OpenAI's shape, and costs the replica next to nothing."""

import contextlib
import json
import os
import pickle
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil
import pytest
from ray.serve.generated import serve_pb2, serve_pb2_grpc

from app import deployment
from tests.answering_model import ANSWERS
from tests.attacks import ATTACKS, chat
from tests.conftest import Service
from tests.faults import Fault
from tests.integration.test_serve import asked, eventually

CHAT = "/v1/chat/completions"
WITHIN_S = 2.0
GROWTH_BYTES = 50 * 2**20
ESCAPE = "\x1b[31m"
FAKE = '{"time": "2026-01-01", "level": "INFO", "message": "fake-log-line"}'


@pytest.fixture
def replica(service: Service) -> psutil.Process:
    """The ingress."""
    (pid,) = (each["pid"] for each in deployment.replicas("support") if each["deployment"] == "InputHandling")
    return psutil.Process(pid)


@pytest.fixture
def http(service: Service) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=service.url, headers={"Authorization": f"Bearer {service.api_key}"}, timeout=30) as http:
        yield http


def answers(http: httpx.Client) -> bool:
    body = {"model": "support", "messages": asked("thank you")}
    response = http.post(CHAT, json=body)
    return bool(response.json()["choices"][0]["message"]["content"] == ANSWERS["thank you"])


@pytest.mark.fault("S4", seen="each body was refused for what is wrong with it")
def test_malformed_and_oversized_bodies_are_refused_at_once_and_leave_no_trace(
    http: httpx.Client, replica: psutil.Process, fault: Fault
) -> None:
    assert answers(http)
    before = replica.memory_info().rss
    took: dict[str, float] = {}
    for name, (body, statuses) in ATTACKS.items():
        begun_s = time.monotonic()
        try:
            response = http.post(CHAT, content=body)
        except (httpx.WriteError, httpx.ReadError):  # refused, and closed, before it was sent to its end
            assert name == "100 MB"
            continue
        took[name] = time.monotonic() - begun_s
        assert response.status_code in statuses, f"{name}: {response.text[:300]}"
        if response.status_code != 200:
            error = response.json()["error"]
            assert error["message"], name
            assert len(response.content) < 2_000, f"{name}: an answer repeats the attack"
    fault.happened()
    assert answers(http)
    grown = replica.memory_info().rss - before
    slowest = sorted(took.items(), key=lambda each: -each[1])[:5]
    print(f"S4: {len(took)} attacks, slowest {slowest}, memory {grown / 2**20:+.1f} MB")
    assert max(took.values()) < WITHIN_S, slowest
    assert grown < GROWTH_BYTES
    assert replica.is_running()
    fault.recovered()


@pytest.mark.fault("S4", seen="bytes beyond the limit were sent")
def test_a_body_without_a_length_is_given_up_once_it_is_too_large(
    service: Service, http: httpx.Client, replica: psutil.Process, fault: Fault
) -> None:
    before = replica.memory_info().rss
    address = service.url.removeprefix("http://").split(":")
    part = b"10000\r\n" + b" " * 65_536 + b"\r\n"
    sent, most = 0, before
    with socket.create_connection((address[0], int(address[1])), timeout=20) as sender:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {service.api_key}\r\n"
        begun_s = time.monotonic()
        sender.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        try:
            while sent < 2_000_000_000:
                sender.sendall(part)
                sent += 65_536
                most = max(most, replica.memory_info().rss) if sent % (65_536 * 64) == 0 else most
        except OSError:
            pass  # the connection was closed before
        answer = sender.recv(65_536)
        seconds = time.monotonic() - begun_s
    assert sent > 1_000_000
    fault.happened()
    assert answer.startswith(b"HTTP/1.1 413 "), answer[:100]
    print(
        f"S4: {sent / 1e6:.0f} MB without a length, refused, {seconds:.1f} s, memory {(most - before) / 2**20:+.1f} MB"
    )
    # What came in the tenth of a second until it was refused.
    assert most - before < sent / 8
    assert answers(http)
    fault.recovered()


class _Runs:
    """Makes a folder where it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._folder),)


@pytest.mark.fault("S2", seen="with the cluster's token the same call was unpickled")
def test_the_ports_on_which_replicas_hear_each_other_want_the_token(
    service: Service, http: httpx.Client, tmp_path: Path, fault: Fault
) -> None:
    assert answers(http)
    connections = [
        (replica["deployment"], connection)
        for replica in deployment.replicas("support")
        for connection in psutil.Process(replica["pid"]).net_connections("tcp")
    ]
    ports = {
        (name, connection.laddr.port)
        for name, connection in connections
        if connection.status == psutil.CONN_LISTEN and connection.laddr.ip == "::"
    }
    assert {name for name, _ in ports} >= {"InputHandling", "LanguageModel-1", "ResponseManagement"}
    used = {(name, each.laddr.port) for name, each in connections if each.status == psutil.CONN_ESTABLISHED} & ports
    assert {name for name, _ in used} >= {"LanguageModel-1", "ResponseManagement"}, "a question went another way"

    def call(port: int, token: str | None, marker: Path) -> grpc.StatusCode | None:
        attack = serve_pb2.ASGIRequest(pickled_request_metadata=pickle.dumps(_Runs(marker)))
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            try:
                metadata = [("authorization", f"Bearer {token}")] if token else []
                serve_pb2_grpc.ASGIServiceStub(channel).HandleRequest(attack, metadata=metadata, timeout=20)
            except grpc.RpcError as error:
                return error.code()
        return None

    for name, port in sorted(ports):
        for token in (None, "wrong", service.api_key):
            marker = tmp_path / f"{name}-{token}"
            assert call(port, token, marker) == grpc.StatusCode.UNAUTHENTICATED
            assert not marker.exists(), f"{name} unpickled what a stranger sent"
        call(port, os.environ["RAY_AUTH_TOKEN"], tmp_path / name)
        assert (tmp_path / name).exists()
    fault.happened()


def test_the_front_door_and_what_stands_behind_it_are_reached_from_this_machine_alone(
    service: Service, http: httpx.Client, replica: psutil.Process
) -> None:
    assert answers(http)

    def listening(process: psutil.Process, kind: str) -> set[tuple[str, int]]:
        connections = process.net_connections(kind)
        return {each.laddr[:2] for each in connections if each.status == psutil.CONN_LISTEN}

    door = int(service.url.rpartition(":")[2])
    everywhere = [each for each in psutil.net_connections("tcp") if each.status == psutil.CONN_LISTEN]
    (process,) = {psutil.Process(each.pid) for each in everywhere if each.laddr[:2] == ("127.0.0.1", door)}
    if process.name() != "haproxy":
        pytest.skip("Serve's Python proxy is in front here")
    assert {address for address, _ in listening(process, "tcp")} == {"127.0.0.1"}
    command = process.cmdline()
    socket = Path(command[command.index("-f") + 1]).with_name("admin.sock")
    assert socket.stat().st_mode & 0o077 == 0
    behind = {port for address, port in listening(replica, "tcp4") if address == "127.0.0.1"}
    statuses = set()
    for port in behind:
        with contextlib.suppress(httpx.HTTPError):  # not all of them speak HTTP
            statuses.add(httpx.post(f"http://127.0.0.1:{port}{CHAT}", json={}, timeout=5).status_code)
            statuses.add(httpx.get(f"http://127.0.0.1:{port}/v1/models", timeout=5).status_code)
    assert statuses == {401}


@pytest.mark.fault("S9", seen="the requests that carried them are in the log")
def test_what_a_client_writes_never_makes_a_line_of_the_log(
    service: Service, http: httpx.Client, replica: psutil.Process, fault: Fault
) -> None:
    import ray

    session = Path(ray._private.worker._global_node.get_session_dir_path())
    (log,) = session.joinpath("logs").glob(f"worker-*-{replica.pid}.err")
    already = len(log.read_bytes())
    nasty = [
        f"a\n{FAKE}\nb",
        f"a\r\n{FAKE}",
        f"{ESCAPE}red",
        "%n%s%x %(message)s {message}",
        f"\u2028{FAKE}\u0085",
        "\x00",
    ]
    for text in nasty:
        escaped = json.dumps(text)
        for body in (
            chat(escaped, max_tokens="1"),
            chat('"a"', model=escaped),
            chat('"a"', user=escaped, max_tokens="1"),
        ):
            assert http.post(CHAT, content=body).status_code in (200, 404)
        assert http.post(CHAT, content=chat('"a"', **{f"x{escaped[1:-1]}": "1"})).status_code == 400
        encoded = "".join(f"%{byte:02x}" for byte in text.encode())
        assert http.get(f"/v1/models/{encoded}").status_code == 404
        assert http.get(f"/{encoded}").status_code == 404
    ids = [f"{ESCAPE}red", "%n%s", "x" * 5_000, FAKE, "a\tb", "a b"]
    address = service.url.removeprefix("http://").split(":")
    for given in ids:
        with socket.create_connection((address[0], int(address[1])), timeout=20) as sender:
            head = f"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {service.api_key}\r\n"
            sender.sendall(f"{head}Connection: close\r\nx-request-id: {given}\r\n\r\n".encode())
            assert re.match(rb"HTTP/1.1 (200|400) ", sender.recv(65_536))
    last = "the-last-request"
    assert http.get("/health", headers={"x-request-id": last}).status_code == 200
    eventually(lambda: last in log.read_bytes()[already:].decode(), 20)
    written = log.read_bytes()[already:].decode()
    ours = [line for line in written.split("\n") if line]
    requests: list[dict[str, Any]] = [json.loads(line) for line in ours]
    assert sum(line["message"] == "request" for line in requests) >= 6 * len(nasty) + 1
    fault.happened()
    assert {line["message"] for line in requests} == {"request"}
    told = [line["request_id"] for line in requests if line["request_id"] is not None]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]{1,128}", each) for each in told)
    assert "fake-log-line" not in written
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u0085\u2028]", written)
    everywhere = b"".join(file.read_bytes() for file in session.joinpath("logs").rglob("*") if file.is_file())
    assert b"\n" + FAKE.encode() not in everywhere
    assert f"{ESCAPE}red".encode() not in everywhere
    fault.recovered()
