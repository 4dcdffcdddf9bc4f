import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from app import export, tables
from app.config import Config
from app.conversation import SCHEMA
from app.errors import ConfigError, StorageError, TableError
from app.ingestion import files
from app.settings.ingestion import SourceConfig
from app.settings.tables import ExportConfig
from app.storage import Storage
from app.table_versions import tag
from tests.table_rows import add, ids, row, rows, stage, table_of

KILLED = """
import os, signal, sys
from app import export
from app.config import Config
from app.settings.tables import ExportConfig
config = Config().with_overrides({"storage.uri": sys.argv[1]})
real, ended = export._Shard.ended, []
def ended_then_killed(shard):
    part = real(shard)
    ended.append(part)
    if len(ended) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return part
export._Shard.ended = ended_then_killed
export.export(config, ExportConfig(uri=sys.argv[2], format="jsonl", shard_bytes=2_000))
"""


@pytest.fixture
def config(store: str) -> Config:
    return Config().with_overrides({"storage.uri": store})


def shas(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.glob("part-*")}


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for file in sorted(folder.glob("*.jsonl")) for line in file.read_text().split("\n")[:-1]]


def test_parquet_holds_every_row_and_column_of_the_version(config: Config, tmp_path: Path) -> None:
    version = add(config, range(50))
    add(config, [100])
    folder = tmp_path / "out"
    settings = ExportConfig(uri=str(folder), version=version.snapshot_id)
    uri, done, written = export.export(config, settings)
    assert (uri, written, done.rows) == (str(folder), True, 50)
    found = pq.read_table(folder)
    assert found.schema.names == SCHEMA.names
    assert found.cast(SCHEMA).sort_by("position") == rows(range(50))
    assert b"PARQUET:field_id" not in (found.schema.field("split").metadata or {})


def test_the_list_of_files_is_right(config: Config, tmp_path: Path) -> None:
    for start in range(0, 100, 20):
        add(config, range(start, start + 20))
    folder = tmp_path / "out"
    _, done, _ = export.export(config, ExportConfig(uri=str(folder), format="jsonl", shard_bytes=5_000))
    said = json.loads((folder / "_SUCCESS").read_text())
    assert (said["table"], said["rows"], said["format"]) == ("support.conversations", 100, "jsonl")
    assert said["snapshot_id"] == tables.latest(config).snapshot_id
    assert len(said["files"]) > 3
    assert {file["name"]: file["sha256"] for file in said["files"]} == shas(folder)
    for file in said["files"]:
        assert (folder / file["name"]).stat().st_size == file["size_bytes"]
        assert len((folder / file["name"]).read_text().splitlines()) == file["rows"]
    assert sum(file["rows"] for file in said["files"]) == 100
    assert export.check(Storage(str(folder))) == []
    assert [part.name for part in done.files] == sorted(shas(folder))


def test_parquet_too_is_cut_into_shards(config: Config, tmp_path: Path) -> None:
    add(config, range(9_000))
    _, done, _ = export.export(config, ExportConfig(uri=str(tmp_path / "out"), shard_bytes=20_000))
    assert len(done.files) > 1
    assert done.rows == sum(part.rows for part in done.files) == 9_000
    found = pq.read_table(tmp_path / "out", columns=["position"])["position"].to_pylist()
    assert sorted(found) == list(range(9_000))


@pytest.mark.parametrize("written_as", ["jsonl", "parquet"])
def test_ingestions_reader_reads_what_was_exported(config: Config, tmp_path: Path, written_as: Any) -> None:
    version = add(config, range(30))
    folder = tmp_path / "out"
    export.export(config, ExportConfig(uri=str(folder), format=written_as, shard_bytes=4_000))
    source = SourceConfig(uri=str(folder), format=written_as)
    pieces = [piece for part in files.parts(source, 0) for piece in files.read(part, source, 16)]
    found = [json.loads(raw) for piece in pieces for raw in pa.array(piece.raw, pa.binary()).to_pylist()]
    expected = tables.read_local(config, version).to_pylist()
    assert sorted(record["conversation_id"] for record in found) == ids(config, version)
    texts = {record["conversation_id"]: [message["content"] for message in record["messages"]] for record in found}
    assert texts == {entry["conversation_id"]: [each["content"] for each in entry["messages"]] for entry in expected}


def test_jsonl_is_a_conversation_record_a_line(config: Config, tmp_path: Path) -> None:
    add(config, [1])
    export.export(config, ExportConfig(uri=str(tmp_path / "out"), format="jsonl"))
    (record,) = records(tmp_path / "out")
    assert record == {
        "conversation_id": "conversation-1",
        "channel": "web",
        "language": "en",
        "started_at": None,
        "messages": [
            {"role": "user", "content": "where is my order 1, asked 0 times before?", "intent": "order_status"},
            {"role": "assistant", "content": "It is on its way."},
        ],
    }


def test_dates_bytes_and_every_script_survive_jsonl(config: Config, tmp_path: Path) -> None:
    import datetime

    table = tables.open_table(config.storage, config.ingestion.table, SCHEMA)
    odd = 'tab\t "quoted" \\ \u2028 \U0001f600 ünïcode'
    at = datetime.datetime(2026, 11, 24, 13, 5, 6, 789, datetime.UTC)
    one = row(1) | {"messages": [{"role": "user", "content": odd}], "started_at": at, "minhash": b"\x00\xff" * 64}
    tables.append(table, [stage(table, pa.Table.from_pylist([one], schema=SCHEMA), "odd")], {})
    columns = ("messages", "started_at", "minhash")
    export.export(config, ExportConfig(uri=str(tmp_path / "out"), format="jsonl", columns=columns))
    (record,) = records(tmp_path / "out")
    assert record["messages"][0]["content"] == odd
    assert datetime.datetime.fromisoformat(record["started_at"]) == at
    assert bytes.fromhex(record["minhash"]) == b"\x00\xff" * 64


