import contextlib
import csv
import gzip
import io
import json
import os
import re
import struct
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fastavro
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.config import Config
from app.errors import SourceError
from app.ingestion import formats
from app.ingestion.files import glob_expression, read
from app.ingestion.formats import (
    READERS,
    Span,
    pieces,
    read_arrow,
    read_avro,
    read_csv,
    read_jsonl,
    read_parquet,
    read_text,
)
from app.ingestion.sources import parts_of, state
from app.settings.ingestion import ColumnsConfig

PLAIN = ColumnsConfig()
ONE_TURN = ColumnsConfig(user="q", assistant="a")


def config(*uris: str, format: str = "jsonl") -> Config:
    return Config().with_overrides({"ingestion.sources": [{"uri": uri, "format": format} for uri in uris]})


def names(*uris: str, format: str = "jsonl") -> list[str]:
    return [Path(file.uri).name for file in parts_of(config(*uris, format=format), {})]


def make(folder: Path, *paths: str) -> None:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(b"{}\n")


def contents(found: Any) -> list[tuple[int, bytes, str | None]]:
    return [
        (int(position), raw if isinstance(raw, bytes) else raw.as_py(), problem)
        for piece in found
        for position, raw, problem in zip(
            piece.positions, piece.raw, piece.problems or [None] * len(piece.raw), strict=True
        )
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


def test_a_glob_may_name_folders(tmp_path: Path) -> None:
    make(tmp_path, "2026-01/a.jsonl", "2026-01/x/b.jsonl.gz", "2026-02/c.jsonl", "2026-02/_SUCCESS", "2025-12/d.jsonl")
    make(tmp_path, "2026-notes.jsonl", "2026-02/readme.txt")
    below = ["a.jsonl", "b.jsonl.gz", "c.jsonl"]
    assert names(f"{tmp_path}/2026-0?/") == names(f"{tmp_path}/2026-0*") == below
    assert names(f"{tmp_path}/2026-*/*.jsonl") == ["a.jsonl", "c.jsonl"]


def test_a_name_may_look_like_a_pattern(tmp_path: Path) -> None:
    make(tmp_path, "data[1].jsonl", "data1.jsonl")
    assert names(f"{tmp_path}/data[1].jsonl") == ["data[1].jsonl"]
    assert names(f"{tmp_path}/data[0-9].jsonl") == ["data1.jsonl"]


def test_uris_name_the_file_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "sub/a.jsonl")
    monkeypatch.setenv("RAYLOOP_HOME", str(tmp_path))
    for uri in ("sub", "sub/a.jsonl", "*/a.jsonl", f"file://{tmp_path}/sub"):
        (file,) = parts_of(config(uri), {})
        assert file.path == str(tmp_path / "sub" / "a.jsonl")
        assert file.uri.removeprefix("file://") == file.path


