"""`ingest --follow` on Kafka under fire: producers, kill -9s and a broker outage, and what came of it.

    make start && . .rayloop/cluster.env
    python -m benchmarks.streaming --minutes 10 --rate 200 --kills 2 --outage-s 20

The brokers are librdkafka's own test cluster (three, over TCP): it proves the protocol and our bookkeeping, not a
real broker's durability. Each message says when it was produced; it is queryable from the commit of its snapshot on.
Writes benchmarks/results/<date>_<hardware>_streaming.md.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from app import tables
from app.config import Config, load
from app.ingestion import kafka, marks
from app.storage import resolve
from benchmarks import measured

PARTITIONS = 4
POISON = (b"not json at all", None, b'{"messages": 5}')
BROKERS = """
from confluent_kafka import Producer
brokers = Producer({"test.mock.num.brokers": 3, "bootstrap.servers": "x:1"})
print(",".join(f"{b.host}:{b.port}" for b in brokers.list_topics().brokers.values()), flush=True)
while True:
    brokers.poll(1)
"""


@dataclass
class Producing:
    """A thread that sends numbered conversations, one in a thousand of them poison, at a steady rate."""

    servers: str
    rate: float
    sent: int = 0
    poison: int = 0
    stop: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        from confluent_kafka import Producer

        producer = Producer({"bootstrap.servers": self.servers, "linger.ms": 5, "enable.idempotence": True})
        started_s = time.monotonic()
        number = 0
        while not self.stop.is_set():
            while number < (time.monotonic() - started_s) * self.rate:
                bad = number % 1_000 == 999
                value = POISON[number // 1_000 % 3] if bad else _conversation(number)
                while True:
                    try:
                        producer.produce("chats", value=value, partition=number % PARTITIONS)
                        break
                    except BufferError:  # while the brokers are away
                        producer.poll(0.5)
                self.poison += bad
                self.sent += not bad
                number += 1
            producer.poll(0)
            time.sleep(0.01)
        producer.flush(120)


def _conversation(number: int) -> bytes:
    now = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
    messages = [
        {"role": "user", "content": f"Where is order {number}?", "intent": "order_status"},
        {"role": "assistant", "content": f"Order {number} is on its way and arrives on day {number % 28 + 1}."},
    ]
    return json.dumps({"conversation_id": f"n{number}", "started_at": now, "messages": messages}).encode()


def configuration(folder: Path, servers: str, interval_s: float) -> Path:
    """The configuration of the follower."""
    file = folder / "streaming.yaml"
    source = {"uri": f"kafka://{servers}/chats", "format": "kafka", "name": "chats", "timeout_s": 10}
    ingestion = {
        "sources": [source],
        "follow": {"interval_s": interval_s},
        "near_duplicates": {"detect": False},  # the messages differ in a number only
        "drift": {"detect": False},
    }
    file.write_text(yaml.safe_dump({"storage": {"uri": str(folder / "store")}, "ingestion": ingestion}))
    return file


def follower(file: Path, log: Path) -> subprocess.Popen[bytes]:
    """A follower, as a user starts one."""
    command = [sys.executable, "-m", "jobs.ingest", "--config", str(file), "--follow"]
    return subprocess.Popen(command, stdout=log.open("ab"), stderr=subprocess.STDOUT)


def lag(config: Config) -> int:
    """Messages that are not committed yet."""
    table = tables.open_table(config.storage, config.ingestion.table)
    known = marks.committed(config, table, "")
    return sum(kafka.lag(config.ingestion.sources[0], known).values())


def snapshots(config: Config) -> list[dict[str, Any]]:
    """The table's snapshots: when, how many rows were added, and the offsets committed with them."""
    table = tables.open_table(config.storage, config.ingestion.table)
    found = []
    for snapshot in table.snapshots():
        about = tables.summary_of(snapshot)
        offsets = {key: kafka.offset(mark) for key, mark in json.loads(about[marks.OFFSETS]).items()}
        found.append(
            {
                "snapshot_id": snapshot.snapshot_id,
                "committed_at": datetime.fromtimestamp(snapshot.timestamp_ms / 1_000, UTC),
                "rows": int(about["rayloop.records_kept"]),
                "offsets": [offsets.get(f"kafka:chats/{partition}", 0) for partition in range(PARTITIONS)],
            }
        )
    return found


def latencies(config: Config, found: list[dict[str, Any]]) -> np.ndarray:
    """Seconds from produced to queryable, one a row."""
    by_offset: list[list[tuple[int, datetime]]] = [[] for _ in range(PARTITIONS)]
    for entry in found:
        for partition, offset in enumerate(entry["offsets"]):
            by_offset[partition].append((offset, entry["committed_at"]))
    rows = tables.read_local(config, tables.latest(config), ["source", "position", "started_at"]).to_pylist()
    seconds = []
    for row in rows:
        partition = int(row["source"].rsplit("/", 1)[1])
        committed_at = next(at for offset, at in by_offset[partition] if offset > row["position"])
        seconds.append((committed_at - row["started_at"]).total_seconds())
    return np.array(seconds)


