import csv
import gzip
import io
import json
import os
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.config import ColumnsConfig, Config
from app.errors import SourceError
from app.ingestion import formats, sources
from app.ingestion.formats import pieces, read_csv, read_jsonl, read_parquet
from app.ingestion.sources import files_of, glob_expression, state

PLAIN = ColumnsConfig()
ONE_TURN = ColumnsConfig(user="q", assistant="a")


def config(*uris: str, format: str = "jsonl") -> Config:
    return Config().with_overrides({"ingestion.sources": [{"uri": uri, "format": format} for uri in uris]})


def names(*uris: str, format: str = "jsonl") -> list[str]:
    return [Path(file.uri).name for file in files_of(config(*uris, format=format).ingestion)]


def make(folder: Path, *paths: str) -> None:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(b"{}\n")


def contents(found: Any) -> list[tuple[int, bytes, str | None]]:
    return [
        (piece.start + offset, raw, problem)
        for piece in found
        for offset, (raw, problem) in enumerate(zip(piece.raw, piece.problems, strict=True))
    ]


# Which files


def test_a_file_a_folder_and_a_glob(tmp_path: Path) -> None:
    make(
        tmp_path,
        "b.jsonl",
        "a.jsonl.gz",
        "deep/er/c.json.zst",
        "_SUCCESS",
        ".hidden.jsonl",
        "notes.txt",
        "_old/d.jsonl",
    )
    assert names(f"{tmp_path}/b.jsonl") == ["b.jsonl"]
    assert names(str(tmp_path)) == names(f"{tmp_path}/") == ["a.jsonl.gz", "b.jsonl", "c.json.zst"]
    assert names(f"{tmp_path}/*.jsonl*") == [".hidden.jsonl", "a.jsonl.gz", "b.jsonl"]
    assert names(f"{tmp_path}/**/c.*") == ["c.json.zst"]
    assert names(f"{tmp_path}/deep/*/c.json.zst", f"{tmp_path}/b.jsonl") == ["c.json.zst", "b.jsonl"]
    assert names(f"{tmp_path}/notes.txt", format="csv") == ["notes.txt"]


def test_a_name_may_look_like_a_pattern(tmp_path: Path) -> None:
    make(tmp_path, "data[1].jsonl", "data1.jsonl")
    assert names(f"{tmp_path}/data[1].jsonl") == ["data[1].jsonl"]
    assert names(f"{tmp_path}/data[0-9].jsonl") == ["data1.jsonl"]


def test_uris_name_the_file_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "sub/a.jsonl")
    monkeypatch.setenv("RAYLOOP_HOME", str(tmp_path))
    for uri in ("sub", "sub/a.jsonl", "*/a.jsonl", f"file://{tmp_path}/sub"):
        (file,) = files_of(config(uri).ingestion)
        assert file.path == str(tmp_path / "sub" / "a.jsonl")
        assert file.uri.removeprefix("file://") == file.path


@pytest.mark.parametrize("uri", ["gone.jsonl", "gone/*.jsonl", "empty", "empty/*.jsonl", "nosuch://host/x"])
def test_a_source_without_files_is_an_error_that_names_it(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("RAYLOOP_HOME", str(tmp_path))
    with pytest.raises(SourceError, match=re.escape(uri)):
        files_of(config(uri).ingestion)


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        ("*.csv", ["a.csv", ".csv"], ["a/b.csv", "a.csv.gz"]),
        ("**/*.csv", ["a.csv", "x/y/a.csv"], ["a.tsv"]),
        ("x/**", ["x/a", "x/y/b"], ["y/a"]),
        ("part-?.json", ["part-1.json"], ["part-12.json", "part-/.json"]),
        ("[ab]*.json", ["a1.json", "b.json"], ["c.json"]),
        ("[!ab].json", ["c.json"], ["a.json"]),
        ("a+(1).json", ["a+(1).json"], ["aa1.json"]),
    ],
)
def test_globs(pattern: str, yes: list[str], no: list[str]) -> None:
    matches = re.compile(glob_expression(pattern)).fullmatch
    assert [name for name in yes + no if matches(name)] == yes


def test_the_state_follows_the_files(tmp_path: Path) -> None:
    make(tmp_path, "a.jsonl")
    before = state(config(str(tmp_path)))
    assert state(config(str(tmp_path))) == before
    assert before[0] | {"digest": ""} == {"uri": str(tmp_path), "files": 1, "bytes": 3, "digest": ""}
    os.utime(tmp_path / "a.jsonl", ns=(1, 1))
    touched = state(config(str(tmp_path)))
    assert touched != before
    make(tmp_path, "b.jsonl")
    assert state(config(str(tmp_path)))[0]["files"] == 2
    assert state(config(str(tmp_path))) != touched


def test_the_state_of_the_sample_follows_its_settings() -> None:
    before = state(Config())
    assert state(Config().with_overrides({"ingestion.batch_rows": 5})) == before
    assert state(Config().with_overrides({"ingestion.sample.seed": 5})) != before


# What is in them


