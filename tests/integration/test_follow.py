"""Streams: exactly once through kills, poison, lost offsets and outages, on brokers that speak Kafka's protocol."""

import gzip
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from confluent_kafka import Producer

from app import tables
from app.config import Config
from app.errors import SourceError, SourceUnavailable, StageRefused, TableFilesGone
from app.ingestion import follow as stream
from app.ingestion import kafka, marks
from app.ingestion.follow import _Outage, follow
from app.ingestion.pipeline import ingest
from app.settings.ingestion import IngestionConfig
from jobs.ingest import inputs
from tests.conftest import ROOT
from tests.faults import Fault

pytestmark = pytest.mark.usefixtures("cluster")

BROKERS = """
from confluent_kafka import Producer
brokers = Producer({"test.mock.num.brokers": 3, "bootstrap.servers": "x:1"})
print(",".join(f"{b.host}:{b.port}" for b in brokers.list_topics().brokers.values()), flush=True)
while True:
    brokers.poll(1)
"""


@dataclass
class Brokers:
    """Three brokers in one process; they can be made to fall silent."""

    servers: str
    process: subprocess.Popen[str]

    def send(self, values: Sequence[bytes | None], topic: str = "chats", partition: int = 0, sent_ms: int = 0) -> None:
        producer = Producer({"bootstrap.servers": self.servers, "linger.ms": 5, "message.max.bytes": 40_000_000})
        for value in values:
            producer.produce(topic, value=value, partition=partition, timestamp=sent_ms)
        assert producer.flush(30) == 0

    def silence(self, seconds: float) -> None:
        self.process.send_signal(signal.SIGSTOP)
        time.sleep(seconds)
        self.process.send_signal(signal.SIGCONT)


