"""What a URI may say, and that nothing is asked of anyone before it is known to be harmless."""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.config import Config
from app.errors import ConfigError, SourceError, StorageError
from app.filesystems import open_uri
from app.ingestion.files import read
from app.ingestion.sources import parts_of
from app.storage import Storage


class Spy:
    """Whoever connects to anything from this process: seen by Python's sockets, and by a listener that C++ code
    would reach."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, address = self._listener.accept()
            except OSError:
                return
            self.seen.append(address)
            connection.close()

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Spy]:
    found = Spy()
    connect = socket.socket.connect

    def record(self: socket.socket, address: Any) -> None:
        # Ray Data, where another test has started it, asks a Prometheus for figures every 10 s.
        if threading.current_thread().name != "data-usage-metrics-poller":
            found.seen.append(address)
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", record)
    endpoint = f"http://127.0.0.1:{found.port}"
    for name in ("AWS_ENDPOINT_URL", "STORAGE_EMULATOR_HOST", "RAYLOOP_AZURE_ENDPOINT"):
        monkeypatch.setenv(name, endpoint)
    for name, value in {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y", "AWS_REGION": "eu-central-1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT", "account")
    monkeypatch.setenv("AZURE_STORAGE_KEY", "YQ==")
    yield found
    found.close()


REFUSED = [
    ("http://169.254.169.254/latest/meta-data/", "http:// is no store"),
    ("https://127.0.0.1:{port}/data.jsonl", "https:// is no store"),
    ("ftp://127.0.0.1:{port}/data.jsonl", "ftp:// is no store"),
    ("gopher://127.0.0.1:{port}/x", "gopher:// is no store"),
    ("s3://../", "leads out of its folder"),
    ("s3://bucket/a/../../other/x.jsonl", "leads out of its folder"),
    ("gs://bucket/../x", "leads out of its folder"),
    ("abfs://container/./x", "leads out of its folder"),
    ("hdfs://127.0.0.1:{port}/a/../b", "leads out of its folder"),
    ("s3://key:planted@bucket/x.jsonl", "holds credentials"),
    ("gs://planted@bucket/x.jsonl", "holds credentials"),
    ("hdfs://root:planted@127.0.0.1:{port}/x", "holds credentials"),
    ("abfs://container:planted@account.dfs.core.windows.net/x", "holds credentials"),
    ("abfs://container@127.0.0.1/x", "no address of Azure's"),
    ("abfs://container@evil.example.com/x", "no address of Azure's"),
    ("abfs://container@a.b.dfs.core.windows.net/x", "no address of Azure's"),
    ("s3://bucket/x.jsonl?endpoint_override=127.0.0.1:{port}&scheme=http", "holds options"),
    ("s3://bucket/x.jsonl?access_key=AK&secret_key=planted", "holds options"),
    ("s3:///x.jsonl", "names no bucket"),
    ("s3://*/x.jsonl", "names no bucket"),
]


@pytest.mark.fault("S12", seen="refused; a spy on sockets and a listener saw no connection")
@pytest.mark.parametrize(("uri", "says"), REFUSED)
def test_a_uri_that_leads_elsewhere_is_refused_with_a_sentence_and_no_connection(uri: str, says: str, spy: Spy) -> None:
    uri = uri.format(port=spy.port)
    with pytest.raises((SourceError, ConfigError), match=f"{says}|holds no password") as error:
        parts_of(Config().with_overrides({"ingestion.sources": [{"uri": uri, "format": "jsonl"}]}), {})
    assert "planted" not in str(error.value)
    if "*" not in uri:
        with pytest.raises(StorageError, match=says) as refused:
            Storage(uri)
        assert "planted" not in str(refused.value)
    assert spy.seen == []


@pytest.mark.fault("S12", seen="the spy sees a connection that is allowed")
@pytest.mark.parametrize("uri", ["s3://bucket/x", "gs://bucket/x", "abfs://container/x"])
def test_the_spy_sees_what_is_asked_of_a_store(uri: str, spy: Spy) -> None:
    filesystem, path = open_uri(uri)
    assert spy.seen == []  # opening alone asks nobody

    def ask() -> None:
        with contextlib.suppress(OSError):
            filesystem.get_file_info(path)

    threading.Thread(target=ask, daemon=True).start()
    deadline_s = time.monotonic() + 30
    while not spy.seen and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert spy.seen


@pytest.mark.parametrize("endpoint", ["127.0.0.1:9000", "ftp://x", "http://key:planted@host", "http://host/path"])
def test_an_endpoint_has_to_be_an_address(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(StorageError, match="AWS_ENDPOINT_URL is no address"):
        open_uri("s3://bucket/x")


def test_a_key_is_not_used_for_another_account(monkeypatch: pytest.MonkeyPatch) -> None:
    from pyarrow import fs

    given: list[dict[str, Any]] = []
    monkeypatch.setattr(fs, "AzureFileSystem", lambda **settings: given.append(settings))
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT", "ours")
    monkeypatch.setenv("AZURE_STORAGE_KEY", "YQ==")
    open_uri("abfs://container/x")
    open_uri("abfs://container@ours.dfs.core.windows.net/x")
    open_uri("abfss://container@theirs.dfs.core.windows.net/x")
    assert [settings.get("account_key") for settings in given] == ["YQ==", "YQ==", None]
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT")
    with pytest.raises(StorageError, match="set AZURE_STORAGE_ACCOUNT"):
        open_uri("abfs://container/x")


# Local files


def names(uri: Path | str) -> list[str]:
    config = Config().with_overrides({"ingestion.sources": [{"uri": str(uri), "format": "jsonl"}]})
    return [Path(part.uri).name for part in parts_of(config, {})]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A source with links into it and out of it, a pipe, and files beside it."""
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    (inside / "deep").mkdir(parents=True)
    outside.mkdir()
    for file in (inside / "a.jsonl", inside / "deep" / "b.jsonl", outside / "secret.jsonl", tmp_path / "inside.jsonl"):
        file.write_bytes(b"{}\n")
    (inside / "c.jsonl").symlink_to(inside / "deep" / "b.jsonl")
    (inside / "out.jsonl").symlink_to(outside / "secret.jsonl")
    (inside / "passwd.jsonl").symlink_to("/etc/passwd")
    (inside / "gone.jsonl").symlink_to(inside / "nothing")
    (inside / "outside").symlink_to(outside)
    (inside / "loop").symlink_to(inside)
    os.mkfifo(inside / "pipe.jsonl")
    return inside


