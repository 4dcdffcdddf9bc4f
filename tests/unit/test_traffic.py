import dataclasses
import datetime
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow.fs
import pytest

from app import traffic
from app.errors import StorageError
from app.storage import Storage
from app.traffic import Exchange, Feedback, TrafficLog, find, new_response_id, new_writer, read_exchanges, read_feedback


@pytest.fixture
def storage(store: str) -> Storage:
    return Storage(store)


def exchange(response_id: str | None = None, **changes: object) -> Exchange:
    return dataclasses.replace(
        Exchange(
            response_id=response_id or new_response_id(), received_at=traffic.now(), variant="champion",
            model_version="support/3", messages=[{"role": "user", "content": "wo ist \u2028 mein Päckchen? 📦\n"}],
            reply="unterwegs", intent="order_status", intent_confidence=0.9, handover=None, finish_reason="stop",
            prompt_tokens=4, completion_tokens=2, time_to_first_token_s=0.1, end_to_end_s=0.2, stream=True,
            user_hash=None, status="ok",
        ),
        **changes,
    )  # fmt: skip


def feedback(response_id: str, rating: int | None = 1) -> Feedback:
    return Feedback(response_id, traffic.now(), rating, None, None)


def files(storage: Storage, kind: str) -> list[Path]:
    return sorted(Path(storage.path("traffic", kind)).iterdir())


def test_records_come_back_as_they_were_logged(storage: Storage) -> None:
    log, asked = TrafficLog(storage, new_writer("a")), [exchange() for _ in range(3)]
    for record in asked:
        log.append(record)
    log.append(feedback(asked[1].response_id))
    assert list(read_exchanges(storage)) == asked
    assert [record.response_id for record in read_feedback(storage)] == [asked[1].response_id]


def test_a_response_is_found_by_its_id_with_its_feedback_in_order(storage: Storage) -> None:
    logs = [TrafficLog(storage, new_writer(name)) for name in "ab"]
    wanted = exchange()
    for number in range(20):
        logs[number % 2].append(exchange())
    logs[0].append(wanted)
    given = []
    for log, rating in ((logs[1], 1), (logs[0], -1), (logs[1], None)):
        given.append(feedback(wanted.response_id, rating))
        log.append(given[-1])
        time.sleep(0.002)
    assert find(storage, wanted.response_id) == (wanted, given)


@pytest.mark.parametrize(
    "response_id", ["", "x", "chatcmpl-", "chatcmpl-../../etc", "chatcmpl-" + "0" * 31, "chatcmpl-" + "f" * 31]
)
def test_an_id_that_was_never_given_finds_nothing(storage: Storage, response_id: str) -> None:
    TrafficLog(storage, new_writer("a")).append(exchange())
    assert find(storage, response_id) == (None, [])


def test_nothing_is_read_from_a_root_without_traffic(storage: Storage) -> None:
    assert list(read_exchanges(storage)) == []
    assert find(storage, new_response_id()) == (None, [])