def main() -> None:
    """Run the drill and write what it showed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--rate", type=float, default=200, help="messages a second")
    parser.add_argument("--interval-s", type=float, default=5)
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--outage-s", type=float, default=20)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="streaming-", dir=os.environ.get("RAYLOOP_STATE", resolve(".rayloop"))))
    brokers = subprocess.Popen([sys.executable, "-c", BROKERS], stdout=subprocess.PIPE, text=True)
    assert brokers.stdout is not None
    file = configuration(folder, brokers.stdout.readline().strip(), options.interval_s)
    config = load(file)
    log = folder / "follower.log"
    producing = Producing(config.ingestion.sources[0].uri.removeprefix("kafka://").partition("/")[0], options.rate)
    thread = threading.Thread(target=producing.run)
    thread.start()
    started_s = time.monotonic()
    running = follower(file, log)
    events = []
    total_s = options.minutes * 60
    plan = sorted([*((share + 1) / (options.kills + 2) for share in range(options.kills)), -1.0])[1:]
    times = [(share * total_s, "kill") for share in plan] + [
        ((options.kills + 1) / (options.kills + 2) * total_s, "out")
    ]
    for at_s, what in sorted(times):
        time.sleep(max(0.0, at_s - (time.monotonic() - started_s)))
        if what == "kill":
            busy = _wait_for_batch(log, options.interval_s)
            running.kill()
            running.wait()
            events.append(f"{time.monotonic() - started_s:.0f} s: kill -9 of the follower, {busy}")
            running = follower(file, log)
        else:
            brokers.send_signal(signal.SIGSTOP)
            time.sleep(options.outage_s)
            brokers.send_signal(signal.SIGCONT)
            events.append(
                f"{time.monotonic() - started_s:.0f} s: all brokers silent for {options.outage_s:.0f} s until now"
            )
    time.sleep(max(0.0, total_s - (time.monotonic() - started_s)))
    producing.stop.set()
    thread.join()
    produced_s = time.monotonic() - started_s
    while lag(config) and time.monotonic() - started_s < total_s + 120:
        time.sleep(1)
    left = lag(config)
    caught_up_s = time.monotonic() - started_s - produced_s
    running.terminate()
    code = running.wait(60)
    brokers.kill()
    report(config, options, producing, events, left, caught_up_s, code, produced_s)


def _wait_for_batch(log: Path, interval_s: float) -> str:
    """Wait until a micro-batch has just been committed, and then into the next one."""
    before = log.read_text().count("ingest: batch")
    deadline_s = time.monotonic() + 60
    while log.read_text().count("ingest: batch") == before and time.monotonic() < deadline_s:
        time.sleep(0.05)
    time.sleep(0.7 * interval_s)  # the next one begins an interval after that one has begun
    return "while a micro-batch was under way"


def report(
    config: Config, options: argparse.Namespace, producing: Producing, events: list[str], left: int,
    caught_up_s: float, code: int, produced_s: float,
) -> None:  # fmt: skip
    """Count what is in the tables, and say it."""
    rows = tables.read_local(config, tables.latest(config), ["conversation_id"])["conversation_id"].to_pylist()
    poison = tables.open_table(config.storage, config.ingestion.quarantine_table).scan().to_arrow()
    found = snapshots(config)
    offsets = Counter(tuple(entry["offsets"]) for entry in found)
    seconds = latencies(config, found)
    exact = sorted(rows) == sorted(f"n{number}" for number in _sent(producing))
    lines = [
        "# Streaming ingestion under fire",
        "",
        measured.heading(),
        "",
        f"`python -m benchmarks.streaming --minutes {options.minutes:g} --rate {options.rate:g} --interval-s "
        f"{options.interval_s:g} --kills {options.kills} --outage-s {options.outage_s:g}`; three brokers of "
        "librdkafka's test cluster, four partitions, one driver.",
        "",
        *(f"- {event}" for event in events),
        "",
        "| | |",
        "|---|---|",
        f"| messages sent, poison among them | {producing.sent + producing.poison:,}, {producing.poison:,} |",
        f"| rows in the table | {len(rows):,}, {'exactly those sent, each once' if exact else 'NOT those sent'} |",
        f"| poison in quarantine | {poison.num_rows:,} of {producing.poison:,}: "
        f"{dict(Counter(poison['reason'].to_pylist()))} |",
        f"| sustained | {len(rows) / produced_s:,.0f} messages/s |",
        f"| produced to queryable, median, 95 %, most | {np.median(seconds):.1f}, {np.quantile(seconds, 0.95):.1f}, "
        f"{seconds.max():.1f} s |",
        f"| lag after the producers stopped | {left} after {caught_up_s:.1f} s |",
        f"| snapshots; with offsets committed twice | {len(found)}; {sum(n - 1 for n in offsets.values())} |",
        f"| exit code after SIGTERM | {code} |",
        "",
        "| snapshot | committed | rows added | offsets of partitions 0 to 3 |",
        "|---|---|---|---|",
        *(
            f"| {entry['snapshot_id']} | {entry['committed_at']:%H:%M:%S} | {entry['rows']:,} | {entry['offsets']} |"
            for entry in (found if len(found) <= 40 else [*found[:10], *found[-10:]])
        ),
    ]
    measured.write("streaming", lines)


def _sent(producing: Producing) -> list[int]:
    return [number for number in range(producing.sent + producing.poison) if number % 1_000 != 999]


if __name__ == "__main__":
    main()
