"""A real PostgreSQL server of its own, on a free port of the loopback, from Debian's packages.

with postgres.start(tmp_path) as uri:          # postgresql+psycopg://postgres@127.0.0.1:41234/postgres
    other = postgres.database(uri, "catalog")  # the same server, another and empty database
"""

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

VERSIONS = Path("/usr/lib/postgresql")
USER = "postgres"
"""Of the database, and of the machine where the tests run as root, as which the server refuses to run."""
WAIT_S = 60


def programs() -> Path:
    """The folder with `initdb` and `postgres`, of the newest version; skips the test where there is none."""
    found = sorted(VERSIONS.glob("*/bin/pg_ctl"), key=lambda path: int(path.parts[-3]))
    if not found:
        pytest.skip(f"no PostgreSQL server under {VERSIONS}: apt-get install postgresql")
    return found[-1].parent


@contextlib.contextmanager
def start(folder: Path) -> Iterator[str]:
    """A server with an empty database, gone at the end; yields the database's SQLAlchemy URI.

    Args:
        folder: Gets the server's log, `postgres.log`. The data are elsewhere: pytest's folders are closed to the
            user that the server must run as.
    """
    bin_folder = programs()
    user = USER if os.geteuid() == 0 else None
    with tempfile.TemporaryDirectory(prefix="rayloop-postgres-") as data, (folder / "postgres.log").open("wb") as log:
        if user:
            shutil.chown(data, user)
        made = [str(bin_folder / "initdb"), "-D", data, "-U", USER, "--auth=trust", "-E", "UTF8", "--no-sync"]
        subprocess.run(made, user=user, cwd=data, stdout=log, stderr=log, check=True, timeout=120)
        port = _free_port()
        options = ["-h", "127.0.0.1", "-p", str(port), "-k", "", "-c", "fsync=off"]
        command = [str(bin_folder / "postgres"), "-D", data, *options]
        server = subprocess.Popen(command, user=user, cwd=data, stdout=log, stderr=log)
        try:
            _wait(bin_folder, port, server)
            yield f"postgresql+psycopg://{USER}@127.0.0.1:{port}/postgres"
        finally:
            server.send_signal(2)  # SIGINT: its fast shutdown, which ends the clients
            server.wait(WAIT_S)


def database(uri: str, name: str) -> str:
    """Make an empty database in a running server; returns its URI."""
    import psycopg

    with psycopg.connect(uri.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')  # type: ignore[call-overload]  # a literal is asked for
    return f"{uri.rpartition('/')[0]}/{name}"


def _wait(bin_folder: Path, port: int, server: "subprocess.Popen[bytes]") -> None:
    asked = [str(bin_folder / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(port)]
    deadline_s = time.monotonic() + WAIT_S
    while subprocess.run(asked, check=False).returncode != 0:
        assert server.poll() is None, "the server has ended: see postgres.log"
        assert time.monotonic() < deadline_s, "the server does not answer: see postgres.log"
        time.sleep(0.1)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
