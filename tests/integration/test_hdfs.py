"""F8: HDFS whose DataNode or NameNode goes away while it is read or written."""

import json
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.config import Config
from app.errors import SourceUnavailable, StorageError
from app.ingestion.sources import parts_of
from app.storage import Storage, open_uri
from tests.faults import Fault
from tests.servers.hdfs import Hdfs

pytestmark = pytest.mark.slow

LINES = 150_000
LINE_BYTES = 200
LIMIT_S = 60.0


@pytest.fixture(scope="module")
def hdfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hdfs]:
    with Hdfs(tmp_path_factory.mktemp("hdfs")) as running:
        lines = b"".join(json.dumps({"n": n}).encode().ljust(LINE_BYTES - 1) + b"\n" for n in range(LINES))
        Storage(running.uri("f8")).write(lines, "a.jsonl")
        yield running


def reading(hdfs: Hdfs) -> Iterator[int]:
    """The numbers in the file, one piece of records at a time."""
    source = {"uri": hdfs.uri("f8"), "format": "jsonl"}
    config = Config().with_overrides({"ingestion.sources": [source], "ingestion.batch_rows": 1_000})
    for part in parts_of(config, {}):
        for call, _ in part.reads(config.ingestion):
            for piece in call():
                for raw in piece.raw:
                    yield json.loads(bytes(raw.as_py() if hasattr(raw, "as_py") else raw))["n"]


def test_it_is_read_whole(hdfs: Hdfs) -> None:
    assert list(reading(hdfs)) == list(range(LINES))


def begun(hdfs: Hdfs, fault: Fault) -> tuple[Iterator[int], list[int]]:
    """A read that is under way, and what it has given so far."""
    numbers = reading(hdfs)
    return numbers, [next(numbers) for _ in range(fault.random.randrange(1, LINES // 10))]


@pytest.mark.fault("F8", seen="the read had begun, and failed")
@pytest.mark.parametrize("how", ["killed", "silent"])
def test_a_datanode_that_stops_during_a_read_is_an_error_that_names_the_path_and_a_later_read_works(
    hdfs: Hdfs, how: str, fault: Fault
) -> None:
    numbers, _ = begun(hdfs, fault)
    hdfs.stop_datanode() if how == "killed" else hdfs.signal_datanode(signal.SIGSTOP)
    started_s = time.monotonic()
    try:
        with pytest.raises(SourceUnavailable, match=r"/f8/a\.jsonl"):
            list(numbers)
    finally:
        seconds = time.monotonic() - started_s
        hdfs.start_datanode() if how == "killed" else hdfs.signal_datanode(signal.SIGCONT)
    assert seconds < LIMIT_S
    fault.happened()
    assert list(reading(hdfs)) == list(range(LINES))
    fault.recovered()


@pytest.mark.fault("F8", seen="the DataNode stood still, and so did the read")
def test_a_read_goes_on_where_a_datanode_is_back_within_seconds(hdfs: Hdfs, fault: Fault) -> None:
    numbers, found = begun(hdfs, fault)
    silent_s = fault.random.uniform(2.0, 4.0)
    hdfs.signal_datanode(signal.SIGSTOP)
    back = threading.Timer(silent_s, hdfs.signal_datanode, [signal.SIGCONT])
    back.start()
    started_s = time.monotonic()
    found += numbers
    seconds = time.monotonic() - started_s
    back.join()
    assert seconds > silent_s, "it was read without the DataNode"
    fault.happened(seconds - silent_s)
    fault.recovered()
    assert found == list(range(LINES))


@pytest.mark.fault("F8", seen="the write failed")
def test_a_write_without_a_datanode_leaves_the_old_file(hdfs: Hdfs, fault: Fault) -> None:
    storage = Storage(hdfs.uri("f8w"))
    new = b"new" * fault.random.randrange(1, 1_000_000)
    storage.write(b"old", "x")
    hdfs.stop_datanode()
    started_s = time.monotonic()
    try:
        with pytest.raises(StorageError, match="f8w/x"):
            storage.write(new, "x")
    finally:
        seconds = time.monotonic() - started_s
        hdfs.start_datanode()
    assert seconds < 2 * LIMIT_S
    fault.happened()
    assert storage.read("x") == b"old"
    storage.write(new, "x")
    assert storage.read("x") == new
    fault.recovered()


def test_a_file_is_seen_under_its_name_only_when_it_is_whole(hdfs: Hdfs) -> None:
    storage = Storage(hdfs.uri("f8v"))
    storage.write(b"old", "x")
    seen = []
    move = type(storage.filesystem.handler.fs).mv

    def look_first(self: object, old: str, new: str, **settings: object) -> None:
        seen.append(storage.read("x"))
        move(self, old, new, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(storage.filesystem.handler.fs), "mv", look_first)
        storage.write(b"new", "x")
    assert seen == [b"old"]
    assert storage.read("x") == b"new"
    assert storage.list() == ["x"]


@pytest.mark.fault("F8", seen="nobody listens on the port")
def test_a_namenode_that_is_not_there_is_given_up(tmp_path: Path) -> None:
    config = Config().with_overrides({"ingestion.sources": [{"uri": "hdfs://127.0.0.1:9/x", "format": "jsonl"}]})
    started_s = time.monotonic()
    with pytest.raises(SourceUnavailable, match=r"hdfs://127\.0\.0\.1:9/x"):
        parts_of(config, {})
    assert time.monotonic() - started_s < LIMIT_S


def test_the_namenode_may_be_named_in_the_configuration(
    hdfs: Hdfs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = f"<property><name>fs.defaultFS</name><value>{hdfs.uri()}</value></property>"
    (tmp_path / "core-site.xml").write_text(f"<configuration>{site}</configuration>")
    monkeypatch.setenv("HADOOP_CONF_DIR", str(tmp_path))
    filesystem, path = open_uri("hdfs:///f8/a.jsonl")
    assert filesystem.get_file_info(path).size == LINES * LINE_BYTES