@contextmanager
def started() -> Iterator[Brokers]:
    process = subprocess.Popen(
        [sys.executable, "-c", BROKERS], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    try:
        yield Brokers(process.stdout.readline().strip(), process)
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def brokers() -> Iterator[Brokers]:
    with started() as running:
        yield running


def message(number: int) -> bytes:
    said = {"role": "user", "content": f"Where is order {number}?", "intent": "order_status"}
    return json.dumps({"conversation_id": f"n{number}", "messages": [said]}).encode()


def messages(*numbers: int) -> list[bytes]:
    return [message(number) for number in numbers]


def configured(store: str, brokers: Brokers, **source: Any) -> Config:
    made = {"uri": f"kafka://{brokers.servers}/chats", "format": "kafka", "name": "chats", "timeout_s": 15.0}
    return Config().with_overrides(
        {
            "storage.uri": store,
            "ingestion.sources": [made | source],
            "ingestion.near_duplicates.detect": False,
            "ingestion.follow.interval_s": 0.2,
        }
    )


def following(config: Config, batches: int, **overrides: Any) -> Config:
    settings = {"enabled": True, "max_batches": batches} | overrides
    return config.with_overrides({f"ingestion.follow.{name}": value for name, value in settings.items()})


def held(config: Config) -> list[str]:
    rows = tables.read_local(config, tables.latest(config), ["conversation_id"])
    return sorted(rows["conversation_id"].to_pylist(), key=lambda name: int(name[1:]))


def quarantined(config: Config) -> list[dict[str, Any]]:
    table = tables.open_table(config.storage, config.ingestion.quarantine_table)
    rows: list[dict[str, Any]] = table.scan().to_arrow().sort_by("position").to_pylist()
    return rows


def committed(config: Config) -> list[dict[str, int]]:
    """The offsets of each snapshot."""
    table = tables.open_table(config.storage, config.ingestion.table)
    found = [json.loads(tables.summary_of(snapshot)[marks.OFFSETS]) for snapshot in table.snapshots()]
    return [{key: value[0] if isinstance(value, list) else value for key, value in entry.items()} for entry in found]


def test_each_micro_batch_is_one_snapshot_of_rows_and_offsets(store: str, brokers: Brokers) -> None:
    config = configured(store, brokers)
    brokers.send(messages(*range(40)))
    brokers.send(messages(*range(40, 60)), partition=3)
    followed = follow(following(config, 2, max_rows=30))
    assert held(config) == [f"n{number}" for number in range(60)]
    assert followed.batches == 2
    assert committed(config) == [{"kafka:chats/0": 20, "kafka:chats/3": 10}, {"kafka:chats/0": 40, "kafka:chats/3": 20}]
    assert (followed.figures["records_kept"], followed.figures["lag_messages"]) == (60, 0)
    rows = tables.read_local(config, tables.latest(config), ["source", "position"]).to_pylist()
    assert Counter(row["source"] for row in rows) == {"chats/0": 40, "chats/3": 20}
    assert sorted(row["position"] for row in rows if row["source"] == "chats/3") == list(range(20))
    assert not ingest(config).added


@pytest.mark.fault("S14", seen="each poison is in quarantine with its offset and reason; what came after it is a row")
def test_bad_messages_are_set_aside_with_their_offset_and_the_stream_goes_on(
    store: str, brokers: Brokers, seed: int
) -> None:
    config = configured(store, brokers)
    # The test brokers keep 5 MB of a partition, so that this is the largest message they can hold.
    endless = json.dumps({"conversation_id": "n9", "messages": [{"role": "user", "content": "x" * 4_900_000}]}).encode()
    poison: list[tuple[bytes | None, str]] = [
        (b"not json", "invalid_json"),
        (None, "null_value"),
        (b'{"conversation_id": "n7", "messages": 7}', "invalid_messages"),
        (b"\xff\xfe", "invalid_encoding"),
        (endless, "too_long_message"),
    ]
    random.Random(seed).shuffle(poison)
    brokers.send([*messages(1, 2), *(value for value, _ in poison), *messages(3)])
    followed = follow(following(config, 1))
    assert held(config) == ["n1", "n2", "n3"]
    assert [(row["source"], row["position"], row["reason"]) for row in quarantined(config)] == [
        ("chats/0", offset, reason) for offset, (_, reason) in enumerate(poison, 2)
    ]
    assert followed.figures["records_refused"] == 5
    brokers.send([b"poison alone"])
    follow(following(config, 1))
    assert committed(config)[-1] == {"kafka:chats/0": 9}
    assert len(quarantined(config)) == 6


@pytest.mark.fault("S14", seen="the duplicates are counted and there once")
def test_a_key_that_comes_twice_is_one_conversation(store: str, brokers: Brokers) -> None:
    config = configured(store, brokers)
    brokers.send([*messages(1, 1, 2), *messages(2)])
    assert follow(following(config, 1)).figures["duplicates"] == 2
    brokers.send(messages(1, 3))
    assert follow(following(config, 1)).figures["duplicates"] == 1
    assert held(config) == ["n1", "n2", "n3"]


@pytest.mark.fault("F6", seen="the error names topic and brokers")
def test_a_topic_that_is_gone_is_named(store: str, brokers: Brokers) -> None:
    config = configured(store, brokers, uri=f"kafka://{brokers.servers}/nothing")
    with pytest.raises(SourceError, match="topic 'nothing' does not exist on 127"):
        ingest(config)


@pytest.mark.fault("F6", seen="the error names the brokers")
def test_brokers_that_never_answer_are_named(store: str) -> None:
    source = {"uri": "kafka://127.0.0.1:9/chats", "format": "kafka", "timeout_s": 2.0}
    config = Config().with_overrides({"storage.uri": store, "ingestion.sources": [source]})
    with pytest.raises(SourceUnavailable, match=r"Kafka brokers 127\.0\.0\.1:9 do not answer"):
        ingest(config)


@pytest.mark.fault("F6", seen="the error names the partition, where its log begins, and what comes next")
def test_offsets_that_are_gone_stop_the_stream_unless_that_is_accepted(
    store: str, brokers: Brokers, fault: Fault
) -> None:
    """The test brokers keep 5 MB of a partition: what is older goes, as a topic's retention has it."""
    config = configured(store, brokers)
    count, partition = fault.random.randrange(2, 20), fault.random.randrange(4)
    brokers.send(messages(*range(count)), partition=partition)
    follow(following(config, 1))
    lost = [*messages(count, count + 1), b"x" * 2_400_000]
    brokers.send([*lost, b"x" * 2_400_000, *messages(count + 4), b"x" * 2_400_000], partition=partition)
    says = rf"chats/{partition} begins at offset {count + 3}, but {count} comes next: 3 messages are gone"
    with pytest.raises(SourceError, match=says):
        follow(following(config, 1))
    fault.happened()
    assert held(config) == [f"n{number}" for number in range(count)]
    follow(following(configured(store, brokers, accept_lost_offsets=True), 1))
    fault.recovered()
    assert held(config) == [f"n{number}" for number in [*range(count), count + 4]]
    assert committed(config)[-1] == {f"kafka:chats/{partition}": count + 6}


@pytest.mark.fault("F6", seen="the errors name the topic, then the partition, its end or the offset that differs")
@pytest.mark.parametrize("more", [-9, 0, 20], ids=["shorter", "as long", "longer"])
@pytest.mark.parametrize("stage", ["stream", "batch"])
def test_a_topic_that_was_deleted_or_made_anew_stops_the_stage(
    store: str, brokers: Brokers, more: int, stage: str, fault: Fault
) -> None:
    count = fault.random.randrange(10, 30)
    brokers.send(messages(*range(count)))
    follow(following(configured(store, brokers), 1))
    with started() as anew:
        config = configured(store, anew)
        with pytest.raises(SourceError, match="topic 'chats' does not exist on 127"):
            follow(following(config, 1)) if stage == "stream" else ingest(config)
        anew.send(messages(*range(100, 100 + count + more)))
        said = f"has another message at offset {count - 1} than the one that was committed: the topic was made anew"
        if more < 0:
            said = f"ends at offset {count + more}, but offsets up to {count} were committed: the topic was made anew"
        with pytest.raises(SourceError, match=f"chats/0 {said}"):
            follow(following(config, 1)) if stage == "stream" else ingest(config)
        fault.happened()
        assert held(config) == [f"n{number}" for number in range(count)]


def test_a_topic_that_was_made_anew_before_anything_was_read_stops_the_stage(store: str, brokers: Brokers) -> None:
    brokers.send(messages(*range(10)))
    follow(following(configured(store, brokers, start="latest"), 1))
    with started() as anew:
        anew.send(messages(*range(100, 112)))
        with pytest.raises(SourceError, match="chats/0 has another message at offset 9"):
            ingest(configured(store, anew, start="latest"))


def test_a_message_that_retention_took_cannot_be_compared_and_the_stream_goes_on(brokers: Brokers, store: str) -> None:
    """The test brokers keep 5 MB of a partition: the third large message pushes out the first."""
    brokers.send([*messages(*range(10)), *[b"x" * 2_400_000] * 3])
    source = configured(store, brokers).ingestion.sources[0]
    [part] = kafka.parts(source, 0, {"kafka:chats/0": [11, 10, 1]}, IngestionConfig().follow)
    assert (part.start, part.end) == (11, 13)


def test_offsets_that_were_committed_without_a_message_are_gone_on_from(store: str, brokers: Brokers) -> None:
    brokers.send(messages(*range(10)))
    source = configured(store, brokers).ingestion.sources[0]
    [part] = kafka.parts(source, 0, {"kafka:chats/0": 4}, IngestionConfig().follow)
    assert (part.start, part.end) == (4, 10)
    assert isinstance(part.mark[1], list)
    assert kafka.lag(source, dict([part.mark]))[0] == 0


@pytest.mark.fault("F6", seen="the partition was not among those committed")
def test_a_partition_that_is_new_is_read_from_its_beginning(store: str, brokers: Brokers, fault: Fault) -> None:
    config = configured(store, brokers, start="latest")
    new, count = fault.random.randrange(1, 4), fault.random.randrange(1, 9)
    brokers.send(messages(1, 2))
    follow(following(config, 1))
    assert committed(config)[-1]["kafka:chats/0"] == 2
    table = tables.open_table(config.storage, config.ingestion.table)
    known = marks.committed(config, table, "")
    del known[f"kafka:chats/{new}"]
    brokers.send(messages(*range(3, 3 + count)), partition=new)
    fault.happened()
    found = kafka.parts(config.ingestion.sources[0], 0, known, config.ingestion.follow)
    assert [(part.partition, part.start, part.end) for part in found if part.partition == new] == [(new, 0, count)]


@pytest.mark.fault("F6", seen="the brokers' process stood still; the stream met their silence and waited")
def test_the_stream_waits_for_brokers_that_are_away(
    store: str, brokers: Brokers, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    config = configured(store, brokers, timeout_s=2.0)
    outage_s = 20.0 if fault.seed else 8.0  # the first seed is in every run of the suite
    delay_s = fault.random.uniform(0.0, 1.5)
    brokers.send(messages(*range(5)))
    follow(following(config, 1))
    met: list[str] = []
    waits = _Outage.wait_s

    def meet(self: _Outage, error: SourceUnavailable) -> float:
        met.append(error.what)
        return waits(self, error)

    monkeypatch.setattr(_Outage, "wait_s", meet)

    def fall_silent() -> None:
        time.sleep(delay_s)
        brokers.silence(outage_s)
        fault.happened()
        brokers.send(messages(*range(5, 9)))

    away = threading.Thread(target=fall_silent)
    away.start()
    follow(following(config, 1))
    fault.recovered()
    away.join()
    assert met
    # Which call met it is up to chance.
    assert re.search("do not answer|does not answer|gave nothing", met[0])
    assert held(config) == [f"n{number}" for number in range(9)]


def test_too_many_refusals_over_all_micro_batches_stop_the_stream(store: str, brokers: Brokers) -> None:
    config = configured(store, brokers)
    brokers.send([*messages(*range(900)), *[b"bad"] * 200])
    with pytest.raises(StageRefused, match=r"refused 18\.2% of 1100 records \(invalid_json 200\)"):
        follow(following(config, 1))
    assert len(quarantined(config)) == 200


def test_a_bad_message_of_a_quiet_topic_does_not_stop_what_comes_after_it(store: str, brokers: Brokers) -> None:
    config = configured(store, brokers)
    brokers.send(messages(1, 2))
    ingest(config)
    brokers.send([b"bad"])
    assert ingest(config).outcome.refused == 1
    brokers.send(messages(3))
    ingest(config)
    assert held(config) == ["n1", "n2", "n3"]
    assert [row["position"] for row in quarantined(config)] == [2]


def test_a_topic_of_which_nothing_can_be_accepted_is_refused_at_first(store: str, brokers: Brokers) -> None:
    config = configured(store, brokers)
    brokers.send([b"bad"] * 3)
    with pytest.raises(StageRefused, match="refused 100"):
        ingest(config)


def test_a_message_without_a_time_has_that_of_its_sending(store: str, brokers: Brokers) -> None:
    config = configured(store, brokers).with_overrides({"ingestion.imputation.started_at": True})
    before = datetime.now(UTC)
    brokers.send(messages(1, 2))
    ingest(config)
    rows = tables.read_local(config, tables.latest(config), ["started_at", "imputed"]).to_pylist()
    assert len(rows) == 2
    for row in rows:
        assert before - timedelta(seconds=1) <= row["started_at"] <= datetime.now(UTC)
        assert "started_at" in row["imputed"]


@pytest.mark.parametrize("sent_ms", [1_700_000_000_000_000, 1_700_000_000_000_000_000])
def test_a_time_that_cannot_be_true_is_not_known_and_stops_nothing(store: str, brokers: Brokers, sent_ms: int) -> None:
    config = configured(store, brokers).with_overrides({"ingestion.imputation.started_at": True})
    brokers.send([*messages(*range(20)), b"bad", None], sent_ms=sent_ms)
    ingest(config)
    rows = tables.read_local(config, tables.latest(config), ["started_at"]).to_pylist()
    assert rows == [{"started_at": None}] * 20
    assert [row["reason"] for row in quarantined(config)] == ["invalid_json", "null_value"]


def test_micro_batches_keep_their_interval_while_messages_keep_coming(
    store: str, brokers: Brokers, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(store, brokers)
    ended, begun_s = threading.Event(), list[float]()
    batch = stream._batch

    def begin(*given: Any) -> Any:
        begun_s.append(time.monotonic())
        return batch(*given)

    monkeypatch.setattr(stream, "_batch", begin)
    brokers.send(messages(0))  # makes the topic

    def produce() -> None:
        number = 1
        while not ended.wait(0.1):
            brokers.send(messages(number))
            number += 1

    producer = threading.Thread(target=produce)
    producer.start()
    try:
        follow(following(config, 3, interval_s=4.0))
    finally:
        ended.set()
        producer.join()
    assert len(begun_s) >= 3
    assert min(later - earlier for earlier, later in pairwise(begun_s)) >= 3.9


# The job


def job(config: Config, tmp_path: Path, prelude: str = "") -> subprocess.Popen[str]:
    file = tmp_path / "follow.yaml"
    file.write_text(yaml.safe_dump({name: config.model_dump(mode="json")[name] for name in ("storage", "ingestion")}))
    code = f"import sys\n{prelude}\nfrom jobs.ingest import JOB\nsys.exit(JOB.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "--config", str(file), "--follow"]
    return subprocess.Popen(
        command, cwd=ROOT, env=dict(os.environ), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_until(true: Any, seconds: float = 180.0) -> None:
    deadline_s = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline_s, "it never came to that"
        time.sleep(0.2)


def rows_of(config: Config) -> int:
    try:
        return len(held(config))
    except Exception:
        return 0


DIES = """
import os, signal
from app import tables
append, turn = tables.append, 0
def dying(table, files, about):
    global turn
    mine = table.name()[-1] == "conversations"
    if mine and ("before", turn) == {moment}:
        os.kill(os.getpid(), signal.SIGKILL)
    snapshot = append(table, files, about)
    if mine and ("after", turn) == {moment}:
        os.kill(os.getpid(), signal.SIGKILL)
    turn += mine
    return snapshot
tables.append = dying
"""


@pytest.mark.fault("F4", seen="ended by SIGKILL; the table has the snapshots of that moment")
@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_around_its_commit_it_goes_on_without_losing_or_doubling(
    store: str, brokers: Brokers, tmp_path: Path, when: str, fault: Fault
) -> None:
    config = configured(store, brokers).with_overrides({"ingestion.follow.max_rows": 25})
    count, turn = fault.random.randrange(30, 60), fault.random.randrange(2)
    sent: list[bytes | None] = [*messages(*range(count))]
    sent.insert(fault.random.randrange(count), b"poison")
    brokers.send(sent)
    killed = job(config, tmp_path, DIES.format(moment=(when, turn)))
    assert killed.wait(120) == -signal.SIGKILL, killed.stderr
    fault.happened()
    snapshots = turn + (when == "after")
    assert len(tables.open_table(config.storage, config.ingestion.table).snapshots()) == snapshots
    running = job(config, tmp_path)
    brokers.send(messages(*range(count, count + 10)))
    wait_until(lambda: rows_of(config) == count + 10)
    fault.recovered()
    running.terminate()
    out, _ = running.communicate(timeout=60)
    last = json.loads(out.strip().splitlines()[-1])
    assert (running.returncode, last["status"]) == (0, "done")
    assert last["figures"]["lag_messages"] == 0
    assert held(config) == [f"n{number}" for number in range(count + 10)]
    assert len(quarantined(config)) == 1
    offsets = [entry["kafka:chats/0"] for entry in committed(config)]
    assert offsets == sorted(set(offsets)), "an offset was committed twice"
    assert offsets[-1] == count + 11


def test_new_files_are_followed_too(store: str, tmp_path: Path, brokers: Brokers) -> None:
    folder = tmp_path / "incoming"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(b"\n".join(messages(1, 2)))
    source = {"uri": str(folder), "format": "jsonl"}
    config = configured(store, brokers).with_overrides({"ingestion.sources": [source]})
    follow(following(config, 1))
    (folder / "b.jsonl").write_bytes(b"\n".join(messages(2, 3)))
    followed = follow(following(config, 1))
    assert followed.figures["records_read"] == 2
    assert held(config) == ["n1", "n2", "n3"]


def test_a_data_file_that_is_lost_ends_the_stream_after_a_while(store: str, brokers: Brokers) -> None:
    config = configured(store, brokers)
    brokers.send(messages(1, 2))
    ingest(config)
    for file in Path(store).rglob("conversations/data/*.parquet"):
        file.unlink()
    brokers.send(messages(3))
    with pytest.raises(TableFilesGone, match="the file is lost"):
        follow(following(config, 1, max_outage_s=0.5))


def test_a_folder_without_files_and_a_file_that_is_still_written_are_waited_for(
    store: str, tmp_path: Path, brokers: Brokers
) -> None:
    folder = tmp_path / "incoming"
    folder.mkdir()
    source = {"uri": str(folder), "format": "jsonl"}
    config = configured(store, brokers).with_overrides({"ingestion.sources": [source]})
    whole = gzip.compress(b"\n".join(messages(1, 2)))

    def arrive() -> None:
        time.sleep(2)
        (folder / "a.jsonl.gz").write_bytes(whole[:-12])
        time.sleep(4)
        (folder / "a.jsonl.gz").write_bytes(whole)

    arriving = threading.Thread(target=arrive)
    arriving.start()
    follow(following(config, 1, interval_s=0.5))
    arriving.join()
    assert held(config) == ["n1", "n2"]


def test_the_job_waits_for_brokers_that_are_away_when_it_starts(brokers: Brokers, store: str) -> None:
    config = configured(store, brokers, timeout_s=2.0)
    away = config.with_overrides({"ingestion.sources": [{"uri": "kafka://127.0.0.1:1/chats", "format": "kafka",
                                                         "timeout_s": 2.0}]})  # fmt: skip
    with pytest.raises(SourceUnavailable):
        inputs(away)
    assert inputs(following(away, 1)) == {"sources": [{"uri": "kafka://127.0.0.1:1/chats"}]}
