"""Where conversations come from: the files behind `ingestion.sources`, their state, and reading them in pieces.

A record is read as it stands, as bytes with a file and a position, so that one that turns out to be bad can be
set aside with the place it came from. A file that cannot be read as a whole stops the stage.

Positions count records from 0: lines of JSONL that are not blank, rows of CSV after the header, rows of Parquet.
"""

import fnmatch
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from pyarrow import fs

from app.config import Config, IngestionConfig, SampleConfig, SourceConfig
from app.errors import SourceError, StorageError
from app.ingestion.formats import READERS, Piece
from app.storage import open_uri, resolve
from app.versions import APP, digest

if TYPE_CHECKING:
    from ray.data import Dataset

RAW = pa.schema(
    [
        ("file", pa.int32()),  # index in the list of files
        ("position", pa.int64()),  # of the record in the file, from 0
        ("raw", pa.binary()),  # the record: a JSON line, or a row as one
        ("problem", pa.string()),  # why the reader could not make a record of it
        ("identified", pa.bool_()),  # whether records of this file carry their own id
    ]
)
SUFFIXES = {
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "csv": (".csv",),
    "parquet": (".parquet", ".pq"),
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
SAMPLE_RECORD_BYTES = 800  # about 760 in 5,000 records


@dataclass(frozen=True)
class SourceFile:
    """One file of a source, or the whole embedded shop."""

    uri: str
    path: str
    source: int
    """Index in `ingestion.sources`."""
    size: int
    modified_ns: int

    @property
    def compression(self) -> str | None:
        """By the name's ending."""
        return next((codec for suffix, codec in COMPRESSIONS.items() if self.path.endswith(suffix)), None)


def files_of(ingestion: IngestionConfig) -> list[SourceFile]:
    """Every file of every source: sources in their order, files by path.

    Raises:
        SourceError: A source has no file or does not answer.
    """
    return [file for index, source in enumerate(ingestion.sources) for file in _files(source, index, ingestion.sample)]


def state(config: Config) -> list[dict[str, Any]]:
    """What would be read, one entry a source: it changes when the content of the source may have.

    Raises:
        SourceError: A source has no file or does not answer.
    """
    ingestion = config.ingestion
    entries: list[dict[str, Any]] = []
    for index, source in enumerate(ingestion.sources):
        files = _files(source, index, ingestion.sample)
        content: list[Any] = [[file.uri, file.size, file.modified_ns] for file in files]
        if source.format == "sample":
            content = [ingestion.sample.model_dump(), sample_code()]
        size = sum(file.size for file in files)
        entries.append({"uri": source.uri, "files": len(files), "bytes": size, "digest": digest(content)})
    return entries


def sample_code() -> str:
    """Digest of what the embedded shop's records are made by."""
    return digest([module.read_text() for module in sorted((APP / "ingestion").glob("sample*.py"))])


def read(ingestion: IngestionConfig, files: Sequence[SourceFile]) -> "Dataset":
    """All records of the files as a streaming dataset of `RAW` rows."""
    import ray.data

    from app.ingestion.datasource import RawRecords

    tasks = [task for index, file in enumerate(files) for task in _tasks(ingestion, index, file)]
    # Half a CPU: reading waits on disks and networks, and a reservation that differs keeps Ray Data from
    # fusing it with the parsing, which would tie the parsing of one large file to one task.
    records: Dataset = ray.data.read_datasource(RawRecords(tasks), num_cpus=0.5, override_num_blocks=len(tasks))
    return records


def _tasks(ingestion: IngestionConfig, index: int, file: SourceFile) -> Iterator[tuple[Callable[[], Any], int]]:
    """What to call to read the file, in as many parts as it has, and about how many bytes each gives."""
    source = ingestion.sources[file.source]
    if source.format != "sample":
        yield partial(_blocks, index, file, source, ingestion.batch_rows), file.size
        return
    total = ingestion.sample.conversations
    step = max(ingestion.batch_rows, -(-total // 1_000))
    for start in range(0, total, step):
        stop = min(total, start + step)
        yield (
            partial(_sample_block, index, ingestion.sample, start, stop),
            (stop - start) * SAMPLE_RECORD_BYTES,
        )


def _blocks(index: int, file: SourceFile, source: SourceConfig, batch_rows: int) -> Iterator[pa.Table]:
    """The records of one file.

    Raises:
        SourceError: The file is gone or cannot be read to its end.
    """
    filesystem = _open(source)[0]
    try:
        with filesystem.open_input_file(file.path) as whole:
            stream = pa.CompressedInputStream(whole, file.compression) if file.compression else whole
            for piece in READERS[source.format](stream, source.columns, batch_rows):
                yield _block(index, piece)
    except (OSError, EOFError, pa.ArrowException, ValueError) as error:
        raise SourceError(
            f"cannot read {file.uri} as {source.format} ({_first_line(error)})",
            "the file is missing, cut short or in another format: replace it or correct ingestion.sources",
        ) from None


def _block(index: int, piece: Piece) -> pa.Table:
    count = len(piece.raw)
    positions = range(piece.start, piece.start + count)
    columns = [[index] * count, positions, piece.raw, piece.problems, [piece.identified] * count]
    return pa.table([pa.array(column, field.type) for column, field in zip(columns, RAW, strict=True)], schema=RAW)


def _sample_block(index: int, settings: SampleConfig, start: int, stop: int) -> list[pa.Table]:
    from app.ingestion import sample

    lines = list(sample.lines(settings.seed, start, stop, settings.defect_fraction))
    return [_block(index, Piece(start, lines, [None] * len(lines), identified=True))]


def _files(source: SourceConfig, index: int, settings: SampleConfig) -> list[SourceFile]:
    if source.format == "sample":
        return [SourceFile(source.uri, "", index, settings.conversations * SAMPLE_RECORD_BYTES, 0)]
    try:
        filesystem, base, pattern, uri = _open(source)
        found = _listed(filesystem, base, pattern, source)
    except (StorageError, OSError) as error:
        raise SourceError(f"cannot reach {source.uri!r} ({_first_line(error)})", "check ingestion.sources") from error
    return [
        SourceFile(uri + info.path.removeprefix(base), info.path, index, info.size, info.mtime_ns or 0)
        for info in sorted(found, key=lambda info: str(info.path))
    ]


def _open(source: SourceConfig) -> tuple[fs.FileSystem, str, str | None, str]:
    """The filesystem, the path to start from, the glob below it if there is one, and the URI of that path."""
    uri = resolve(source.uri).rstrip("/")
    remote = "://" in uri
    wildcard = re.search(r"[*\[]" if remote else r"[*?\[]", uri)
    # The name of a local file may hold a bracket or a star of its own.
    if wildcard is None or (not remote and os.path.exists(uri)):
        return (*open_uri(uri), None, uri.split("?")[0] if remote else uri)
    base = uri[: uri.rfind("/", 0, wildcard.start())] or "/"
    return (*open_uri(base), uri.removeprefix(base).lstrip("/"), base.rstrip("/"))


def _listed(filesystem: fs.FileSystem, base: str, pattern: str | None, source: SourceConfig) -> list[fs.FileInfo]:
    info = filesystem.get_file_info(base)
    if info.type == fs.FileType.NotFound:
        raise SourceError(f"source {source.uri!r} does not exist", "check ingestion.sources, or fetch the data")
    if info.type == fs.FileType.File:
        return [info]
    below = filesystem.get_file_info(fs.FileSelector(base, recursive=True))
    files = [entry for entry in below if entry.type == fs.FileType.File]
    if pattern is None:
        chosen = [entry for entry in files if _belongs(entry.path.removeprefix(base), source.format)]
        hint = f"its files must end in {', '.join(SUFFIXES[source.format])} (.gz, .zst)"
    else:
        matches = re.compile(glob_expression(pattern)).fullmatch
        chosen = [entry for entry in files if matches(entry.path.removeprefix(base).lstrip("/"))]
        hint = "nothing matches the pattern"
    if not chosen:
        raise SourceError(f"source {source.uri!r} holds no {source.format} file: {hint}", "check ingestion.sources")
    return chosen


def _belongs(path: str, written_as: str) -> bool:
    """Whether a file below a folder is one of the format's; hidden and marker files (_SUCCESS) are not."""
    if any(part.startswith((".", "_")) for part in path.split("/")):
        return False
    for suffix in COMPRESSIONS:
        path = path.removesuffix(suffix)
    return path.endswith(SUFFIXES[written_as])


def glob_expression(pattern: str) -> str:
    """The regular expression of a glob in which `*` and `?` stay within a folder and `**/` crosses any number."""
    out = ""
    for part in re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", pattern):
        if part in ("**/", "**"):
            out += "(?:[^/]+/)*" if part == "**/" else ".*"
        elif part in ("*", "?"):
            out += "[^/]*" if part == "*" else "[^/]"
        elif part.startswith("["):
            out += fnmatch.translate(part)[len("(?s:") : -len(")\\Z")]
        else:
            out += re.escape(part)
    return out


def _first_line(error: Exception) -> str:
    # Only what a library says of the file: a record's text could be personal.
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
