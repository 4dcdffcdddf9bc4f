"""Server processes of the tests: found where `make servers` puts them, started, waited for, ended."""

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
WAIT_S = 60


def installed(name: str) -> Path:
    """The folder of a server; skips the test where it is not there."""
    folder = Path(os.environ.get("RAYLOOP_SERVERS", ROOT / ".rayloop" / "servers")) / name
    if not (folder / "installed").exists():
        pytest.skip(f"no {name} server in {folder}: run make servers")
    return folder


def free_port() -> int:
    """A port of the loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def process(
    command: Sequence[str], log: Path, ports: Sequence[int], environment: Mapping[str, str] | None = None
) -> Iterator["subprocess.Popen[bytes]"]:
    """A server that listens on its ports, until the block ends."""
    with log.open("ab") as out:
        server = subprocess.Popen(
            command, stdout=out, stderr=out, cwd=log.parent, env={**os.environ, **(environment or {})}
        )
    try:
        for port in ports:
            listening(port, server, log)
        yield server
    finally:
        server.kill()
        server.wait(WAIT_S)


def listening(port: int, server: "subprocess.Popen[bytes]", log: Path) -> None:
    """Wait until someone listens on the port."""
    deadline_s = time.monotonic() + WAIT_S
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        assert server.poll() is None, f"{server.args!r} has ended: {log.read_text()[-2_000:]}"
        assert time.monotonic() < deadline_s, f"{server.args!r} does not listen on {port}: {log.read_text()[-2_000:]}"
        time.sleep(0.1)