def test_a_torn_last_line_and_a_damaged_one_are_skipped(storage: Storage) -> None:
    log, whole = TrafficLog(storage, new_writer("a")), [exchange(), exchange()]
    for record in whole:
        log.append(record)
    (file,) = files(storage, "exchanges")
    first, second = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(first + b'{"kind": "exchange", "respo\x00\xff\n' + second + first[: len(first) // 2])
    assert list(read_exchanges(storage)) == whole


def test_segments_roll_and_every_writer_has_its_own(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traffic, "SEGMENT_BYTES", 2_000)
    logs = [TrafficLog(storage, new_writer("a")) for _ in range(2)]
    asked = [exchange() for _ in range(40)]
    for place, record in enumerate(asked):
        logs[place % 2].append(record)
    names = [file.name for file in files(storage, "exchanges")]
    assert len(names) > 8
    assert len({name.rsplit("-", 1)[0] for name in names}) == 2
    assert {record.response_id for record in read_exchanges(storage)} == {record.response_id for record in asked}
    assert find(storage, asked[17].response_id)[0] == asked[17]


def test_only_the_asked_window_is_read(storage: Storage) -> None:
    log = TrafficLog(storage, new_writer("a"))
    old = exchange(received_at="2020-01-01T00:00:00.000+00:00")
    new = exchange()
    log.append(old)
    log.append(new)
    since = datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=1)
    assert list(read_exchanges(storage, since)) == [new]


def test_find_reads_only_the_files_of_the_time(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traffic, "SEGMENT_BYTES", 1)
    begun_ms = int((time.time() - 51 * 3600) * 1000)
    log, asked = TrafficLog(storage, f"{begun_ms:011x}-a"), []
    for age_h in (50, 40, 30, 20, 10):
        record = exchange()
        asked_ms = int((time.time() - age_h * 3600) * 1000)
        asked.append(dataclasses.replace(record, response_id=f"chatcmpl-{asked_ms:011x}{record.response_id[-20:]}"))
        log.append(asked[-1])
        os.utime(files(storage, "exchanges")[-1], (asked_ms / 1000 + 5,) * 2)
    read = []
    whole = Storage.read
    monkeypatch.setattr(Storage, "read", lambda self, *parts: read.append(parts[-1]) or whole(self, *parts))
    for record in asked:
        read.clear()
        assert find(storage, record.response_id)[0] == record
        assert len(read) <= 2


def test_many_threads_append_at_once_and_nothing_is_lost_or_mixed(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    syncs = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (syncs.append(descriptor), time.sleep(0.002), real(descriptor)))
    log, asked = TrafficLog(storage, new_writer("a")), [exchange() for _ in range(200)]

    def append(part: list[Exchange]) -> None:
        for record in part:
            log.append(record)

    threads = [threading.Thread(target=append, args=(asked[place::20],)) for place in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(record.response_id for record in read_exchanges(storage)) == sorted(
        record.response_id for record in asked
    )
    assert len(syncs) < len(asked), "records that wait together share one fsync"


def test_a_record_that_cannot_be_written_is_not_acknowledged_and_the_next_one_can_be(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = TrafficLog(storage, new_writer("a"))
    log.append(exchange())
    real = os.fsync

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        log.append(exchange())
    monkeypatch.setattr(os, "fsync", real)
    after = exchange()
    log.append(after)
    assert find(storage, after.response_id)[0] == after


def test_a_record_that_waits_behind_a_writer_that_breaks_is_not_acknowledged(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = TrafficLog(storage, new_writer("a"))
    log.append(exchange())
    real, writing, may_break = os.fsync, threading.Event(), threading.Event()
    outcomes: list[str] = []

    def breaks(descriptor: int) -> None:
        if not writing.is_set():  # the first holds the pen until the other two share the next batch
            writing.set()
            may_break.wait(10)
            return real(descriptor)
        raise MemoryError("unexpected")

    def append() -> None:
        try:
            log.append(exchange())
            outcomes.append("acknowledged")
        except (MemoryError, StorageError) as error:
            outcomes.append(type(error).__name__)

    monkeypatch.setattr(os, "fsync", breaks)
    threads = [threading.Thread(target=append) for _ in range(3)]
    threads[0].start()
    writing.wait(10)
    for thread in threads[1:]:
        thread.start()
    batch = log._files[Exchange]._batch
    while len(batch.lines) < 2:
        time.sleep(0.001)
    may_break.set()
    for thread in threads:
        thread.join(10)
    assert sorted(outcomes) == ["MemoryError", "StorageError", "acknowledged"]


def test_a_store_without_appending_gets_an_object_for_each_commit(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    # A filesystem that is not the local one takes the way of object stores.
    storage.filesystem = pyarrow.fs.SubTreeFileSystem("/", pyarrow.fs.LocalFileSystem())
    assert not storage.is_local
    log, asked = TrafficLog(storage, new_writer("a")), [exchange() for _ in range(3)]
    for record in asked:
        log.append(record)
    assert len(files(storage, "exchanges")) == 3
    assert list(read_exchanges(storage)) == asked
    assert find(storage, asked[1].response_id)[0] == asked[1]


def test_what_was_acknowledged_outlives_a_kill(store: str, tmp_path: Path) -> None:
    program = f"""
import sys
sys.path.insert(0, {str(Path.cwd())!r})
from app.storage import Storage
from app.traffic import Feedback, TrafficLog, new_response_id, new_writer, now
log = TrafficLog(Storage({store!r}), new_writer("victim"))
while True:
    response_id = new_response_id()
    log.append(Feedback(response_id, now(), 1, None, "x" * 1000))
    print(response_id, flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as victim:
        assert victim.stdout
        acknowledged = [victim.stdout.readline().strip() for _ in range(50)]
        victim.send_signal(signal.SIGKILL)
        acknowledged += [line.strip() for line in victim.stdout if line.endswith("\n")]
    assert victim.returncode == -signal.SIGKILL
    logged = {record.response_id for record in read_feedback(Storage(store))}
    assert set(acknowledged) <= logged


def test_lines_are_ascii_json_with_their_kind(storage: Storage) -> None:
    record = exchange()
    TrafficLog(storage, new_writer("a")).append(record)
    (line,) = files(storage, "exchanges")[0].read_bytes().splitlines()
    assert line.isascii()
    assert json.loads(line)["kind"] == "exchange"
