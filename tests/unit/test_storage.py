"""Files below the root are whole or absent."""

import os
import pickle
from pathlib import Path

import pytest

from app.errors import StorageError
from app.storage import Storage, local_folder, node_cache, resolve


def test_what_is_written_is_read_and_listed(store: str) -> None:
    storage = Storage(store)
    uri = storage.write(b"one", "receipts", "ingest", "a.json")
    storage.write(b"two", "receipts", "ingest", "a.json")
    assert uri == f"{store}/receipts/ingest/a.json"
    assert storage.read("receipts", "ingest", "a.json") == b"two"
    assert storage.list("receipts", "ingest") == ["a.json"]
    assert storage.list("receipts", "absent") == []


def test_a_write_that_fails_leaves_the_old_content(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(store)
    storage.write(b"old", "x")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)  # a full disk cannot be had on demand
    with pytest.raises(StorageError, match="No space left"):
        storage.write(b"new", "x")
    monkeypatch.undo()
    assert storage.read("x") == b"old"


def test_a_missing_file_is_named(store: str) -> None:
    with pytest.raises(StorageError, match="receipts/absent"):
        Storage(store).read("receipts", "absent")


def test_an_unknown_scheme_is_refused_with_those_that_work() -> None:
    with pytest.raises(StorageError, match="s3://"):
        Storage("ftp://host/x")


def test_relative_paths_are_the_users_not_the_jobs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAYLOOP_HOME", str(tmp_path))
    assert resolve("data/x.jsonl") == f"{tmp_path}/data/x.jsonl"
    assert resolve("/abs/x") == "/abs/x"
    assert resolve("s3://bucket/x") == "s3://bucket/x"


def test_it_survives_pickling(store: str) -> None:
    storage = Storage(store)
    storage.write(b"one", "x")
    assert pickle.loads(pickle.dumps(storage)).read("x") == b"one"


def test_an_uploaded_folder_replaces_the_one_before(store: str, tmp_path: Path) -> None:
    storage, folder = Storage(store), tmp_path / "model"
    folder.mkdir()
    (folder / "old").write_text("1")
    storage.upload(folder, "models", "a")
    (folder / "old").rename(folder / "new")
    uri = storage.upload(folder, "models", "a")
    assert storage.list("models", "a") == ["new"]
    with local_folder(uri) as local:
        assert (local / "new").read_text() == "1"


def test_files_that_cannot_all_be_added_are_not_added_at_all(store: str, tmp_path: Path) -> None:
    storage, folder = Storage(store), tmp_path / "part"
    folder.mkdir()
    for name in ("a", "b", "c"):
        (folder / name).write_text(name)
    storage.write(b"of another worker", "whole", "d")
    (Path(storage.path("whole")) / "b").mkdir()
    with pytest.raises(StorageError, match=r"cannot write .*whole"):
        storage.add(folder, "whole")
    assert storage.list("whole") == ["b", "d"]
    (Path(storage.path("whole")) / "b").rmdir()
    storage.add(folder, "whole")
    assert storage.list("whole") == ["a", "b", "c", "d"]


def test_a_missing_folder_is_named(store: str) -> None:
    with pytest.raises(StorageError, match="no folder at"), local_folder(f"{store}/models/none"):
        pass


def test_a_cache_that_others_may_enter_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = node_cache()
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    with pytest.raises(StorageError, match="not this user's alone"):
        node_cache()
    folder.rmdir()
    (tmp_path / "elsewhere").mkdir()
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match="not this user's alone"):
        node_cache()
