import asyncio
import datetime
import json
import logging
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from app.errors import RequestError, StageFailed, StorageError
from app.serving import access as module
from app.serving import keys
from app.serving.access import VARIABLE, Access, ensure_key, scope_of
from app.storage import Storage

NOW = datetime.datetime.now(datetime.UTC)


@pytest.fixture(autouse=True)
def no_key_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


@pytest.fixture
def storage(store: str) -> Storage:
    return Storage(store)


def allowed(access: Access, header: str | None, path: str = "/v1/models") -> bool:
    """Whether a header opens a path."""
    try:
        access.check(path, header)
    except RequestError:
        return False
    return True


def make(storage: Storage, *arguments: Any, **options: Any) -> str:
    return keys.change(storage, lambda ring: ring.with_new(*arguments, **options)).key


def kept(storage: Storage) -> bytes:
    return storage.read("serving", "api_keys.json")


def test_a_key_is_made_once_and_only_its_hash_is_kept(storage: Storage) -> None:
    key = ensure_key(storage)
    assert key is not None
    assert len(key) == len("sk-rayloop-") + 48
    assert key.encode() not in kept(storage)
    assert ensure_key(storage) is None
    assert allowed(Access(storage), f"Bearer {key}")
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
    assert not allowed(Access(storage), header and header.format(key=key))


def test_the_scheme_may_be_in_any_case(storage: Storage) -> None:
    key = ensure_key(storage)
    assert allowed(Access(storage), f"bearer {key}")


def test_the_environments_key_is_accepted_kept_as_a_hash_and_replaced_when_it_changes(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "sk-first")
    assert ensure_key(storage) is None
    assert b"sk-first" not in kept(storage)
    monkeypatch.setenv(VARIABLE, "sk-second")
    ensure_key(storage)
    access = Access(storage)
    assert allowed(access, "Bearer sk-second")
    assert not allowed(access, "Bearer sk-first")
    assert len(json.loads(kept(storage))["keys"]) == 1