@given(st.lists(st.binary(max_size=30).map(lambda line: line.replace(b"\n", b""))), st.integers(1, 9), st.booleans())
def test_lines_are_those_that_are_not_blank(lines: list[bytes], chunk: int, ends: bool) -> None:
    content = b"\n".join(lines) + (b"\n" if ends else b"")
    content = content.removeprefix(b"\xef\xbb\xbf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "CHUNK_BYTES", chunk)
        stream = io.BytesIO(content)
        found = [raw for _, raw, _ in contents(pieces(formats._lines(stream.read(chunk), stream), 3, True))]
    assert found == [line.strip() for line in content.split(b"\n") if line.strip()]


def test_a_line_without_end_is_set_aside_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "CHUNK_BYTES", 10)
    monkeypatch.setattr(formats, "MAX_RECORD_BYTES", 50)
    stream = io.BytesIO(b'{"a":1}\n' + b"x" * 500 + b'\n{"b":2}\n' + b"y" * 500)
    found = contents(read_jsonl(stream, PLAIN, 100))
    assert [(position, problem) for position, _, problem in found] == [
        (0, None),
        (1, "too_long_record"),
        (2, None),
        (3, "too_long_record"),
    ]
    assert all(len(raw) <= 10 for _, raw, _ in found)


@given(st.lists(st.binary(max_size=9)), st.integers(1, 5))
def test_pieces_are_whole_and_in_order(records: list[bytes], batch_rows: int) -> None:
    found = list(pieces(((record, None) for record in records), batch_rows, True))
    assert [raw for piece in found for raw in piece.raw] == records
    assert [position for position, _, _ in contents(found)] == list(range(len(records)))
    assert all(1 <= len(piece.raw) <= batch_rows for piece in found)


def test_ids_are_seen_from_the_beginning_of_the_file() -> None:
    assert all(piece.identified for piece in read_jsonl(io.BytesIO(b'{}\n{"conversation_id": 1}'), PLAIN, 1))
    assert not any(piece.identified for piece in read_jsonl(io.BytesIO(b'{"id": 1}'), PLAIN, 1))


@given(st.lists(st.tuples(st.text(max_size=9), st.text(max_size=9)), max_size=9))
def test_csv_rows_come_back_as_they_were_written(rows: list[tuple[str, str]]) -> None:
    rows = [(q, a) for q, a in rows if (q + a).isprintable() or "\n" in q + a]
    text = io.StringIO(newline="")
    writer = csv.writer(text, quoting=csv.QUOTE_ALL)
    writer.writerows([("q", "a"), *rows])
    try:
        stream = io.BytesIO(b"\xef\xbb\xbf" + text.getvalue().encode())
    except UnicodeEncodeError:
        return
    found = [json.loads(raw) for _, raw, _ in contents(read_csv(stream, ONE_TURN, 4))]
    assert found == [{"q": q, "a": a} for q, a in rows]


def test_bad_csv_rows_are_set_aside_and_the_rest_goes_on() -> None:
    content = b'q,a\nhi,there\n\nonly one\n"a"b,c\ncaf\xe9,x\n1,2,3\nlast,one\n'
    found = contents(read_csv(io.BytesIO(content), ONE_TURN, 100))
    assert [problem for _, _, problem in found] == [
        None, "wrong_column_count", "invalid_csv", None, "wrong_column_count", None,
    ]  # fmt: skip
    assert json.loads(found[3][1])["q"] == "caf\udce9"
    assert json.loads(found[5][1]) == {"q": "last", "a": "one"}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "no header"),
        (b"x,y\n1,2\n", "no columns.assistant 'a', columns.user 'q'; its columns are x, y"),
        (b'q,a\n1,2\n"3,4\n5,6\n', "a quote is opened at line 3 and not closed"),
    ],
)
def test_a_csv_that_cannot_be_read_says_why(content: bytes, says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        list(read_csv(io.BytesIO(content), ONE_TURN, 100))


def test_a_column_that_is_named_has_to_be_there_and_a_default_need_not() -> None:
    named = Config().with_overrides(
        {"ingestion.sources": [{"uri": "x", "format": "csv", "columns": {"user": "q", "intent": "label"}}]}
    )
    columns = named.with_overrides({}).ingestion.sources[0].columns
    with pytest.raises(ValueError, match=r"no columns.intent 'label'"):
        formats.check_columns(["q"], columns)
    formats.check_columns(["q", "label"], columns)


def test_parquet_rows_become_json_with_times_in_iso(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "hé"}], "started_at": datetime(2025, 1, 2, tzinfo=UTC)}] * 5
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=2)
    with pa.OSFile(str(tmp_path / "a.parquet")) as file:
        found = contents(read_parquet(file, PLAIN, 2))
    assert [position for position, _, _ in found] == [0, 1, 2, 3, 4]
    assert json.loads(found[4][1]) == {
        "messages": [{"role": "user", "content": "hé"}],
        "started_at": "2025-01-02T00:00:00+00:00",
    }


def test_a_file_cut_short_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(os.urandom(5_000))[:-20])
    settings = config(str(tmp_path / "cut.jsonl.gz")).ingestion
    (file,) = files_of(settings)
    with pytest.raises(SourceError, match=r"cannot read .*cut\.jsonl\.gz as jsonl \(Truncated"):
        list(sources._blocks(0, file, settings.sources[0], 100))
