import json
import logging
import threading
import time
from pathlib import Path

import pytest
from pydantic import ValidationError

from app import traffic
from app.errors import StorageError
from app.monitoring.application import FAILURES_ALLOWED, Monitor, MonitorArgs, Watch, explain
from app.storage import Storage
from app.traffic import TrafficLog
from tests.traffic_records import SECRET, exchange, feedback, of_the_secret


def watch(store: str, interval_s: float = 0.01) -> Watch:
    return Watch(MonitorArgs(storage_uri=store, window_s=3_600, interval_s=interval_s))


def log(store: str, exchanges: int) -> Path:
    """Log that many exchanges, each with feedback; returns the file of the exchanges."""
    writer = TrafficLog(Storage(store), traffic.new_writer("test"))
    for number in range(exchanges):
        writer.append(exchange(number, received_at=traffic.now()))
        writer.append(feedback(number, rating=1, received_at=traffic.now()) if number else feedback(0))
    (file,) = (Path(store) / "traffic" / "exchanges").glob("*.jsonl")
    return file


def break_storage(store: str) -> None:
    """A folder in the place of a traffic file: reading it fails."""
    (Path(store) / "traffic" / "exchanges" / f"{traffic.new_writer('broken')}-000000.jsonl").mkdir(parents=True)


def test_no_traffic_yet_is_a_good_pass(store: str) -> None:
    seen = watch(store)
    seen.look()
    assert (seen.passes, seen.failures) == (1, 0)
    assert seen.quality is not None
    assert seen.quality.whole.exchanges == 0


def test_a_pass_sees_what_was_logged_since(store: str) -> None:
    seen = watch(store)
    seen.look()
    log(store, 5)
    seen.look()
    assert seen.quality is not None
    assert seen.quality.figures()["exchanges"] == 5
    assert seen.quality.figures()["with_feedback"] == 4  # the feedback on the first is older than the window


@pytest.mark.parametrize(
    "damage",
    [
        b'{"kind": "exchange", "response_id": "chat',
        b"\xff\xfe\x00\n",
        b"null\n[]\n{}\n7\n",
        b'{"kind": "exchange"}\n',
        b"[" * 100_000 + b"\n",
        b"\n\n",
    ],
    ids=["torn", "bytes", "other-json", "fields", "deep", "empty"],
)
def test_a_damaged_line_costs_only_itself(damage: bytes, store: str) -> None:
    file = log(store, 3)
    whole = file.read_bytes().splitlines(keepends=True)
    bad_time = json.dumps({**json.loads(whole[0]), "received_at": "yesterday"}).encode() + b"\n"
    file.write_bytes(whole[0] + bad_time + whole[1] + whole[2] + damage)
    seen = watch(store)
    seen.look()
    assert seen.failures == 0
    assert seen.quality is not None
    assert seen.quality.whole.exchanges == 3


def test_failing_passes_are_counted_and_a_good_one_ends_the_count(store: str, caplog: pytest.LogCaptureFixture) -> None:
    log(store, 2)
    break_storage(store)
    seen = watch(store)
    with caplog.at_level(logging.WARNING):
        seen.look()
        seen.look()
    assert (seen.passes, seen.failures, seen.quality) == (2, 2, None)
    assert "a pass over the traffic failed" in caplog.text
    for broken in (Path(store) / "traffic" / "exchanges").iterdir():
        if broken.is_dir():
            broken.rmdir()
    seen.look()
    assert seen.failures == 0
    assert seen.quality is not None


def test_the_watch_goes_on_after_failures_until_it_is_stopped(store: str) -> None:
    break_storage(store)
    seen, stopped = watch(store), threading.Event()
    thread = threading.Thread(target=seen.run, args=(stopped,))
    thread.start()
    while seen.failures < 3:
        time.sleep(0.01)
    assert thread.is_alive()
    stopped.set()
    thread.join(timeout=60)
    assert not thread.is_alive()


def test_health_fails_when_passes_keep_failing(store: str) -> None:
    monitor = Monitor(MonitorArgs(storage_uri=store, window_s=60, interval_s=0.01))
    while not monitor.figures()["passes"]:
        time.sleep(0.01)
    monitor.check_health()
    break_storage(store)
    while monitor.figures()["failures"] < FAILURES_ALLOWED:
        time.sleep(0.01)
    with pytest.raises(RuntimeError, match="passes over the traffic failed"):
        monitor.check_health()
    monitor.stop()


def test_health_fails_when_the_watch_has_ended(store: str) -> None:
    monitor = Monitor(MonitorArgs(storage_uri=store, window_s=60, interval_s=60))
    monitor.stop()
    with pytest.raises(RuntimeError, match="the watch has ended"):
        monitor.check_health()


def test_nothing_a_customer_wrote_is_logged(
    store: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    file = log(store, 2)
    with file.open("ab") as stream:
        stream.write(file.read_bytes()[:-9] + b"\n")
    with caplog.at_level(logging.DEBUG):
        watch(store).look()
    said = caplog.text + "".join(str(vars(record)) for record in caplog.records) + "".join(capfd.readouterr())
    assert "damaged line" in said
    assert of_the_secret(said) == []


def test_the_message_of_a_foreign_error_is_not_repeated() -> None:
    try:
        int(SECRET)
    except ValueError as error:
        said = explain(error)
    assert "ValueError" in said
    assert "test_monitoring_application.py" in said
    assert of_the_secret(said) == []
    assert explain(StorageError("cannot read x")) == "cannot read x"


@pytest.mark.parametrize("wrong", [{"interval_s": 0}, {"window_s": -1}, {"route": "/"}])
def test_arguments_are_checked(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        MonitorArgs.model_validate({"storage_uri": "s", "window_s": 1, "interval_s": 1} | wrong)