def test_a_made_key_stays_valid_beside_the_environments(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    made = ensure_key(storage)
    monkeypatch.setenv(VARIABLE, "sk-mine")
    ensure_key(storage)
    access = Access(storage)
    assert allowed(access, f"Bearer {made}")
    assert allowed(access, "Bearer sk-mine")


def test_a_replica_with_the_environments_key_needs_no_file(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "sk-mine")
    assert allowed(Access(storage), "Bearer sk-mine")


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


def test_the_environments_key_may_do_everything(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "sk-mine")
    key = Access(storage).check("/v1/why/x", "Bearer sk-mine")
    assert key
    assert (key.source, key.scopes) == ("environment", keys.SCOPES)


def test_keys_of_earlier_versions_open_everything(storage: Storage) -> None:
    made = keys.new_secret()
    old = keys.stored_key(made, "any", "made", NOW)
    fields = {"source": "made", "salt": old.salt, "hash": old.hash, "created_at": old.created_at}
    storage.write(json.dumps({"user_salt": "s", "keys": [fields]}).encode(), *keys.FILE)
    key = Access(storage).check("/v1/why/x", f"Bearer {made}")
    assert key
    assert (key.name, key.id, key.scopes, key.state(NOW)) == ("made", old.hash[:8], keys.SCOPES, "active")


@pytest.mark.parametrize(
    ("path", "scope"),
    [
        ("/", None), ("/health", None), ("/ready", None), ("/page/page.js", None),
        ("/v1/chat/completions", "chat"), ("/v1/completions", "chat"), ("/v1/embeddings", "chat"),
        ("/v1/models", "chat"), ("/v1/models/a/b", "chat"), ("/tokenize", "chat"), ("/detokenize", "chat"),
        ("/openapi.json", "chat"), ("/v1/feedback", "feedback"), ("/v1/why/chatcmpl-1", "admin"),
        ("", "admin"), ("//", "admin"), ("/health/", "admin"), ("/HEALTH", "admin"), ("/v1/modelsx", "admin"),
        ("/v1/chat/completions/", "admin"), ("/v1/feedback/x", "admin"), ("/docs", "admin"), ("/page/", "admin"),
    ],
)  # fmt: skip
def test_what_the_table_does_not_name_wants_admin(path: str, scope: str | None) -> None:
    assert scope_of(path) == scope


def test_a_key_opens_what_it_has_the_scope_for_and_is_told_what_it_lacks(storage: Storage) -> None:
    made = make(storage, NOW, "shop", ["chat"])
    access = Access(storage)
    assert allowed(access, f"Bearer {made}", "/v1/chat/completions")
    with pytest.raises(RequestError, match="lacks the scope `feedback`, which this route wants; it has `chat`") as told:
        access.check("/v1/feedback", f"Bearer {made}")
    assert (told.value.status, told.value.code) == (403, "insufficient_scope")
    with pytest.raises(RequestError, match="is not known here"):
        access.check("/v1/feedback", f"Bearer {made}x")
    for not_sent in (None, made, f"Basic {made}"):
        with pytest.raises(RequestError, match="is missing: send it as `Authorization: Bearer <key>`"):
            access.check("/v1/feedback", not_sent)


def refused(access: Access, made: str) -> str:
    with pytest.raises(RequestError) as told:
        access.check("/v1/models", f"Bearer {made}")
    assert (told.value.status, told.value.code) == (401, "invalid_api_key")
    return str(told.value)


def test_only_who_has_the_key_is_told_that_it_was_revoked_or_has_expired(storage: Storage) -> None:
    long_ago = NOW - datetime.timedelta(days=2)
    old = make(storage, long_ago, "old", expires_in=datetime.timedelta(days=1))
    gone = make(storage, NOW, "gone")
    keys.change(storage, lambda ring: ring.revoked(NOW, "gone"))
    access = Access(storage)
    assert "has expired" in refused(access, old)
    assert "was revoked" in refused(access, gone)
    for other in (f"{old}x", f"{gone}x"):
        assert "is not known" in refused(access, other)


def test_a_revoked_key_of_the_environment_stays_revoked(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "sk-mine")
    ensure_key(storage)
    keys.change(storage, lambda ring: ring.revoked(NOW, "environment"))
    ensure_key(storage)
    assert "was revoked" in refused(Access(storage), "sk-mine")


async def eventually(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not holds():
            await asyncio.sleep(0.01)


def test_changes_of_the_file_take_effect_and_while_it_cannot_be_read_the_last_state_stays(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "POLL_S", 0.02)
    caplog.set_level(logging.INFO)
    first = ensure_key(storage)
    access = Access(storage)

    async def follow() -> None:
        async with access.followed():
            second = await asyncio.to_thread(make, storage, NOW, "shop")
            await eventually(lambda: allowed(access, f"Bearer {second}"))
            whole = kept(storage)
            for broken in (b"{", b'{"keys": [{"hash": 1}], "user_salt": ""}', b"[]", None):
                caplog.clear()
                if broken is None:
                    storage.remove_file(*keys.FILE)
                else:
                    storage.write(broken, *keys.FILE)
                await eventually(lambda: bool(caplog.records))
                await asyncio.sleep(0.1)
                assert [record.levelname for record in caplog.records] == ["ERROR"], "it is told once"
                assert allowed(access, f"Bearer {first}")
                caplog.clear()
                storage.write(whole, *keys.FILE)
                await eventually(lambda: "can be read again" in caplog.text)
            await asyncio.to_thread(keys.change, storage, lambda ring: ring.revoked(NOW, "made"))
            await eventually(lambda: not allowed(access, f"Bearer {first}"))
            assert allowed(access, f"Bearer {second}")

    asyncio.run(follow())


def test_a_key_expires_while_the_file_cannot_be_read(storage: Storage) -> None:
    life = datetime.timedelta(milliseconds=300)
    made = make(storage, datetime.datetime.now(datetime.UTC), "brief", expires_in=life)
    access = Access(storage)
    assert allowed(access, f"Bearer {made}")
    storage.remove_file(*keys.FILE)

    async def wait() -> None:
        async with access.followed():
            await eventually(lambda: not allowed(access, f"Bearer {made}"))

    asyncio.run(wait())
    assert "has expired" in refused(access, made)
