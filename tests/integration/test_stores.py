"""Sources and storage on real stores: S3, Google Cloud Storage, Azure and HDFS servers that run here."""

import csv
import gzip
import json
import os
import pickle
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from app import tables
from app.config import Config
from app.errors import SourceError, SourceUnavailable, StorageError
from app.ingestion.sources import mark_of, parts_of
from app.ingestion.staging import BlockName, Staging
from app.storage import Storage, local_folder, open_uri
from tests.faults import Fault
from tests.servers.hdfs import Hdfs
from tests.servers.proxy import Harm, Proxy, answer, flipped, reset, reset_after, silence, wrong_length
from tests.servers.stores import STORES, Store
from tests.table_rows import stage

FORMATS = {"jsonl": "part.jsonl.gz", "parquet": "part.parquet", "csv": "part.csv"}
ROWS = 300


def conversation(number: int) -> dict[str, Any]:
    messages = [
        {"role": "user", "content": f"Where is order {number}? It is “late”.", "intent": "order_status"},
        {"role": "assistant", "content": f"Order {number} is on its way.", "intent": None},
    ]
    return {"conversation_id": f"c{number}", "channel": "email", "messages": messages}


def jsonl(start: int, stop: int) -> bytes:
    return b"".join(json.dumps(conversation(number)).encode() + b"\n" for number in range(start, stop))


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a folder of two files for each format, and what does not belong to it."""
    folder = tmp_path_factory.mktemp("local") / "data"
    for written_as, name in FORMATS.items():
        for half in (0, 1):
            inside = folder / written_as / f"day={half}"
            inside.mkdir(parents=True)
            rows = [conversation(number) for number in range(half * ROWS, (half + 1) * ROWS)]
            if written_as == "jsonl":
                (inside / name).write_bytes(gzip.compress(jsonl(half * ROWS, (half + 1) * ROWS)))
            elif written_as == "parquet":
                pq.write_table(pa.Table.from_pylist(rows), inside / name)
            else:
                with (inside / name).open("w", newline="") as out:
                    writer = csv.writer(out)
                    writer.writerow(rows[0])
                    writer.writerows([*list(row.values())[:2], json.dumps(row["messages"])] for row in rows)
            (inside / "_SUCCESS").write_bytes(b"")
    return folder


@pytest.fixture(scope="module", params=["s3", "gs", "abfs", pytest.param("hdfs", marks=pytest.mark.slow)])
def root(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URI of a fresh folder on a store."""
    folder = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "hdfs":
            with Hdfs(folder) as hdfs:
                yield hdfs.uri("base")
        else:
            with STORES[request.param](folder) as store:
                for name, value in store.environment.items():
                    patch.setenv(name, value)
                yield store.uri("base")


@pytest.fixture
def s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Store, Proxy]]:
    """S3 behind a proxy."""
    with STORES["s3"](tmp_path) as store, Proxy(store.port) as proxy:
        for name, value in store.behind(proxy.port).environment.items():
            monkeypatch.setenv(name, value)
        yield store, proxy


def source(uri: str, written_as: str) -> Config:
    return Config().with_overrides({"ingestion.sources": [{"uri": uri, "format": written_as}]})


def read(uri: str, written_as: str) -> list[tuple[str, int, str, str | None]]:
    """Name below the source, position, content and problem of each record."""
    config = source(uri, written_as)
    return [
        (part.uri.split("/day=")[-1], int(position), bytes(raw.as_py() if hasattr(raw, "as_py") else raw).decode(), bad)
        for part in parts_of(config, {})
        for call, _ in part.reads(config.ingestion)
        for piece in call()
        for position, raw, bad in zip(
            piece.positions, piece.raw, piece.problems or [None] * len(piece.raw), strict=True
        )
    ]


def put(uri: str, content: bytes) -> None:
    parent, _, name = uri.rpartition("/")
    Storage(parent).write(content, name)


# Each store


@pytest.mark.parametrize("written_as", FORMATS)
def test_a_store_gives_the_rows_that_the_same_local_files_give(root: str, local: Path, written_as: str) -> None:
    Storage(root).upload(local / written_as, "data", written_as)
    expected = read(f"{local}/{written_as}", written_as)
    assert len(expected) == 2 * ROWS
    assert {json.loads(raw)["conversation_id"] for _, _, raw, _ in expected} == {f"c{n}" for n in range(2 * ROWS)}
    assert read(f"{root}/data/{written_as}", written_as) == expected
    assert read(f"{root}/data/{written_as}/", written_as) == expected
    assert read(f"{root}/data/*/day=?/{FORMATS[written_as]}", written_as) == expected
    assert read(f"{root}/data/{written_as}/**/p?rt[.]*", written_as) == expected
    assert read(f"{root}/data/{written_as}/day=0/{FORMATS[written_as]}", written_as) == expected[:ROWS]


