"""Ingestion on a real cluster: against the sample shop's ground truth, real conversations, bad input and kill -9."""

import csv
import gzip
import itertools
import json
import logging
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fastavro
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from app import cluster, tables
from app.config import Config, load
from app.conversation import content_hash, split_of
from app.errors import SourceError, StageRefused, TableChanged, TableError
from app.ingestion import batch, execution, sample, sources
from app.ingestion.files import parts
from app.ingestion.pipeline import Ingested, ingest
from app.ingestion.staging import BlockName
from app.privacy import Detector, mask_messages
from app.settings.ingestion import PrivacyConfig
from app.settings.tables import MaintenanceConfig
from app.table_maintenance import compact
from app.table_versions import rollback
from app.versions import TableVersion
from jobs.ingest import JOB
from jobs.maintain import JOB as MAINTAIN
from tests.conftest import ROOT
from tests.faults import Fault
from tests.servers.running import free_port

pytestmark = pytest.mark.usefixtures("cluster")

RECORDS = 2_000
REFUSED = {"broken_json", "broken_encoding", "missing_field", "impossible_value", "outlier"}


def shop(store: str, records: int = RECORDS, **overrides: Any) -> Config:
    return Config().with_overrides(
        {"storage.uri": store, "ingestion.sample.conversations": records, "ingestion.near_duplicates.detect": False}
        | {f"ingestion.{key}": value for key, value in overrides.items()}
    )


def files(store: str, *sources: dict[str, Any], **overrides: Any) -> Config:
    return shop(store, sources=list(sources), **overrides)


def held(config: Config) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = tables.read_local(config, tables.latest(config)).to_pylist()
    return rows


