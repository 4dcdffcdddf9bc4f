"""API keys as they are kept, and the command that changes them."""

import datetime
import json
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.errors import AccessError, ConfigError, StorageError
from app.serving import keys
from app.serving.keys import SCOPES, KeyRing
from app.storage import Storage
from jobs import keys as job

AT = datetime.datetime(2026, 11, 26, tzinfo=datetime.UTC)
HOUR = datetime.timedelta(hours=1)


@pytest.fixture
def storage(store: str) -> Storage:
    return Storage(store)


@pytest.fixture
def run(store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """The command: exit code, standard output, standard error."""
    config = tmp_path / "c.yaml"
    config.write_text(f"storage: {{uri: {store}}}")

    def ran(*arguments: str) -> tuple[int, str, str]:
        code = job.main([*arguments, "--config", str(config)])
        return code, *capsys.readouterr()

    return ran


def last(out: str) -> list[dict[str, Any]]:
    told: list[dict[str, Any]] = json.loads(out.splitlines()[-1])["keys"]
    return told


def shown(out: str) -> str:
    (made,) = [line.strip() for line in out.splitlines() if line.strip().startswith(keys.PREFIX)]
    return made


def test_a_made_key_is_shown_once_and_only_its_hash_is_kept(
    run: Callable[..., tuple[int, str, str]], storage: Storage
) -> None:
    code, out, _ = run("make", "--name", "shop", "--scopes", "feedback, chat", "--expires-in-days", "90",
                       "--requests-per-minute", "60", "--tokens-per-minute", "9000")  # fmt: skip
    assert code == 0
    made = shown(out)
    assert out.count(made) == 1
    (told,) = last(out)
    ring = keys.read(storage)
    assert ring
    (stored,) = ring.keys
    assert stored.matches(made)
    assert made not in storage.read(*keys.FILE).decode()
    assert (stored.name, stored.scopes, stored.requests_per_minute, stored.tokens_per_minute) == (
        "shop", ("chat", "feedback"), 60, 9000,
    )  # fmt: skip
    assert len(stored.id) == 8
    begun, ends = (datetime.datetime.fromisoformat(str(time)) for time in (stored.created_at, stored.expires_at))
    assert ends - begun == datetime.timedelta(days=90)
    code, listed, _ = run("list")
    assert code == 0
    assert [told] == last(listed)
    (row,) = (line.split() for line in listed.splitlines() if line.startswith(stored.id))
    assert row == [stored.id, "shop", "chat,feedback", "active", stored.expires_at, "60", "9000"]
    for secret in (made, stored.hash, stored.salt, ring.user_salt):
        assert secret not in listed


def test_a_list_of_nothing_is_empty(run: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = run("list")
    assert (code, last(out)) == (0, [])


def test_a_rotated_key_goes_on_for_the_overlap_and_the_new_one_is_like_it(
    run: Callable[..., tuple[int, str, str]], storage: Storage
) -> None:
    first = shown(run("make", "--name", "shop", "--scopes", "chat", "--requests-per-minute", "5")[1])
    code, out, _ = run("rotate", "shop", "--overlap-s", "3600")
    assert code == 0
    second = shown(out)
    ring = keys.read(storage)
    assert ring
    old, new = ring.keys
    assert old.matches(first)
    assert new.matches(second)
    assert (new.name, new.scopes, new.requests_per_minute, new.expires_at) == ("shop", ("chat",), 5, None)
    now = datetime.datetime.now(datetime.UTC)
    assert [key.state(now) for key in ring.keys] == ["active", "active"]
    assert [key.state(now + HOUR) for key in ring.keys] == ["expired", "active"]
    assert run("rotate", new.id, "--overlap-s", "0")[0] == 0
    ring = keys.read(storage)
    assert ring
    assert [key.state(datetime.datetime.now(datetime.UTC)) for key in ring.keys] == ["active", "expired", "active"]


def test_a_name_is_revoked_with_all_its_keys_and_an_id_alone(
    run: Callable[..., tuple[int, str, str]], storage: Storage
) -> None:
    def states() -> list[str]:
        ring = keys.read(storage)
        assert ring
        return [key.state(datetime.datetime.now(datetime.UTC)) for key in ring.keys]

    run("make", "--name", "shop")
    (new,) = last(run("rotate", "shop")[1])
    run("make", "--name", "other")
    assert run("revoke", new["id"])[0] == 0
    assert states() == ["active", "revoked", "active"]
    code, out, _ = run("revoke", "shop")
    assert (code, len(last(out))) == (0, 1), "the other one was revoked before"
    assert states() == ["revoked", "revoked", "active"]
    code, out, _ = run("revoke", "shop")
    assert (code, last(out), "The key shop was revoked before." in out) == (0, [], True)


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (("make", "--name", "shop"), 1, "there is an active key named shop: choose another name, or rotate that key"),
        (("make", "--name", "a b"), 2, "'a b' cannot be a key's name"),
        (("make", "--name", "0123abcd"), 2, "'0123abcd' cannot be a key's name"),
        (("make", "--name", "x", "--scopes", "chat,root"), 2, "there is no scope 'root': give some of chat, feedback"),
        (("make", "--name", "x", "--scopes", ","), 2, "a key without any scope opens nothing"),
        (("make", "--name", "x", "--expires-in-days", "-1"), 2, "--expires-in-days -1 cannot be: give 0 to 36500"),
        (("make", "--name", "x", "--expires-in-days", "nan"), 2, "--expires-in-days nan cannot be"),
        (("make", "--name", "x", "--expires-in-days", "1e9"), 2, "--expires-in-days 1e+09 cannot be"),
        (("make", "--name", "x", "--tokens-per-minute", "0"), 2, "a limit of 0 a minute lets nothing in"),
        (("rotate", "nobody"), 1, "there is no key 'nobody': see `jobs.keys list`"),
        (("rotate", "shop", "--overlap-s", "-1"), 2, "--overlap-s -1 cannot be: give 0 to 3153600000"),
        (("make", "--name", "x", "--expires-in-days", "0"), 2, "a life of 0 days is none: give more than 0 days"),
        (("rotate", "gone"), 1, "the key 'gone' is no longer active: make a new one"),
        (("revoke", "nobody"), 1, "there is no key 'nobody'"),
        (("list", "--set", "serving.requests_per_minute=0"), 2, "serving.requests_per_minute"),
    ],
)
def test_what_cannot_be_done_is_a_sentence_and_changes_nothing(
    run: Callable[..., tuple[int, str, str]], storage: Storage, arguments: tuple[str, ...], code: int, told: str
) -> None:
    run("make", "--name", "shop")
    run("make", "--name", "gone")
    run("revoke", "gone")
    before = storage.read(*keys.FILE)
    ended, out, error = run(*arguments)
    assert (ended, out) == (code, "")
    assert told in error
    assert storage.read(*keys.FILE) == before