def test_marks_and_uris_name_the_object_and_notice_another_one(root: str) -> None:
    config = source(f"{root}/marks", "jsonl")
    put(f"{root}/marks/a.jsonl", b"{}\n")
    (before,) = parts_of(config, {})
    assert before.uri == f"{root}/marks/a.jsonl"
    assert before.arrived_at is not None
    assert abs(before.arrived_at.timestamp() - time.time()) < 120
    mark = mark_of(config, before)
    assert mark is not None
    assert parts_of(source(f"{root}/marks/*.jsonl", "jsonl"), dict([mark])) == []
    put(f"{root}/marks/a.jsonl", b"{}\n{}\n")
    (after,) = parts_of(config, dict([mark]))
    assert after.mark != before.mark


def test_what_is_not_there_is_named(root: str) -> None:
    with pytest.raises(SourceError, match="base/none' does not exist"):
        parts_of(source(f"{root}/none", "jsonl"), {})
    put(f"{root}/other/x.parquet", b"x")
    with pytest.raises(SourceError, match=r"base/other' holds no jsonl file"):
        parts_of(source(f"{root}/other", "jsonl"), {})
    with pytest.raises(StorageError, match="base/none/at/all"):
        Storage(root).read("none", "at", "all")


def test_storage_reads_lists_and_replaces(root: str, tmp_path: Path) -> None:
    storage = pickle.loads(pickle.dumps(Storage(f"{root}/storage")))
    assert storage.list("receipts") == []
    assert not storage.exists("receipts")
    uri = storage.write(b"one", "receipts", "a.json")
    storage.write(b"two", "receipts", "a.json")
    assert uri == f"{root}/storage/receipts/a.json"
    assert storage.read("receipts", "a.json") == b"two"
    assert storage.list("receipts") == ["a.json"]
    assert storage.exists("receipts")
    assert storage.exists("receipts", "a.json")
    folder = tmp_path / "model"
    (folder / "deep").mkdir(parents=True)
    (folder / "old").write_text("1")
    (folder / "deep" / "x").write_text("x")
    storage.upload(folder, "models", "a")
    with local_folder(storage.uri("models", "a")) as copy:
        assert (copy / "old").read_text() == "1"
        assert (copy / "deep" / "x").read_text() == "x"
    (folder / "old").rename(folder / "new")
    (folder / "new").write_text("22")
    storage.upload(folder, "models", "a")
    assert storage.list("models", "a") == ["deep", "new"]
    with local_folder(storage.uri("models", "a")) as copy:
        assert sorted(path.name for path in copy.iterdir()) == ["deep", "new"]


def test_iceberg_tables_lie_on_the_store(root: str, tmp_path: Path) -> None:
    catalog = f"sqlite:///{tmp_path}/catalog.db"
    config = Config().with_overrides({"storage.uri": f"{root}/warehouse", "storage.catalog_uri": catalog})
    schema = pa.schema([("content_hash", pa.string()), ("text", pa.string())])
    table = tables.open_table(config.storage, "support.conversations", schema)
    for number in range(2):
        rows = pa.table({"content_hash": [f"{number}a", f"{number}b"], "text": ["x", "y"]}, schema=schema)
        tables.append(table, [stage(table, rows, f"{tables.fresh_name()}")], {})
    version = tables.latest(config)
    held = tables.read_local(config, version, columns=["content_hash"])
    assert held["content_hash"].to_pylist() == ["0a", "0b", "1a", "1b"]
    filesystem, path = open_uri(f"{root}/warehouse/tables")
    names = [info.path for info in filesystem.get_file_info(fs.FileSelector(path, recursive=True))]
    assert sum(name.endswith(".parquet") for name in names) == 2
    assert any(name.endswith(".metadata.json") for name in names)
    from app.table_files import stored

    assert len(stored(tables.open_table(config.storage, "support.conversations"))) == sum("." in n[-14:] for n in names)
    other = config.with_overrides(
        {
            "ingestion.sources": [
                {"uri": "iceberg:support.conversations", "format": "iceberg", "columns": {"user": "text"}}
            ]
        }
    )
    found = parts_of(other, {})
    assert len(found) == 2
    assert sum(len(piece.raw) for part in found for call, _ in part.reads(other.ingestion) for piece in call()) == 4


# F7: an object store that fails