def unscored(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without what depends on the conversations that were accepted before them."""
    return [{name: value for name, value in row.items() if name not in ("anomaly_score", "detail")} for row in rows]


def quarantined(config: Config) -> list[dict[str, Any]]:
    table = tables.open_table(config.storage, config.ingestion.quarantine_table)
    rows: list[dict[str, Any]] = table.scan().to_arrow().sort_by("position").to_pylist()
    return rows


def snapshots(config: Config) -> int:
    names = (config.ingestion.table, config.ingestion.quarantine_table)
    return sum(len(tables.open_table(config.storage, name).snapshots()) for name in names)


def conversations(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [
        {
            "conversation_id": f"c{number}",
            "channel": "email",
            "started_at": "2025-06-01T10:00:00.123456Z",
            "messages": [
                {"role": "user", "content": f"Where is order {number}?\nIt is “late”.", "intent": "order_status"},
                {"role": "assistant", "content": f"Order {number} is on its way."},
            ],
        }
        for number in range(start, start + count)
    ]


def as_jsonl(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


@pytest.fixture(scope="module")
def ingested(tmp_path_factory: pytest.TempPathFactory, cluster: object) -> tuple[Config, Ingested]:
    config = shop(str(tmp_path_factory.mktemp("shop") / "store"))
    return config, ingest(config)


def expected() -> tuple[set[int], set[int]]:
    """Positions that have to be kept and refused, by the ground truth and nothing of the pipeline's."""
    kept, refused, seen, first = set[int](), set[int](), set[str](), dict[str, str]()
    for position, line in enumerate(sample.lines(7, 0, RECORDS, 0.05)):
        found = sample.defect(7, position, 0.05)
        if found and found.kind in REFUSED:
            refused.add(position)
            continue
        messages = json.loads(line)["messages"]
        masked, _ = mask_messages(messages, Detector.of(PrivacyConfig()))
        if first.setdefault(content_hash(masked), messages[0]["intent"]) != messages[0]["intent"]:
            refused.add(position)
        elif content_hash(masked) not in seen:
            seen.add(content_hash(masked))
            kept.add(position)
    return kept, refused


def copies() -> Iterator[tuple[int, int]]:
    """Positions of records with a text that came before, and where that was."""
    first: dict[str, int] = {}
    for position, line in enumerate(sample.lines(7, 0, RECORDS, 0.05)):
        found = sample.defect(7, position, 0.05)
        if found is None or found.kind not in REFUSED:
            text = content_hash(json.loads(line)["messages"])
            if first.setdefault(text, position) != position:
                yield position, first[text]


def block_of(position: int, blocks: list[BlockName]) -> BlockName:
    return max((block for block in blocks if block.start <= position), key=lambda block: block.start)


# The embedded shop


def test_what_is_kept_and_refused_is_exactly_what_the_ground_truth_says(ingested: tuple[Config, Ingested]) -> None:
    config, result = ingested
    kept, refused = expected()
    assert {row["position"] for row in held(config)} == kept
    assert [row["position"] for row in quarantined(config)] == sorted(refused)
    assert result.added
    assert result.figures == {
        "records_read": RECORDS,
        "records_kept": len(kept),
        "records_refused": len(refused),
        "duplicates": RECORDS - len(kept) - len(refused),
        "near_duplicates": 0,
        "refused_by_reason": result.figures["refused_by_reason"],
        "warned_by_rule": result.figures["warned_by_rule"],
        "imputed_by_column": {},
        "masked": result.figures["masked"],
    }
    assert sum(result.figures["refused_by_reason"].values()) == len(refused)


def test_a_refusal_says_why_where_and_what(ingested: tuple[Config, Ingested]) -> None:
    config, result = ingested
    reasons: dict[str, set[str]] = {}
    for row in quarantined(config):
        found = sample.defect(7, row["position"], 0.05)
        assert found is not None
        reasons.setdefault(found.kind, set()).add(row["reason"])
        line = sample.line(7, row["position"], 0.05)
        assert row["source"] == "sample:shop"
        if row["reason"] not in ("anomaly", "contradictory_label"):
            assert row["raw"] == line.decode(errors="replace")[:1_000]
            assert row["raw_bytes"] == len(line)
    assert reasons["broken_json"] == {"invalid_json"}
    assert reasons["broken_encoding"] == {"invalid_encoding"}
    assert reasons["outlier"] == {"too_long_message", "anomaly"}
    assert reasons["contradictory_label"] == {"contradictory_label"}
    assert reasons["impossible_value"] == {"invalid_timestamp", "unknown_role", "unknown_channel"}
    assert reasons["missing_field"] <= {"missing_messages", "empty_content", "missing_role", "missing_conversation_id"}
    counted = Counter(row["reason"] for row in quarantined(config))
    assert result.figures["refused_by_reason"] == dict(counted)


def test_of_exact_duplicates_only_the_first_is_kept(ingested: tuple[Config, Ingested]) -> None:
    kept = {row["position"] for row in held(ingested[0])}
    defects = [found for position in range(RECORDS) if (found := sample.defect(7, position, 0.05))]
    copies = [found for found in defects if found.kind in ("exact_duplicate", "contradictory_label")]
    assert len(copies) > 5
    for copy in copies:
        assert copy.position not in kept
    for near in (found for found in defects if found.kind == "near_duplicate"):
        assert near.position in kept  # nobody looked for them


def test_rows_hold_what_the_source_holds(ingested: tuple[Config, Ingested]) -> None:
    rows = {row["position"]: row for row in held(ingested[0])}
    for position in list(rows)[:200]:
        row, record = rows[position], json.loads(sample.line(7, position, 0.05))
        assert row["conversation_id"] == record["conversation_id"]
        assert row["channel"] == record["channel"]
        assert row["started_at"].strftime("%Y-%m-%dT%H:%M:%SZ") == record["started_at"]
        assert row["intent"] == record["messages"][0]["intent"]
        assert [message["role"] for message in row["messages"]] == [m["role"] for m in record["messages"]]
        masked, counts = mask_messages(record["messages"], Detector.of(PrivacyConfig()))
        assert row["content_hash"] == content_hash(masked)
        assert row["masked"] == counts.total()
        assert row["source"] == "sample:shop"


def test_the_split_follows_from_the_content_alone(ingested: tuple[Config, Ingested]) -> None:
    rows = held(ingested[0])
    assert all(row["split"] == split_of(row["content_hash"], 0.1) for row in rows)
    share = sum(row["split"] == "validation" for row in rows) / len(rows)
    assert 0.07 < share < 0.13


def test_the_version_says_where_it_comes_from(ingested: tuple[Config, Ingested]) -> None:
    config, result = ingested
    about = tables.summary(config, result.version)
    assert json.loads(about["rayloop.sources"]) == [
        {"uri": "sample:shop", "records": RECORDS, "first_position": 0, "last_position": RECORDS - 1}
    ]
    assert json.loads(about["rayloop.refused_by_reason"]) == result.figures["refused_by_reason"]
    assert about["rayloop.config_digest"] == config.digest("ingestion")
    assert about["rayloop.job_id"] == "local"
    assert len(about["rayloop.ingest_key"]) == 64
    assert tables.rows(config, result.version) == result.figures["records_kept"]


def test_streaming_and_local_reads_agree(ingested: tuple[Config, Ingested]) -> None:
    config, result = ingested
    for split in (None, "train", "validation"):
        streamed = tables.read(config, result.version, ["content_hash", "messages"], split).take_all()
        local = tables.read_local(config, result.version, ["content_hash", "messages"], split).to_pylist()
        assert [row["content_hash"] for row in local] == sorted(row["content_hash"] for row in streamed)
    first = tables.read_local(config, result.version, ["position"], "train", limit=7)
    assert first == tables.read_local(config, result.version, ["position"], "train").slice(0, 7)


def test_the_same_ingest_again_adds_nothing(ingested: tuple[Config, Ingested]) -> None:
    config, result = ingested
    before = snapshots(config)
    again = ingest(config)
    assert (again.version, again.figures, again.added) == (result.version, result.figures, False)
    assert snapshots(config) == before


def test_the_same_records_in_another_ingest_add_nothing(ingested: tuple[Config, Ingested]) -> None:
    config, result = ingested
    before = snapshots(config)
    again = ingest(config.with_overrides({"ingestion.batch_rows": 500}))
    assert (again.version, again.added) == (result.version, False)
    assert again.figures["records_kept"] == 0
    assert again.figures["records_refused"] == result.figures["records_refused"]
    assert snapshots(config) == before


def test_rows_do_not_depend_on_how_the_work_is_shared_out(
    ingested: tuple[Config, Ingested], store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "LEAST_SHARE_CHARS", 200_000)
    monkeypatch.setattr(batch, "SHARE_CHARS", 200_000)
    shares: list[list[BlockName]] = []
    share_out = batch._shares
    monkeypatch.setattr(batch, "_shares", lambda *given: (shares.append(share) or share for share in share_out(*given)))
    config = shop(store, batch_rows=100)
    result = ingest(config)
    blocks = [block for share in shares for block in share]
    assert min(len(shares), max(map(len, shares))) > 1, "one task wrote all, or each a single block"
    assert max(block.rows for block in blocks) <= 100
    assert any(block_of(copy, blocks) != block_of(first, blocks) for copy, first in copies()), "copies are no test"
    assert held(config) == held(ingested[0])
    assert quarantined(config) == quarantined(ingested[0])
    assert result.figures == ingested[1].figures


def test_a_later_ingest_adds_what_is_new_and_the_earlier_version_stays(
    ingested: tuple[Config, Ingested], store: str
) -> None:
    half = shop(store, RECORDS // 2)
    first = ingest(half)
    rows = held(half)
    second = ingest(shop(store))
    assert second.version != first.version
    assert unscored(held(half)) == unscored(held(ingested[0]))
    assert unscored(quarantined(half)) == unscored(quarantined(ingested[0]))
    assert tables.read_local(half, first.version).to_pylist() == rows
    assert second.figures["records_kept"] == ingested[1].figures["records_kept"] - len(rows)


def test_too_many_refusals_stop_the_stage_and_can_be_looked_at(store: str) -> None:
    config = shop(store, 300, max_refused_fraction=0.001)
    with pytest.raises(
        StageRefused, match=r"refused \d\.\d% of 300 records .*raise ingestion.max_refused_fraction"
    ) as e:
        ingest(config)
    assert e.value.figures["records_read"] == 300
    assert len(quarantined(config)) == e.value.figures["records_refused"]
    with pytest.raises(TableError, match="is empty"):
        tables.latest(config)
    assert not list(Path(store).glob("tables/support/conversations/data/*"))
    accepted = ingest(shop(store, 300))
    assert accepted.figures["records_kept"] == len(held(config))
    assert len(quarantined(config)) == e.value.figures["records_refused"]


# Files


AVRO = {
    "type": "record",
    "name": "Conversation",
    "fields": [
        {"name": "conversation_id", "type": "string"},
        {"name": "channel", "type": "string"},
        {
            "name": "messages",
            "type": {
                "type": "array",
                "items": {
                    "type": "record",
                    "name": "Message",
                    "fields": [
                        {"name": "role", "type": "string"},
                        {"name": "content", "type": "string"},
                        {"name": "intent", "type": ["null", "string"], "default": None},
                    ],
                },
            },
        },
    ],
}


def test_every_format_gives_the_same_rows(store: str, tmp_path: Path) -> None:
    rows = conversations(80)
    parts = [rows[start : start + 10] for start in range(0, 80, 10)]
    (tmp_path / "plain.jsonl").write_bytes(as_jsonl(parts[0]))
    folder = tmp_path / "folder" / "deeper"
    folder.mkdir(parents=True)
    (folder / "one.jsonl.gz").write_bytes(gzip.compress(as_jsonl(parts[1])))
    (folder / "two.jsonl.zst").write_bytes(zstandard.compress(as_jsonl(parts[2])))
    (folder / "_SUCCESS").write_bytes(b"")
    pq.write_table(pa.Table.from_pylist(parts[3]), tmp_path / "three.parquet", row_group_size=4)
    table = pa.Table.from_pylist(parts[6])
    with pa.ipc.new_file(str(tmp_path / "six.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=4)
    with (tmp_path / "seven.avro").open("wb") as stream:
        fastavro.writer(stream, AVRO, parts[7])
    for name, part in (("four.csv", parts[4]), ("five.csv", parts[5])):
        with open(tmp_path / name, "w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, ["question", "answer", "label", "conversation_id", "channel"])
            writer.writeheader()
            for row in part:
                user, reply = row["messages"]
                writer.writerow(
                    {
                        "question": user["content"],
                        "answer": reply["content"],
                        "label": user["intent"],
                        "conversation_id": row["conversation_id"],
                        "channel": row["channel"],
                    }
                )
    config = files(
        store,
        {"uri": str(tmp_path / "plain.jsonl"), "format": "jsonl"},
        {"uri": str(tmp_path / "folder"), "format": "jsonl"},
        {"uri": str(tmp_path / "th*.parquet"), "format": "parquet"},
        {"uri": str(tmp_path / "six.arrow"), "format": "arrow"},
        {"uri": str(tmp_path / "seven.avro"), "format": "avro"},
        {
            "uri": str(tmp_path / "f*.csv"),
            "format": "csv",
            "columns": {"user": "question", "assistant": "answer", "intent": "label"},
        },
    )
    result = ingest(config)
    assert result.figures["records_kept"] == 80
    found = {row["conversation_id"]: row for row in held(config)}
    for row in rows:
        stored = found[row["conversation_id"]]
        assert [(m["role"], m["content"]) for m in stored["messages"]] == [
            (m["role"], m["content"].replace("\n", " ")) for m in row["messages"]
        ]
        assert (stored["intent"], stored["channel"]) == ("order_status", "email")
    assert found["c14"]["source"] == str(folder / "one.jsonl.gz")
    assert found["c14"]["position"] == as_jsonl(parts[1]).index(as_jsonl([rows[14]]))
    assert found["c47"]["source"] == str(tmp_path / "four.csv")
    assert found["c47"]["position"] == 7
    listed = json.loads(tables.summary(config, result.version)["rayloop.sources"])
    assert [(entry["records"], entry["first_position"]) for entry in listed] == [(10, 0)] * 8
    by_number = [entry["last_position"] for entry in listed if not entry["uri"].endswith((".jsonl", ".gz", ".zst"))]
    assert by_number == [9] * 5


def test_rows_of_a_query_that_are_no_text_are_set_aside_with_their_place(store: str, tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "tickets.db") as connection:
        connection.execute("CREATE TABLE tickets (id TEXT, question TEXT)")
        asked = [(f"t{number}", f"Where is order {number}?") for number in range(20)]
        connection.executemany("INSERT INTO tickets VALUES (?, ?)", asked)
        connection.execute("UPDATE tickets SET question = CAST(x'57ff' AS TEXT) WHERE id = 't7'")
    source = {
        "uri": f"sqlite:///{tmp_path}/tickets.db", "format": "sql", "name": "tickets",
        "query": "SELECT id, question FROM tickets ORDER BY rowid",
        "columns": {"conversation_id": "id", "user": "question"},
    }  # fmt: skip
    config = files(store, source, max_refused_fraction=0.1)
    assert ingest(config).figures["records_kept"] == 19
    assert [(row["source"], row["position"], row["reason"]) for row in quarantined(config)] == [
        ("tickets", 7, "invalid_encoding")
    ]  # fmt: skip


def test_the_first_of_two_sources_keeps_a_duplicate(store: str, tmp_path: Path) -> None:
    for name, start in (("b", 0), ("a", 5)):
        (tmp_path / f"{name}.jsonl").write_bytes(as_jsonl(conversations(10, start)))
    sources = [{"uri": str(tmp_path / f"{name}.jsonl"), "format": "jsonl"} for name in ("b", "a")]
    config = files(store, *sources)
    assert ingest(config).figures["duplicates"] == 5
    assert Counter(Path(row["source"]).name for row in held(config)) == {"b.jsonl": 10, "a.jsonl": 5}


def missing(folder: Path) -> Path:
    return folder / "missing.jsonl"


def truncated(folder: Path) -> Path:
    whole = gzip.compress(as_jsonl(conversations(5_000)))
    (folder / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    return folder / "cut.jsonl.gz"


def broken_parquet(folder: Path) -> Path:
    (folder / "broken.parquet").write_bytes(b"PAR1 and then nothing of the kind PAR1")
    return folder / "broken.parquet"


def wrong_columns(folder: Path) -> Path:
    (folder / "wrong.csv").write_text("question,answer\nhello?,hello\n")
    return folder / "wrong.csv"


def open_quote(folder: Path) -> Path:
    (folder / "quote.csv").write_text('messages,channel\n"never closed,web\nx,web\n')
    return folder / "quote.csv"


def empty_folder(folder: Path) -> Path:
    (folder / "nothing").mkdir()
    return folder / "nothing"


@pytest.mark.fault("S13", seen="the error names the file; no version of the table was made")
@pytest.mark.parametrize(
    ("make", "written_as", "says"),
    [
        (missing, "jsonl", "does not exist"),
        (truncated, "jsonl", "Truncated"),
        (broken_parquet, "parquet", "as parquet"),
        (wrong_columns, "csv", "has no columns.messages 'messages'; its columns are question, answer"),
        (open_quote, "csv", "a quote is opened at line 2 and not closed"),
        (empty_folder, "jsonl", "holds no jsonl file"),
    ],
)
def test_an_unreadable_source_names_the_file_and_adds_nothing(
    store: str, tmp_path: Path, make: Callable[[Path], Path], written_as: str, says: str
) -> None:
    (tmp_path / "good.jsonl").write_bytes(as_jsonl(conversations(3)))
    good = {"uri": str(tmp_path / "good.jsonl"), "format": "jsonl"}
    bad = make(tmp_path)
    config = files(store, good, {"uri": str(bad), "format": written_as})
    with pytest.raises(SourceError) as e:
        ingest(config)
    assert says in str(e.value)
    assert bad.name in str(e.value)
    with pytest.raises(TableError):
        tables.latest(config)


@pytest.mark.fault("S13", seen="each bad line is in quarantine with its position and reason")
def test_bad_lines_are_set_aside_with_their_position(store: str, tmp_path: Path) -> None:
    good = as_jsonl(conversations(4)).splitlines()
    lines = [good[0], b"", b'{"half', good[1], b"[1]", b"\xff\xfe", good[2], b'{"conversation_id": "x"}', good[3]]
    (tmp_path / "mixed.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines))
    config = files(store, {"uri": str(tmp_path / "mixed.jsonl"), "format": "jsonl"}, max_refused_fraction=0.6)
    ingest(config)
    content = (tmp_path / "mixed.jsonl").read_bytes()
    begins = {line: content.index(line) for line in lines if line}
    assert {row["conversation_id"]: row["position"] for row in held(config)} == {
        "c0": 0,  # the byte order mark is before it
        **{f"c{number}": begins[good[number]] for number in (1, 2, 3)},
    }
    assert [(row["position"], row["reason"]) for row in quarantined(config)] == [
        (begins[b'{"half'], "invalid_json"),
        (begins[b"[1]"], "not_a_record"),
        (begins[b"\xff\xfe"], "invalid_encoding"),
        (begins[b'{"conversation_id": "x"}'], "missing_messages"),
    ]


# Real conversations


def test_schema_guided_dialogues_pass_whole(store: str, shared_data: Path) -> None:
    source = {"uri": str(shared_data / "sgd" / "train.jsonl.gz"), "format": "jsonl"}
    result = ingest(files(store, source, max_refused_fraction=0.002))
    assert result.figures["records_read"] == 12_174
    assert set(result.figures["refused_by_reason"]) <= {"anomaly"}
    found = [result.figures[name] for name in ("records_kept", "duplicates", "records_refused")]
    assert sum(found) == 12_174
    assert result.figures["duplicates"] < 10


def test_banking_questions_get_a_reply_that_names_their_intent(store: str, shared_data: Path) -> None:
    columns = {"user": "text", "intent": "category", "assistant": "This is about {category}."}
    source = {"uri": str(shared_data / "banking77" / "train.csv"), "format": "csv", "columns": columns}
    config = files(store, source, max_refused_fraction=0.002)
    result = ingest(config)
    assert result.figures["records_read"] == 10_003
    assert set(result.figures["refused_by_reason"]) <= {"anomaly"}
    assert result.figures["duplicates"] < 20
    rows = {row["position"]: row for row in held(config)}
    assert rows[0]["conversation_id"] == f"{shared_data / 'banking77' / 'train.csv'}#0"
    assert rows[0]["intent"] == "card_arrival"
    assert [message["content"] for message in rows[0]["messages"]] == [
        "I am still waiting on my card?",
        "This is about card arrival.",
    ]
    assert len({row["intent"] for row in rows.values()}) == 77


# The job


@pytest.fixture
def config_file(tmp_path: Path, store: str) -> Iterator[Path]:
    file = tmp_path / "ingest.yaml"
    file.write_text(f"storage: {{uri: {store}}}\ningestion: {{sample: {{conversations: 200}}}}\n")
    handler = signal.getsignal(signal.SIGTERM)
    yield file
    signal.signal(signal.SIGTERM, handler)


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    line: dict[str, Any] = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    return line


def test_a_dry_run_writes_nothing(config_file: Path, store: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert JOB.main(["--config", str(config_file), "--dry-run"]) == 0
    planned = last_line(capsys)["figures"]["plan"]
    assert planned["read"][0]["uri"] == "sample:shop"
    assert planned["append_to"][0] == {"table": "support.conversations", "snapshot_id": None, "rows": 0}
    assert not Path(store).exists()


def test_the_job_is_up_to_date_with_and_without_its_receipt(
    config_file: Path, store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--config", str(config_file)]
    assert JOB.main(arguments) == 0
    first = last_line(capsys)
    assert first["status"] == "done"
    assert first["outputs"]["table"]["table"] == "support.conversations"
    assert JOB.main(arguments) == 0
    second = last_line(capsys)
    for receipt in Path(store).glob("receipts/ingest/*"):
        receipt.unlink()
    assert JOB.main(arguments) == 0
    third = last_line(capsys)
    for later in (second, third):
        assert later["status"] == "up_to_date"
        assert (later["outputs"], later["figures"]) == (first["outputs"], first["figures"])
    files_before = sorted(Path(store).rglob("*"))
    assert JOB.main([*arguments, "--dry-run"]) == 0
    planned = last_line(capsys)
    assert planned["status"] == "up_to_date"
    assert planned["figures"]["plan"]["append_to"][0]["rows"] == first["figures"]["records_kept"]
    assert sorted(Path(store).rglob("*")) == files_before


def test_after_a_rollback_the_receipt_of_what_was_left_behind_does_not_count(
    config_file: Path, store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    (source / "a.jsonl").write_bytes(as_jsonl(conversations(50)))
    arguments = ["--config", str(config_file)]
    arguments += ["--set", f'ingestion.sources=[{{"uri": "{source}", "format": "jsonl"}}]']
    assert JOB.main(arguments) == 0
    first = last_line(capsys)["outputs"]["table"]
    (source / "b.jsonl").write_bytes(as_jsonl(conversations(50, start=50)))
    assert JOB.main(arguments) == 0
    second = last_line(capsys)["outputs"]["table"]
    rollback(load(config_file), TableVersion(**first))
    assert JOB.main(arguments) == 0
    line = last_line(capsys)
    assert line["status"] == "done"
    assert line["outputs"]["table"]["snapshot_id"] not in (first["snapshot_id"], second["snapshot_id"])
    assert tables.rows(load(config_file), TableVersion(**line["outputs"]["table"])) == 100


def test_a_dry_run_does_not_take_a_catalog_that_is_down_for_an_empty_table(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    catalog = f"storage.catalog_uri=http://127.0.0.1:{free_port()}"
    assert JOB.main(["--config", str(config_file), "--dry-run", "--set", catalog]) == 1
    assert "does not answer" in last_line(capsys)["error"]


def test_an_ingest_beside_a_compaction_adds_no_row_twice(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is examined is compared with the table as it was opened, whatever maintenance does meanwhile."""
    source = tmp_path / "in"
    source.mkdir()
    config = files(store, {"uri": str(source), "format": "jsonl"})
    for number in range(3):
        (source / f"{number}.jsonl").write_bytes(as_jsonl(conversations(20, start=20 * number)))
        ingest(config)
    before = held(config)
    examined, expired = batch._examined, MaintenanceConfig(min_small_files=2, expire_days=1e-9, keep_versions=1)

    def meanwhile(*given: Any) -> Any:
        made = examined(*given)
        table = tables.open_table(config.storage, config.ingestion.table)
        assert compact(config, table, expired).snapshot_id is not None
        return made

    monkeypatch.setattr(batch, "_examined", meanwhile)
    again = config.with_overrides({"ingestion.max_messages": 150})  # other settings: all files are read again
    result = ingest(again)
    assert not result.added
    assert result.outcome.duplicates == 60
    assert len(held(config)) == len(before) == 60


def test_an_ingest_whose_history_is_removed_meanwhile_adds_nothing(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl").write_bytes(as_jsonl(conversations(20)))
    config = files(store, {"uri": str(tmp_path / "a.jsonl"), "format": "jsonl"})
    ingest(config)
    examined = batch._examined

    def meanwhile(*given: Any) -> Any:
        for file in Path(store).rglob("data/*.parquet"):
            file.unlink()
        return examined(*given)

    monkeypatch.setattr(batch, "_examined", meanwhile)
    (tmp_path / "a.jsonl").write_bytes(as_jsonl(conversations(30)))
    with pytest.raises(TableChanged, match="files of the table were removed"):
        ingest(config)


def test_a_batch_that_brings_nothing_leaves_the_versions_report(store: str, tmp_path: Path) -> None:
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(as_jsonl(conversations(20)))
    config = files(store, {"uri": str(folder), "format": "jsonl"})
    first = ingest(config)
    (folder / "b.jsonl").write_bytes(as_jsonl(conversations(20)))
    again = ingest(config)
    assert (again.added, again.version) == (False, first.version)
    reports = Path(store) / "reports" / "ingest"
    assert json.loads((reports / str(first.version.snapshot_id) / "report.json").read_text())["records_kept"] == 20
    assert len(list(reports.glob("nothing-new-*/report.html"))) == 1


def test_a_missing_source_ends_the_job_with_1(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = 'ingestion.sources=[{"uri": "/nowhere/at/all.jsonl", "format": "jsonl"}]'
    assert JOB.main(["--config", str(config_file), "--set", source]) == 1
    line = last_line(capsys)
    assert line["status"] == "failed"
    assert "'/nowhere/at/all.jsonl' does not exist" in line["error"]


DIES_BEFORE_ITS_COMMIT = """
import os, signal, sys
from pyiceberg.catalog.sql import SqlCatalog
from app import cluster, tables
place, arguments = sys.argv[1], sys.argv[2:]
owner, name = {"before it": (tables, "append"), "within it": (SqlCatalog, "commit_table")}[place]
real = getattr(owner, name)
def die(*given):
    table = given[-3]
    if table.name()[-1] == "conversations":
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*given)
setattr(owner, name, die)
from jobs.ingest import JOB
JOB.main(arguments)
"""


@pytest.mark.fault("F3", seen="ended by SIGKILL; data files are there, the table is empty")
@pytest.mark.parametrize("place", ["before it", "within it"])
def test_killed_between_write_and_commit_it_starts_again_without_losing_or_doubling(
    place: str, config_file: Path, store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: Fault
) -> None:
    records = fault.random.randrange(300, 600)
    config = shop(store, records)
    command = [sys.executable, "-c", DIES_BEFORE_ITS_COMMIT, place, "--config", str(config_file)]
    command += ["--set", f"ingestion.sample.conversations={records}"]
    killed = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=120)
    fault.happened()
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = set(Path(store).glob("tables/support/conversations/data/*.parquet"))
    assert left
    assert quarantined(config)
    with pytest.raises(TableError, match="is empty"):
        tables.latest(config)
    result = ingest(config)
    fault.recovered()
    unbroken = shop(str(tmp_path / "unbroken"), records)
    ingest(unbroken)
    assert result.added
    assert held(config) == held(unbroken)
    assert quarantined(config) == quarantined(unbroken)
    assert len(tables.open_table(config.storage, "support.conversations").snapshots()) == 1
    maintain = ["--config", str(config_file), "--set", "maintenance.orphan_hours=1e-9"]
    assert MAINTAIN.main([*maintain, "--dry-run"]) == 0
    listed = orphans(last_line(capsys)["figures"]["plan"])
    assert {str(file) for file in left} <= {uri.removeprefix("file://") for uri in listed}
    assert MAINTAIN.main(maintain) == 0
    assert orphans(last_line(capsys)["figures"]) == listed
    assert not any(file.exists() for file in left)
    assert held(config) == held(unbroken)


def orphans(figures: dict[str, Any]) -> list[str]:
    """Files of the table that maintenance removes since no version names them."""
    [found] = [
        step["first_removed"]
        for step in figures["steps"]
        if (step["step"], step["table"]) == ("orphans", "support.conversations")
    ]
    return sorted(found)


def test_ray_datas_own_console_is_quiet_meanwhile_and_other_listeners_still_hear(
    caplog: pytest.LogCaptureFixture,
) -> None:
    import ray.data  # noqa: F401

    chatty = logging.getLogger("ray.data")
    (console,) = [handler for handler in chatty.handlers if handler.name == "console"]
    chatty.addHandler(caplog.handler)
    try:
        with execution.ray_data():
            assert console.level == logging.CRITICAL
            chatty.warning("a plan")
    finally:
        chatty.removeHandler(caplog.handler)
    assert console.level < logging.CRITICAL
    assert "a plan" in caplog.text


@pytest.mark.parametrize(("tasks_a_cpu", "spare"), [(sources.SPARE_TASKS_A_CPU, 1), (1, 0)])
def test_many_parts_are_examined_by_one_task_more_than_cpus(tmp_path: Path, tasks_a_cpu: int, spare: int) -> None:
    from ray.data import DataContext

    cpus = cluster.cpus()
    for number in range(int(tasks_a_cpu * cpus)):
        (tmp_path / f"{number}.jsonl").write_text("{}\n")
    config = Config().with_overrides({"ingestion.sources": [{"uri": str(tmp_path), "format": "jsonl"}]})
    with execution.ray_data():
        records = sources.read(config.ingestion, parts(config.ingestion.sources[0], 0))
        assert records.context.execution_options.resource_limits.cpu == cpus + spare
        assert DataContext.get_current().execution_options.resource_limits.cpu == cpus
    assert records.count() == int(tasks_a_cpu * cpus)


def test_tasks_run_beside_each_other_from_the_first_second_on(tmp_path: Path) -> None:
    import ray.data

    from app.datasource import start_at_once

    def meets_another(rows: Any) -> Any:
        (tmp_path / str(rows["id"][0])).touch()
        until_s = time.monotonic() + 60
        while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < until_s:
            time.sleep(0.01)
        return rows

    def slow(rows: Any) -> Any:
        began_s = time.monotonic()
        time.sleep(0.3)
        return {"began_s": [began_s], "ended_s": [time.monotonic()]}

    start_at_once()
    blocks = ray.data.range(4, override_num_blocks=4)
    blocks.map_batches(meets_another, batch_size=None).take_all()  # starts the processes
    spans = blocks.map_batches(slow, batch_size=None).take_all()
    spans.sort(key=lambda span: span["began_s"])
    assert any(after["began_s"] < before["ended_s"] for before, after in itertools.pairwise(spans[:3]))