def test_the_environments_key_is_not_rotated_here() -> None:
    ring = KeyRing("", (keys.stored_key("sk-mine", "environment", "environment", AT),))
    with pytest.raises(AccessError, match="comes from RAYLOOP_API_KEY: set the variable to another one"):
        ring.rotated(AT, "environment", HOUR)


def test_a_rotated_key_lives_as_long_as_the_one_before_did_and_never_prolongs_it() -> None:
    ring, old = keys.new_ring().with_new(AT, "shop", expires_in=2 * HOUR)
    ring, new = ring.rotated(AT + HOUR, "shop", 24 * HOUR)
    assert new.stored.expires_at == keys.as_text(AT + 3 * HOUR)
    assert ring.keys[0] == new.replaces == old.stored, "the old one ends when it would have"
    assert ring.rotated(AT + HOUR, "shop", HOUR)[1].replaces == new.stored, "the one that lives longest is meant"


@given(st.lists(st.tuples(st.sampled_from(["make", "rotate", "revoke"]), st.sampled_from("abc"), st.integers(0, 3))))
def test_whatever_is_done_a_revoked_key_never_comes_back_and_no_key_lives_longer_than_it_was_given(
    steps: list[tuple[str, str, int]],
) -> None:
    ring, at = keys.new_ring(), AT
    for what, name, hours in steps:
        at += HOUR / 2
        before = {key.id: key for key in ring.keys}
        try:
            if what == "make":
                ring, _ = ring.with_new(at, name, expires_in=hours * HOUR if hours else None)
            elif what == "rotate":
                ring, _ = ring.rotated(at, name, hours * HOUR)
            else:
                ring, _ = ring.revoked(at, name)
        except (AccessError, ConfigError):
            continue
        after = {key.id: key for key in ring.keys}
        assert before.keys() <= after.keys()
        for identity, key in before.items():
            assert not key.revoked_at or after[identity] == key
            assert not key.expires_at or (after[identity].expires_at or "~") <= key.expires_at
            assert after[identity].hash == key.hash
        if what == "revoke":
            assert all(key.state(at) == "revoked" for key in ring.keys if key.name == name)