@pytest.mark.fault("F7", seen="the proxy counts the answers it harmed")
@pytest.mark.parametrize(
    ("method", "harms"),
    [
        ("GET", lambda chance: [answer(503)] * chance.randint(2, 3)),
        ("GET", lambda chance: [answer(429, "Retry-After: 1\r\n"), *[answer(429)] * chance.randint(1, 2)]),
        ("GET", lambda chance: [answer(500)]),
        ("GET", lambda chance: [reset_after(chance.randrange(1, 15_000))]),
        ("GET", lambda chance: [reset_after(0), reset_after(chance.randrange(1, 15_000))]),
        ("HEAD", lambda chance: [answer(503)] * chance.randint(2, 3)),
    ],
    ids=["503", "429", "500", "reset", "reset twice", "503 to HEAD"],
)
def test_a_read_that_fails_is_tried_again(
    s3: tuple[Store, Proxy], method: str, harms: Callable[[Random], list[Harm]], fault: Fault
) -> None:
    store, proxy = s3
    put(store.uri("f7", "a.jsonl"), jsonl(0, 100))
    harmed = harms(fault.random)
    proxy.harm(method, harmed, path="a.jsonl")
    found = read(store.uri("f7", "a.jsonl"), "jsonl")
    assert proxy.done == len(harmed)
    fault.happened(proxy.seconds_ago())
    fault.recovered()
    assert "".join(f"{raw}\n" for _, _, raw, _ in found).encode() == jsonl(0, 100)


@pytest.mark.slow
@pytest.mark.fault("F7", seen="the proxy counts the answers it harmed: 3 to 29")
@pytest.mark.parametrize("how", ["503", "429", "reset"])
def test_a_store_that_goes_on_failing_is_given_up_after_a_while_and_the_object_named(
    s3: tuple[Store, Proxy], how: str, fault: Fault
) -> None:
    store, proxy = s3
    put(store.uri("f7", "a.jsonl"), jsonl(0, 100))
    config = source(store.uri("f7", "a.jsonl"), "jsonl")
    ((call, _),) = [read for part in parts_of(config, {}) for read in part.reads(config.ingestion)]
    harm = reset_after(fault.random.randrange(1, 15_000)) if how == "reset" else answer(int(how))
    proxy.harm("GET", [harm] * 1_000, path="a.jsonl")
    started_s = time.monotonic()
    with pytest.raises(SourceUnavailable, match=r"s3://rayloop/f7/a\.jsonl"):
        list(call())
    assert time.monotonic() - started_s < 90
    assert 3 <= proxy.done < 30
    proxy.harm("GET", [])
    fault.happened()
    assert sum(len(piece.raw) for piece in call()) == 100
    fault.recovered()


@pytest.mark.fault("F7", seen="the proxy shortened one answer")
@pytest.mark.parametrize("how", ["by a byte", "by more"])
def test_an_object_that_is_shorter_than_the_store_says_is_noticed(
    s3: tuple[Store, Proxy], how: str, fault: Fault
) -> None:
    store, proxy = s3
    content = jsonl(0, 100)
    missing = 1 if how == "by a byte" else fault.random.randint(2, len(content))
    put(store.uri("f7", "a.jsonl"), content)
    proxy.harm("GET", [wrong_length(len(content) - missing)], path="a.jsonl")
    with pytest.raises(SourceUnavailable, match=rf"a\.jsonl failed \(cut short between bytes 0 and {len(content)}"):
        read(store.uri("f7", "a.jsonl"), "jsonl")
    assert proxy.done == 1
    proxy.harm("GET", [wrong_length(len(content) - missing)], path="a.jsonl")
    with pytest.raises(StorageError, match=r"a\.jsonl \(cut short"):
        Storage(store.uri("f7")).read("a.jsonl")
    assert proxy.done == 1
    fault.happened()
    assert len(read(store.uri("f7", "a.jsonl"), "jsonl")) == 100
    fault.recovered()


def test_a_file_may_end_in_any_byte(root: str) -> None:
    storage = Storage(root)
    for content in (b"", b"\xff", b"x\xff", b"\xff" * 1_000, b"\x00"):
        storage.write(content, "bytes", "x")
        assert storage.read("bytes", "x") == content


@pytest.mark.fault("F7", seen="the proxy shortened the answer")
def test_a_parquet_file_that_is_cut_short_is_noticed(s3: tuple[Store, Proxy], local: Path, fault: Fault) -> None:
    store, proxy = s3
    put(store.uri("f7", "a.parquet"), (local / "parquet" / "day=0" / "part.parquet").read_bytes())
    whole = read(store.uri("f7", "a.parquet"), "parquet")  # what is read next may lie where this was in memory
    proxy.harm("GET", [wrong_length(fault.random.randint(0, 2_000))] * 20, path="a.parquet")
    with pytest.raises(SourceUnavailable, match=r"a\.parquet failed \(cut short between bytes"):
        read(store.uri("f7", "a.parquet"), "parquet")
    assert proxy.done >= 1
    proxy.harm("GET", [])
    fault.happened()
    assert read(store.uri("f7", "a.parquet"), "parquet") == whole
    fault.recovered()