@pytest.mark.parametrize("uri", ["gone.jsonl", "gone/*.jsonl", "empty", "empty/*.jsonl", "nosuch://host/x"])
def test_a_source_without_files_is_an_error_that_names_it(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("RAYLOOP_HOME", str(tmp_path))
    with pytest.raises(SourceError, match=re.escape(uri)):
        parts_of(config(uri), {})


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
    assert before[0] | {"digest": ""} == {"uri": str(tmp_path), "parts": 1, "bytes": 3, "digest": ""}
    os.utime(tmp_path / "a.jsonl", ns=(1, 1))
    touched = state(config(str(tmp_path)))
    assert touched != before
    make(tmp_path, "b.jsonl")
    assert state(config(str(tmp_path)))[0]["parts"] == 2
    assert state(config(str(tmp_path))) != touched


def test_the_state_of_the_sample_follows_its_settings() -> None:
    before = state(Config())
    assert state(Config().with_overrides({"ingestion.batch_rows": 5})) == before
    assert state(Config().with_overrides({"ingestion.sample.seed": 5})) != before


# What is in them


lines_of_bytes = st.lists(st.binary(max_size=30).map(lambda line: line.replace(b"\n", b"")))


@given(lines_of_bytes, st.integers(1, 9), st.booleans())
def test_lines_are_those_that_are_not_blank_at_the_bytes_where_they_begin(
    lines: list[bytes], chunk: int, ends: bool
) -> None:
    content = b"\n".join(lines) + (b"\n" if ends else b"")
    content = content.removeprefix(b"\xef\xbb\xbf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "CHUNK_BYTES", chunk)
        found = contents(read_jsonl(io.BytesIO(content), PLAIN, 3))
    assert [raw for _, raw, _ in found] == [line.strip() for line in content.split(b"\n") if line.strip()]
    for position, raw, _ in found:
        assert content[:position].endswith(b"\n") or position == 0
        assert content[position:].split(b"\n")[0].strip() == raw


@given(lines_of_bytes, st.integers(3, 9), st.integers(1, 40))
def test_tasks_that_share_a_file_read_every_line_once(lines: list[bytes], chunk: int, step: int) -> None:
    content = b"\n".join(lines)
    whole = contents(read_jsonl(io.BytesIO(content), PLAIN, 100))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "CHUNK_BYTES", chunk)
        shares = [
            contents(read_jsonl(io.BytesIO(content), PLAIN, 100, Span(start, min(start + step, len(content)))))
            for start in range(0, len(content), step)
        ]
    assert [record for share in shares for record in share] == whole


def test_a_byte_order_mark_is_no_part_of_the_first_line() -> None:
    found = contents(read_jsonl(io.BytesIO(b'\xef\xbb\xbf{"a":1}\n{"a":2}'), PLAIN, 9))
    assert [(position, raw) for position, raw, _ in found] == [(0, b'{"a":1}'), (11, b'{"a":2}')]


@pytest.mark.fault("S13", seen="set aside; memory stays bounded")
def test_a_line_without_end_is_set_aside_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "CHUNK_BYTES", 10)
    monkeypatch.setattr(formats, "MAX_RECORD_BYTES", 50)
    stream = io.BytesIO(b'{"a":1}\n' + b"x" * 500 + b'\n{"b":2}\n' + b"y" * 500)
    found = contents(read_jsonl(stream, PLAIN, 100))
    assert [(position, problem) for position, _, problem in found] == [
        (0, None),
        (8, "too_long_record"),
        (509, None),
        (517, "too_long_record"),
    ]
    assert all(len(raw) <= 10 for _, raw, _ in found)


def test_lines_of_text_are_questions(tmp_path: Path) -> None:
    columns = ColumnsConfig(user="text")
    found = contents(read_text(io.BytesIO(b"Where is it?\n\ncaf\xc3\xa9\n\xff\n"), columns, 9))
    assert found == [
        (0, b'{"text":"Where is it?"}', None),
        (14, '{"text":"café"}'.encode(), None),
        (20, b"\xff", "invalid_encoding"),
    ]
    with pytest.raises(ValueError, match=r"no columns.messages 'messages'; its columns are text"):
        list(read_text(io.BytesIO(b"hi"), PLAIN, 9))


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


@pytest.mark.fault("S13", seen="each bad row has its reason")
def test_bad_csv_rows_are_set_aside_and_the_rest_goes_on() -> None:
    content = b'q,a\nhi,there\n\nonly one\n"a"b,c\ncaf\xe9,x\n1,2,3\nlast,one\n'
    found = contents(read_csv(io.BytesIO(content), ONE_TURN, 100))
    assert [problem for _, _, problem in found] == [
        None, "wrong_column_count", "invalid_csv", None, "wrong_column_count", None,
    ]  # fmt: skip
    assert json.loads(found[3][1])["q"] == "caf\udce9"
    assert json.loads(found[5][1]) == {"q": "last", "a": "one"}


@pytest.mark.fault("S13", seen="the error says what is wrong")
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "no header"),
        (b"x,y\n1,2\n", "no columns.assistant 'a', columns.user 'q'; its columns are x, y"),
        (b'q,a\n1,2\n"3,4\n5,6\n', "a quote is opened at line 3 and not closed"),
        (b"my card is 4111111111111111,ok\n", "it has 2 columns, whose names are not those of a header"),
    ],
)
def test_a_csv_that_cannot_be_read_says_why(content: bytes, says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)) as caught:
        list(read_csv(io.BytesIO(content), ONE_TURN, 100))
    assert "4111" not in str(caught.value)


def test_a_column_that_is_named_has_to_be_there_and_a_default_need_not() -> None:
    named = Config().with_overrides(
        {"ingestion.sources": [{"uri": "x", "format": "csv", "columns": {"user": "q", "intent": "label"}}]}
    )
    columns = named.with_overrides({}).ingestion.sources[0].columns
    with pytest.raises(ValueError, match=r"no columns.intent 'label'"):
        formats.check_columns(["q"], columns)
    formats.check_columns(["q", "label"], columns)