@pytest.mark.parametrize(
    "fields",
    [{"scopes": ["root"]}, {"expires_at": "soon"}, {"expires_at": "2026-01-01T00:00:00"}, {"expires_at": 5}, {"x": 1}],
)
def test_a_damaged_key_is_not_taken_for_one_that_opens_more(storage: Storage, fields: dict[str, Any]) -> None:
    keys.change(storage, lambda ring: ring.with_new(AT, "shop", ["chat"]))
    content = json.loads(storage.read(*keys.FILE))
    content["keys"][0] |= fields
    storage.write(json.dumps(content).encode(), *keys.FILE)
    with pytest.raises(StorageError, match=r"api_keys\.json is damaged"):
        keys.read(storage)


def make_some(store: str, writer: int, together: Any) -> None:
    def slowly(ring: KeyRing, name: str) -> tuple[KeyRing, keys.NewKey]:
        time.sleep(0.02)  # after it was read, before it is written
        return ring.with_new(AT, name)

    together.wait(60)
    for each in range(5):
        keys.change(Storage(store), lambda ring, each=each: slowly(ring, f"w{writer}-{each}"))  # type: ignore[misc]


def test_writers_at_once_lose_no_key(store: str) -> None:
    context = multiprocessing.get_context("spawn")
    together = context.Barrier(3)
    writers = [context.Process(target=make_some, args=(store, each, together)) for each in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    ring = keys.read(Storage(store))
    assert ring
    assert sorted(key.name for key in ring.keys) == [f"w{writer}-{each}" for writer in range(3) for each in range(5)]
    assert len({key.id for key in ring.keys}) == 15


class Remote(Storage):
    """A store without locks, where another writer was slower to read and faster to write."""

    undone = 0

    @property
    def is_local(self) -> bool:
        return False

    def write(self, content: bytes, *parts: str) -> str:
        before = self.read(*parts) if self.exists(*parts) else b""
        written = super().write(content, *parts)
        if self.undone:
            self.undone -= 1
            if before:
                super().write(before, *parts)
            else:
                self.remove_file(*parts)
        return written


def test_on_a_store_without_locks_an_undone_change_is_made_again(store: str) -> None:
    storage = Remote(store)
    for undone, name in ((0, "first"), (1, "second"), (3, "third")):
        storage.undone = undone
        keys.change(storage, lambda ring, name=name: ring.with_new(AT, name))  # type: ignore[misc]
    ring = keys.read(storage)
    assert ring
    assert [key.name for key in ring.keys] == ["first", "second", "third"]
    storage.undone = 99
    with pytest.raises(StorageError, match="others keep changing"):
        keys.change(storage, lambda ring: ring.with_new(AT, "fourth"))


def test_all_scopes_are_the_default() -> None:
    assert keys.new_ring().with_new(AT, "any")[1].stored.scopes == SCOPES
