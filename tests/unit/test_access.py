import json
import os
import stat
from pathlib import Path

import pytest

from app.errors import StageFailed, StorageError
from app.serving.access import VARIABLE, Access, ensure_key
from app.storage import Storage


@pytest.fixture(autouse=True)
def no_key_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


@pytest.fixture
def storage(store: str) -> Storage:
    return Storage(store)


def kept(storage: Storage) -> bytes:
    return storage.read("serving", "api_keys.json")


def test_a_key_is_made_once_and_only_its_hash_is_kept(storage: Storage) -> None:
    key = ensure_key(storage)
    assert key is not None
    assert len(key) == len("sk-rayloop-") + 48
    assert key.encode() not in kept(storage)
    assert ensure_key(storage) is None
    assert Access(storage).allows(f"Bearer {key}")
    mode = os.stat(Path(storage.path("serving", "api_keys.json"))).st_mode
    assert stat.S_IMODE(mode) == 0o600


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Basic {key}",
        "{key}",
        "Bearer {key}x",
        "Bearer x{key}",
        "Bearer é",
        "Bearer \udcff",
    ],
)
def test_anything_but_the_key_is_refused(storage: Storage, header: str | None) -> None:
    key = ensure_key(storage)
    assert not Access(storage).allows(header and header.format(key=key))


def test_the_scheme_may_be_in_any_case(storage: Storage) -> None:
    key = ensure_key(storage)
    assert Access(storage).allows(f"bearer {key}")


def test_the_environments_key_is_accepted_kept_as_a_hash_and_replaced_when_it_changes(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "sk-first")
    assert ensure_key(storage) is None
    assert b"sk-first" not in kept(storage)
    monkeypatch.setenv(VARIABLE, "sk-second")
    ensure_key(storage)
    access = Access(storage)
    assert access.allows("Bearer sk-second")
    assert not access.allows("Bearer sk-first")
    assert len(json.loads(kept(storage))["keys"]) == 1


def test_a_made_key_stays_valid_beside_the_environments(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    made = ensure_key(storage)
    monkeypatch.setenv(VARIABLE, "sk-mine")
    ensure_key(storage)
    access = Access(storage)
    assert access.allows(f"Bearer {made}")
    assert access.allows("Bearer sk-mine")


def test_a_replica_with_the_environments_key_needs_no_file(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "sk-mine")
    assert Access(storage).allows("Bearer sk-mine")


def test_without_any_key_nothing_starts(storage: Storage) -> None:
    with pytest.raises(StageFailed, match="no API key"):
        Access(storage)


def test_a_damaged_file_is_named(storage: Storage) -> None:
    storage.write(b'{"keys": [{"hash": 1}]}', "serving", "api_keys.json")
    with pytest.raises(StorageError, match=r"api_keys\.json is damaged"):
        Access(storage)


def test_a_users_pseudonym_is_stable_and_another_in_another_store(storage: Storage, tmp_path: Path) -> None:
    ensure_key(storage)
    other = Storage(str(tmp_path / "other"))
    ensure_key(other)
    name = Access(storage).pseudonym("anna@example.org")
    assert name == Access(storage).pseudonym("anna@example.org")
    assert name != Access(storage).pseudonym("anna@example.com")
    assert name != Access(other).pseudonym("anna@example.org")
