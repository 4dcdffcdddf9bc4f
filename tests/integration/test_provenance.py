"""From a row of the table back to the very record it was made of, in every kind of source."""

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from confluent_kafka import Consumer, TopicPartition

from app import tables
from app.config import Config
from app.ingestion.pipeline import ingest
from tests.integration.test_follow import Brokers, message, messages
from tests.integration.test_follow import brokers as kafka  # noqa: F401

pytestmark = pytest.mark.usefixtures("cluster")


def question(number: int) -> str:
    return f"Where is my order {number}? Größe “L”, said the page."


def record(number: int) -> dict[str, Any]:
    return {"conversation_id": f"n{number}", "messages": [{"role": "user", "content": question(number)}]}


def rows_of(config: Config) -> list[dict[str, Any]]:
    ingest(config)
    columns = ["conversation_id", "messages", "source", "position"]
    found: list[dict[str, Any]] = tables.read_local(config, tables.latest(config), columns).to_pylist()
    return found


def reading(store: str, *sources: dict[str, Any]) -> Config:
    return Config().with_overrides(
        {
            "storage.uri": store,
            "ingestion.sources": list(sources),
            "ingestion.near_duplicates.detect": False,
            "ingestion.max_refused_fraction": 0.5,
        }
    )


def lines(numbers: range) -> bytes:
    """JSONL with what makes lines and bytes differ: a mark, blank and broken lines, carriage returns, long letters."""
    written = [json.dumps(record(number), ensure_ascii=False).encode() for number in numbers]
    return b"\xef\xbb\xbf" + b"\r\n\n".join([written[0], b"{broken", *written[1:]])


def at_byte(content: Callable[[Path], bytes]) -> Callable[[Path, int], str]:
    def look(file: Path, position: int) -> str:
        line = content(file)[position:].split(b"\n", 1)[0].removeprefix(b"\xef\xbb\xbf")
        said: str = json.loads(line)["messages"][0]["content"]
        return said

    return look


def unpacked(file: Path) -> bytes:
    return gzip.decompress(file.read_bytes())


def write_csv(file: Path, numbers: range) -> None:
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["ask", "reply"])
        writer.writerows([question(number), "It is on\nits way."] for number in numbers)


def csv_row(file: Path, position: int) -> str:
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))[position]["ask"]


def write_parquet(file: Path, numbers: range) -> None:
    pq.write_table(pa.Table.from_pylist([record(number) for number in numbers]), file, row_group_size=3)


def parquet_row(file: Path, position: int) -> str:
    said: str = pq.read_table(file).slice(position, 1).to_pylist()[0]["messages"][0]["content"]
    return said


FORMATS: dict[str, tuple[dict[str, Any], Callable[[Path, range], Any], Callable[[Path, int], str]]] = {
    "in.jsonl": (
        {"format": "jsonl"},
        lambda file, numbers: file.write_bytes(lines(numbers)),
        at_byte(Path.read_bytes),
    ),
    "in.jsonl.gz": (
        {"format": "jsonl"},
        lambda file, numbers: file.write_bytes(gzip.compress(lines(numbers))),
        at_byte(unpacked),
    ),
    "in.csv": ({"format": "csv", "columns": {"user": "ask", "assistant": "reply"}}, write_csv, csv_row),
    "in.parquet": ({"format": "parquet"}, write_parquet, parquet_row),
    "in.txt": (
        {"format": "text", "columns": {"user": "text"}},
        lambda file, numbers: file.write_text("\n\n".join(question(number) for number in numbers)),
        lambda file, position: file.read_bytes()[position:].split(b"\n", 1)[0].decode(),
    ),
}
EACH = 10


def test_every_row_leads_back_to_its_place_in_its_file(store: str, tmp_path: Path) -> None:
    sources = []
    for index, (name, (settings, write, _)) in enumerate(FORMATS.items()):
        write(tmp_path / name, range(100 * index, 100 * index + EACH))
        sources.append({"uri": str(tmp_path / name), **settings})
    rows = rows_of(reading(store, *sources))
    assert len(rows) == EACH * len(FORMATS)
    for row in rows:
        file = Path(row["source"])
        assert FORMATS[file.name][2](file, row["position"]) == row["messages"][0]["content"]
    for index, name in enumerate(FORMATS):
        said = {row["messages"][0]["content"] for row in rows if Path(row["source"]).name == name}
        assert said == {question(number) for number in range(100 * index, 100 * index + EACH)}


def test_one_seek_finds_the_record_of_a_row(store: str, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(lines(range(EACH)))
    rows = rows_of(reading(store, {"uri": str(source), "format": "jsonl"}))
    assert sorted(row["position"] for row in rows)[1] > len(json.dumps(record(0))), "bytes, not line numbers"
    for row in rows:
        with Path(row["source"]).open("rb") as stream:
            stream.seek(row["position"])
            assert json.loads(stream.readline().decode("utf-8-sig"))["conversation_id"] == row["conversation_id"]


def test_a_row_of_a_stream_leads_back_to_its_message(store: str, kafka: Brokers) -> None:  # noqa: F811
    kafka.send(messages(0, 1, 2))
    kafka.send([b"poison", *messages(3, 4)], partition=2)
    source = {"uri": f"kafka://{kafka.servers}/chats", "format": "kafka", "name": "chats", "timeout_s": 15.0}
    rows = rows_of(reading(store, source))
    consumer = Consumer({"bootstrap.servers": kafka.servers, "group.id": "looking"})
    try:
        for row in rows:
            name, partition = row["source"].rsplit("/", 1)
            assert name == "chats"
            consumer.assign([TopicPartition("chats", int(partition), row["position"])])
            sent = consumer.consume(1, timeout=60)[0]
            assert sent.value() == message(int(row["conversation_id"][1:]))
    finally:
        consumer.close()
    places = {row["conversation_id"]: (row["source"], row["position"]) for row in rows}
    assert places["n2"] == ("chats/0", 2)
    assert places["n3"] == ("chats/2", 1), "after the poison"
    assert len(places) == 5