@pytest.mark.fault("F7", seen="the proxy shortened the answer")
def test_a_staged_block_that_is_cut_short_is_noticed(s3: tuple[Store, Proxy], fault: Fault) -> None:
    store, proxy = s3
    staging, name = Staging(Storage(store.uri("f7")), "run"), BlockName(0, 0, ROWS)
    rows = pa.table({"conversation_id": [f"c{number}" for number in range(ROWS)]})
    staging.write(name, rows)
    proxy.harm("GET", [wrong_length(fault.random.randint(0, 100))] * 20, path=".arrow")
    with pytest.raises(StorageError, match=r"\.arrow \(cut short between bytes"):
        staging.read(name)
    assert proxy.done >= 1
    proxy.harm("GET", [])
    fault.happened()
    assert staging.read(name) == rows
    fault.recovered()


@pytest.mark.fault("F7", seen="the proxy flipped a bit of one answer")
@pytest.mark.parametrize("where", ["content", "checksum"])
def test_a_flipped_bit_in_a_compressed_file_is_noticed(s3: tuple[Store, Proxy], where: str, fault: Fault) -> None:
    store, proxy = s3
    packed = gzip.compress(jsonl(0, 100))
    put(store.uri("f7", "a.jsonl.gz"), packed)
    head, tail = 10, len(packed) - 8  # of gzip: RFC 1952, 2.3
    place = fault.random.randrange(head, tail) if where == "content" else fault.random.randrange(tail, tail + 4)
    proxy.harm("GET", [flipped(place)], path="a.jsonl.gz")
    with pytest.raises(SourceError, match=r"a\.jsonl\.gz as jsonl \("):
        read(store.uri("f7", "a.jsonl.gz"), "jsonl")
    assert proxy.done == 1
    fault.happened()
    assert len(read(store.uri("f7", "a.jsonl.gz"), "jsonl")) == 100
    fault.recovered()


@pytest.mark.slow
@pytest.mark.fault("F7", seen="the proxy counts the answers it harmed")
def test_a_write_that_fails_is_tried_again_or_leaves_the_old_object(s3: tuple[Store, Proxy], fault: Fault) -> None:
    store, proxy = s3
    storage = Storage(store.uri("f7"))
    storage.write(b"old", "x")
    harms = [answer(503), reset, answer(429)]
    fault.random.shuffle(harms)
    proxy.harm("PUT", harms[:2], path="/x")
    storage.write(b"new", "x")
    assert proxy.done == 2
    fault.happened(proxy.seconds_ago())
    fault.recovered()
    assert storage.read("x") == b"new"
    proxy.harm("PUT", [answer(503)] * 1_000, path="/x")
    with pytest.raises(StorageError, match="s3://rayloop/f7/x"):
        storage.write(b"newer", "x")
    assert proxy.done >= 3
    proxy.harm("PUT", [])
    assert storage.read("x") == b"new"
    assert storage.list() == ["x"]


@pytest.mark.fault("F7", seen="the first part was written, a later one refused by the proxy")
def test_a_large_write_that_breaks_off_leaves_no_part_of_the_object(s3: tuple[Store, Proxy], fault: Fault) -> None:
    store, proxy = s3
    content = os.urandom(25 << 20)  # three parts and more
    proxy.harm("PUT", [answer(403)] * 1_000, path=f"partNumber={fault.random.randint(2, 3)}")
    with pytest.raises(StorageError, match="s3://rayloop/f7/large"):
        Storage(store.uri("f7")).write(content, "large")
    assert proxy.done >= 1
    assert any("partNumber=1" in request for request in proxy.requests)
    proxy.harm("PUT", [])
    fault.happened()
    assert not Storage(store.uri("f7")).exists("large")
    Storage(store.uri("f7")).write(content, "large")
    fault.recovered()
    assert Storage(store.uri("f7")).read("large") == content


@pytest.mark.slow
@pytest.mark.fault("F7", seen="the proxy kept one answer back; nobody listens on the other port")
def test_a_store_that_keeps_silent_or_is_not_there_is_given_up(
    s3: tuple[Store, Proxy], monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    store, proxy = s3
    put(store.uri("f7", "a.jsonl"), b"{}\n")
    proxy.harm("HEAD", [silence], path="a.jsonl")
    assert len(read(store.uri("f7", "a.jsonl"), "jsonl")) == 1
    assert proxy.done == 1
    fault.happened(proxy.seconds_ago())
    fault.recovered()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    started_s = time.monotonic()
    with pytest.raises(SourceUnavailable, match=r"s3://rayloop/f7/a\.jsonl"):
        parts_of(source(store.uri("f7", "a.jsonl"), "jsonl"), {})
    with pytest.raises(StorageError, match=r"s3://rayloop/f7"):
        Storage(store.uri("f7")).list()
    assert time.monotonic() - started_s < 120