@pytest.mark.fault("S12", seen="links and pipe are there, left out, and named in the log")
@pytest.mark.timeout(60)
def test_links_out_of_a_folder_are_not_followed_and_pipes_not_opened(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    inside = ["a.jsonl", "c.jsonl", "b.jsonl"]
    assert names(folder) == names(f"{folder}/") == names(f"file://{folder}") == inside
    for left_out in ("out.jsonl", "passwd.jsonl", "pipe.jsonl"):
        assert left_out in caplog.text
    assert names(f"{folder}/**/*.jsonl") == inside
    assert names(f"{folder}/*.jsonl") == inside[:2]
    with pytest.raises(SourceError, match="nothing matches"):
        names(f"{folder}/outside/*.jsonl*/x")


@pytest.mark.fault("S12", seen="refused by name")
@pytest.mark.timeout(60)
def test_a_device_a_pipe_or_a_socket_is_no_source(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "socket"))
        for special in (folder / "pipe.jsonl", folder / "socket", "/dev/zero", "file:///dev/zero"):
            with pytest.raises(SourceError, match="is a device, pipe or socket"):
                names(special)


@pytest.mark.fault("S12", seen="refused by name")
@pytest.mark.timeout(60)
def test_a_file_that_became_a_pipe_is_not_opened(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"{}\n")
    config = Config().with_overrides({"ingestion.sources": [{"uri": str(file), "format": "jsonl"}]})
    (part,) = parts_of(config, {})
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(SourceError, match="no file but a device, pipe or socket"):
        list(read(part, config.ingestion.sources[0], 10))  # type: ignore[arg-type]


def test_a_link_and_an_outside_file_that_are_named_themselves_are_read(folder: Path) -> None:
    assert names(folder / "out.jsonl") == ["out.jsonl"]  # an operator's own word
    link = folder.parent / "link"
    link.symlink_to(folder)
    assert "a.jsonl" in names(link)