ROWS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": f"hé {number}"}], "started_at": datetime(2025, 1, 2, tzinfo=UTC)}
    for number in range(5)
]


def written(rows: list[dict[str, Any]], format: str, path: Path) -> Path:
    table = pa.Table.from_pylist(rows)
    if format == "parquet":
        pq.write_table(table, path, row_group_size=2)
    elif format == "arrow file":
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    else:
        with pa.ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    return path


@pytest.mark.parametrize("format", ["parquet", "arrow file", "arrow stream"])
def test_rows_of_typed_files_become_json_with_times_in_iso(format: str, tmp_path: Path) -> None:
    reads = READERS[format.split()[0]]
    with pa.OSFile(str(written(ROWS, format, tmp_path / "a"))) as file:
        found = contents(reads(file, PLAIN, 2))
    assert [position for position, _, _ in found] == [0, 1, 2, 3, 4]
    assert json.loads(found[4][1]) == {
        "messages": [{"role": "user", "content": "hé 4"}],
        "started_at": "2025-01-02T00:00:00+00:00",
    }


AVRO = {
    "type": "record",
    "name": "Conversation",
    "fields": [
        {"name": "id", "type": "string"},
        {"name": "at", "type": ["null", {"type": "long", "logicalType": "timestamp-millis"}]},
        {
            "name": "messages",
            "type": {
                "type": "array",
                "items": {
                    "type": "record",
                    "name": "Message",
                    "fields": [{"name": "role", "type": "string"}, {"name": "content", "type": "string"}],
                },
            },
        },
    ],
}


def avro(codec: str = "deflate") -> bytes:
    stream = io.BytesIO()
    rows = [
        {"id": f"c{number}", "at": row["started_at"], "messages": row["messages"]} for number, row in enumerate(ROWS)
    ]
    fastavro.writer(stream, AVRO, rows, codec=codec, sync_interval=100)
    return stream.getvalue()


@pytest.mark.parametrize("codec", ["null", "deflate"])
def test_rows_of_an_avro_file_become_json(codec: str) -> None:
    columns = ColumnsConfig(conversation_id="id", started_at="at")
    found = contents(read_avro(io.BytesIO(avro(codec)), columns, 2))
    assert [position for position, _, _ in found] == [0, 1, 2, 3, 4]
    assert json.loads(found[4][1]) == {
        "id": "c4",
        "at": "2025-01-02T00:00:00+00:00",
        "messages": [{"role": "user", "content": "hé 4"}],
    }


@pytest.mark.fault("S13", seen="the error says what is wrong")
@pytest.mark.parametrize(
    "content", [b"", b"not avro at all", avro()[:-30], avro()[:200], avro().replace(b"array", b"arrow")]
)
def test_an_avro_file_that_cannot_be_read_says_why(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"\S"):
        list(read_avro(io.BytesIO(content), PLAIN, 2))


@pytest.mark.fault("S13", seen="a byte of the file is another one: read or refused")
@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(avro()) - 1), st.integers(0, 255))
def test_an_avro_file_with_a_wrong_byte_is_read_or_refused(place: int, byte: int) -> None:
    damaged = bytearray(avro("null"))
    damaged[place % len(damaged)] = byte
    with contextlib.suppress(ValueError):
        list(read_avro(io.BytesIO(bytes(damaged)), PLAIN, 2))


@pytest.mark.fault("S13", seen="a byte of the file is another one: read or refused")
@pytest.mark.parametrize("format", ["arrow file", "arrow stream"])
def test_an_arrow_file_whose_offsets_lead_beyond_it_is_refused_unread(format: str, tmp_path: Path) -> None:
    path = written([{"q": "first", "a": "x"}, {"q": "second", "a": "y"}], format, tmp_path / "data")
    content = bytearray(path.read_bytes())
    place = bytes(content).index(struct.pack("<3i", 0, 5, 11))
    for end in (200, 2**31 - 8):
        struct.pack_into("<i", content, place + 8, end)
        with pytest.raises((ValueError, pa.ArrowInvalid), match=r"[Oo]ffset"):
            list(read_arrow(pa.BufferReader(bytes(content)), ONE_TURN, 10))