def test_the_same_export_again_is_there_already(config: Config, tmp_path: Path) -> None:
    add(config, range(5))
    settings = ExportConfig(uri=str(tmp_path / "out"))
    export.export(config, settings)
    before = (tmp_path / "out" / "_SUCCESS").stat().st_mtime_ns
    _, done, written = export.export(config, settings)
    assert not written
    assert done.rows == 5
    assert (tmp_path / "out" / "_SUCCESS").stat().st_mtime_ns == before


def test_a_killed_export_is_not_taken_for_a_whole_one_and_is_made_again(
    config: Config, store: str, tmp_path: Path
) -> None:  # fmt: skip
    add(config, range(100))
    folder = tmp_path / "out"
    killed = subprocess.run([sys.executable, "-c", KILLED, store, str(folder)], cwd=os.getcwd(), check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(shas(folder)) == 2, "it was killed midway"
    assert export.read(Storage(str(folder))) is None
    with pytest.raises(StorageError, match=r"holds no finished export: run jobs\.export"):
        export.check(Storage(str(folder)))
    settings = ExportConfig(uri=str(folder), format="jsonl", shard_bytes=2_000)
    _, done, written = export.export(config, settings)
    assert written
    assert sorted(record["conversation_id"] for record in records(folder)) == ids(config, tables.latest(config))
    assert done.rows == 100
    assert [note["uri"] for note in export.notes(config)] == [str(folder)], "noted once, before it began"


def test_a_changed_or_missing_file_is_found(config: Config, tmp_path: Path) -> None:
    add(config, range(100))
    folder = tmp_path / "out"
    export.export(config, ExportConfig(uri=str(folder), format="jsonl", shard_bytes=5_000))
    first, second = sorted(folder.glob("part-*"))[:2]
    first.write_bytes(first.read_bytes().replace(b"order 1,", b"order 2,", 1))
    second.unlink()
    assert export.check(Storage(str(folder))) == [first.name, second.name]


def test_a_folder_with_anything_else_in_it_is_left_alone(config: Config, tmp_path: Path) -> None:
    version = add(config, range(5))
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "thesis.tex").write_text("mine")
    with pytest.raises(StorageError, match=r"is not empty: it holds thesis\.tex: choose another folder"):
        export.export(config, ExportConfig(uri=str(folder)))
    assert [path.name for path in folder.iterdir()] == ["thesis.tex"]
    other = tmp_path / "other"
    export.export(config, ExportConfig(uri=str(other)))
    add(config, [9])
    with pytest.raises(StorageError, match=rf"it holds an export of support\.conversations@{version.snapshot_id}"):
        export.export(config, ExportConfig(uri=str(other)))
    (other / "_SUCCESS").write_text("{}")
    with pytest.raises(StorageError, match="_SUCCESS is not of an export"):
        export.export(config, ExportConfig(uri=str(other)))


def test_a_tag_chooses_the_version_and_its_own_folder_is_the_default(config: Config) -> None:
    version = add(config, range(3))
    add(config, [7])
    tag(config, version, "clean")
    uri, done, _ = export.export(config, ExportConfig(version="clean"))
    assert (done.snapshot_id, done.rows) == (version.snapshot_id, 3)
    assert uri.startswith(f"{config.storage.uri}/exports/support.conversations/{version.snapshot_id}-")
    other, *_ = export.export(config, ExportConfig(version="clean", columns=("conversation_id",)))
    assert other != uri


def test_columns_that_came_later_are_null(config: Config, tmp_path: Path) -> None:
    before = pa.schema([field for field in SCHEMA if field.name != "masked"])
    table = tables.open_table(config.storage, config.ingestion.table, before)
    tables.append(table, [stage(table, rows([1]).select(before.names), "before")], {})
    add(config, [2])
    export.export(config, ExportConfig(uri=str(tmp_path / "out")))
    assert pq.read_table(tmp_path / "out")["masked"].null_count == 2
    assert len(Storage(str(tmp_path / "out")).list()) == 2


def test_an_empty_version_is_a_list_of_no_files(config: Config, tmp_path: Path) -> None:
    add(config, [])
    for written_as in ("parquet", "jsonl"):
        uri = str(tmp_path / written_as)
        _, done, written = export.export(config, ExportConfig(uri=uri, format=written_as))
        assert (done.rows, done.files, written) == (0, [], True)
        assert [path.name for path in Path(uri).iterdir()] == ["_SUCCESS"]


def test_what_is_not_there_is_named(config: Config, tmp_path: Path) -> None:
    add(config, [1])
    with pytest.raises(ConfigError, match=r"has no column mood, moood: columns: conversation_id, channel"):
        export.export(config, ExportConfig(uri=str(tmp_path / "out"), columns=("mood", "moood", "split")))
    with pytest.raises(TableError, match="has no version tagged 'clean': tags: none"):
        export.export(config, ExportConfig(uri=str(tmp_path / "out"), version="clean"))
    victim = Path(table_of(config).location().removeprefix("file://")) / "data"
    next(victim.glob("*.parquet")).unlink()
    with pytest.raises(TableError, match=r"a data file of table support\.conversations, cannot be read"):
        export.export(config, ExportConfig(uri=str(tmp_path / "out")))
    assert not (tmp_path / "out" / "_SUCCESS").exists()