@pytest.mark.parametrize("format", ["arrow file", "arrow stream"])
def test_of_an_arrow_file_only_the_rows_that_are_no_text_are_refused(format: str, tmp_path: Path) -> None:
    path = written([{"q": "first", "a": "x"}, {"q": "second", "a": "y"}], format, tmp_path / "data")
    content = path.read_bytes().replace(b"second", b"\xff\xfecond")
    found = [problem for piece in read_arrow(pa.BufferReader(content), ONE_TURN, 10) for problem in piece.problems]
    assert found == [None, "invalid_encoding"]


@pytest.mark.parametrize("nested", [False, True])
def test_an_arrow_file_with_arrows_own_extension_types_is_read(nested: bool, tmp_path: Path) -> None:
    tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(np.ones((2, 2, 2), np.float32))
    extra = pa.StructArray.from_arrays([tensors, pa.array(["a", "b"])], ["t", "s"]) if nested else tensors
    table = pa.table({"q": ["first", "second"], "a": ["x", "y"], "extra": extra})
    with pa.ipc.new_file(str(tmp_path / "a"), table.schema) as writer:
        writer.write_table(table)
    found = [raw for piece in read_arrow(pa.OSFile(str(tmp_path / "a")), ONE_TURN, 10) for raw in piece.raw]
    assert [json.loads(raw)["q"] for raw in found] == ["first", "second"]


class Payload:
    """Pickled, it makes a file when it is read."""

    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.marker,)


@pytest.mark.fault("S13", seen="refused, marker absent; the payload works where it is loaded")
@pytest.mark.parametrize("format", ["parquet", "arrow file", "arrow stream"])
def test_columns_of_pickled_objects_are_refused_unread(format: str, tmp_path: Path) -> None:
    import pickle

    from ray.data._internal.tensor_extensions.arrow import ArrowTensorArray  # noqa: F401 - registers Ray's types
    from ray.data.extensions.object_extension import ArrowPythonObjectArray

    marker = tmp_path / "marker"
    harmless = ArrowPythonObjectArray.from_objects([1])
    stored = pa.array([pickle.dumps(Payload(str(marker)))], harmless.type.storage_type)
    column = pa.ExtensionArray.from_storage(harmless.type, stored)
    table = pa.table({"messages": column})
    path = tmp_path / "a"
    if format == "parquet":
        pq.write_table(table, path)
    else:
        opened = pa.ipc.new_file if format == "arrow file" else pa.ipc.new_stream
        with opened(str(path), table.schema) as writer:
            writer.write_table(table)
    with pa.OSFile(str(path)) as file, pytest.raises(ValueError, match=r"column 'messages' is of extension type ray"):
        list(READERS[format.split()[0]](file, PLAIN, 9))
    assert not marker.exists()
    with pytest.raises(Exception, match=r".*"):
        column.to_pylist(), 1 / 0
    assert marker.exists(), "the payload would not have worked anyway"


@pytest.mark.fault("S13", seen="set aside by its position")
def test_an_endless_cell_is_set_aside_and_its_neighbours_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "MAX_RECORD_BYTES", 50_000)
    rows = [{"messages": "a"}, {"messages": "x" * 60_000}, {"messages": "b"}]
    with pa.OSFile(str(written(rows, "parquet", tmp_path / "a"))) as file:
        found = contents(read_parquet(file, PLAIN, 9))
    assert found == [(0, b'{"messages":"a"}', None), (1, b"", "too_long_record"), (2, b'{"messages":"b"}', None)]


@pytest.mark.fault("S13", seen="set aside by its position")
def test_a_cell_that_is_not_text_is_set_aside_and_its_neighbours_are_read(tmp_path: Path) -> None:
    rows = [{"messages": b"a"}, {"messages": b"\xff\xfe"}, {"messages": b"b"}]
    with pa.OSFile(str(written(rows, "parquet", tmp_path / "a"))) as file:
        found = contents(read_parquet(file, PLAIN, 9))
    assert [problem for _, _, problem in found] == [None, "invalid_encoding", None]


@pytest.mark.fault("S13", seen="the error names the file")
def test_a_file_cut_short_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(os.urandom(5_000))[:-20])
    settings = config(str(tmp_path / "cut.jsonl.gz"))
    (file,) = parts_of(settings, {})
    with pytest.raises(SourceError, match=r"cannot read .*cut\.jsonl\.gz as jsonl \(Truncated"):
        list(read(file, settings.ingestion.sources[0], 100))
