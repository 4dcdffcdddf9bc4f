"""Files behind a source: found by path, folder or glob on any filesystem, and read in pieces."""

import contextlib
import fnmatch
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

import pyarrow as pa
from pyarrow import fs

from app.errors import SourceError, SourceUnavailable, StorageError
from app.ingestion.formats import LINES, READERS, Piece, Span
from app.ingestion.parts import Read
from app.ingestion.streams import answering, first_line, opened
from app.settings.ingestion import IngestionConfig, SourceConfig
from app.storage import open_uri, resolve

logger = logging.getLogger(__name__)

SUFFIXES = {
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "csv": (".csv",),
    "parquet": (".parquet", ".pq"),
    "arrow": (".arrow", ".feather", ".ipc"),
    "avro": (".avro",),
    "text": (".txt",),
}
RANDOM_ACCESS = ("parquet", "arrow")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
SPAN_BYTES = 64 << 20
"""Of a large file of lines a task reads so much."""
GROWTH = 5
"""How many times larger a compressed file is taken to be when it is unpacked."""


@dataclass(frozen=True)
class FilePart:
    """One file."""

    uri: str
    path: str
    source: int
    stored_bytes: int
    modified_ns: int

    @property
    def compression(self) -> str | None:
        """By the name's ending."""
        return next((codec for suffix, codec in COMPRESSIONS.items() if self.path.endswith(suffix)), None)

    @property
    def size_bytes(self) -> int:
        """About how much there is to read, unpacked."""
        return self.stored_bytes * (GROWTH if self.compression else 1)

    @property
    def arrived_at(self) -> datetime | None:
        """When it was modified."""
        return datetime.fromtimestamp(self.modified_ns / 1e9, UTC) if self.modified_ns else None

    @property
    def mark(self) -> tuple[str, Any]:
        """A file is another one when its size or time is."""
        return f"file:{self.uri}", [self.stored_bytes, self.modified_ns]

    def reads(self, ingestion: IngestionConfig) -> Iterator[tuple[Read, int]]:
        """One task a file; several where lines can be begun at anywhere."""
        source = ingestion.sources[self.source]
        begun = partial(read, self, source, ingestion.batch_rows, is_patient=ingestion.follow.enabled)
        if source.format not in LINES or self.compression is not None:
            yield begun, self.size_bytes
            return
        for start in range(0, max(1, self.stored_bytes), SPAN_BYTES):
            stop = min(start + SPAN_BYTES, self.stored_bytes)
            yield partial(begun, span=Span(start, stop)), stop - start


def read(
    file: FilePart, source: SourceConfig, batch_rows: int, span: Span | None = None, is_patient: bool = False
) -> Iterator[Piece]:  # fmt: skip
    """The records of one file, or of a part of one.

    Raises:
        SourceError: The file is gone or cannot be read to its end.
        SourceUnavailable: Its store stopped answering. Where `is_patient`, also instead of SourceError: the file may
            have been moved, or is still being written.
    """
    filesystem = _open(source)[0]
    in_order = source.format not in RANDOM_ACCESS
    try:
        with opened(filesystem, file.path, file.uri, file.compression, in_order) as stream:
            if span is not None:
                yield from LINES[source.format](stream, source.columns, batch_rows, span)
            else:
                yield from READERS[source.format](stream, source.columns, batch_rows)
    except (OSError, EOFError, pa.ArrowException, ValueError) as error:
        raise (SourceUnavailable if is_patient else SourceError)(
            f"cannot read {file.uri} as {source.format} ({first_line(error)})",
            "the file is missing, cut short, in another format or has other columns: replace it or correct "
            "ingestion.sources",
        ) from None


def parts(source: SourceConfig, index: int, may_be_none: bool = False) -> list[FilePart]:
    """Every file of a source, by path.

    Raises:
        SourceError: There is none, unless there may be, or the source is not where sources may be.
        SourceUnavailable: Its store does not answer.
    """
    try:
        filesystem, base, pattern, uri = _open(source)
        with contextlib.nullcontext() if isinstance(filesystem, fs.LocalFileSystem) else answering(source.uri):
            found = _listed(filesystem, base, pattern, source, may_be_none)
    except StorageError as error:
        raise SourceError(error.what, error.remedy) from None
    except OSError as error:
        raise SourceError(f"cannot reach {source.uri!r} ({first_line(error)})", "check ingestion.sources") from error
    return [
        FilePart(_below(uri, info.path.removeprefix(base)), info.path, index, info.size, info.mtime_ns or 0)
        for info in sorted(found, key=lambda info: str(info.path))
    ]


def _below(uri: str, path: str) -> str:
    return f"{uri}/{path.lstrip('/')}" if path else uri


def _open(source: SourceConfig) -> tuple[fs.FileSystem, str, str | None, str]:
    """The filesystem, the path to start from, the glob below it if there is one, and the URI of that path."""
    uri = resolve(source.uri).rstrip("/")
    if re.search(r"^(?!file)\w+://.*\?\w+=", uri):
        open_uri(uri)  # options: refused
    wildcard = re.search(r"[*?\[]", uri)
    # The name of a local file may hold a bracket or a star of its own.
    if wildcard is None or os.path.exists(uri.removeprefix("file://")):
        return (*open_uri(uri), None, uri)
    base = uri[: uri.rfind("/", 0, wildcard.start())] or "/"
    if base.endswith(":/"):
        raise StorageError(f"{uri!r} names no bucket", "a pattern may stand behind the bucket")
    return (*open_uri(base), uri.removeprefix(base).lstrip("/"), base.rstrip("/"))


def _listed(
    filesystem: fs.FileSystem, base: str, pattern: str | None, source: SourceConfig, may_be_none: bool
) -> list[fs.FileInfo]:  # fmt: skip
    info = filesystem.get_file_info(base)
    if info.type == fs.FileType.NotFound:
        raise SourceError(f"source {source.uri!r} does not exist", "check ingestion.sources, or fetch the data")
    if info.type == fs.FileType.Unknown:
        raise SourceError(f"source {source.uri!r} is a device, pipe or socket", "name a file or a folder")
    if info.type == fs.FileType.File:
        return [info]
    local = isinstance(filesystem, fs.LocalFileSystem)
    files = _local_files(base) if local else _remote_files(filesystem, base)
    if pattern is None:
        chosen = [path for path in files if _belongs(path.removeprefix(base), source.format)]
        hint = f"its files must end in {', '.join(SUFFIXES[source.format])} (.gz, .zst)"
    else:
        named = re.compile(f"{glob_expression(pattern)}(?P<below>/.+)?")
        chosen = [path for path in files if _matches(named, path.removeprefix(base).lstrip("/"), source.format)]
        hint = "nothing matches the pattern"
    found = [files[path] or filesystem.get_file_info(path) for path in chosen if not local or _is_inside(path, base)]
    if not found and not may_be_none:
        raise SourceError(f"source {source.uri!r} holds no {source.format} file: {hint}", "check ingestion.sources")
    return found


def _remote_files(filesystem: fs.FileSystem, base: str) -> dict[str, fs.FileInfo | None]:
    below = filesystem.get_file_info(fs.FileSelector(base, recursive=True))
    return {info.path: info for info in below if info.type == fs.FileType.File}


def _local_files(base: str) -> dict[str, fs.FileInfo | None]:
    """All that is no folder; links to folders are not followed."""

    def refused(error: OSError) -> None:
        raise error

    return {os.path.join(folder, name): None for folder, _, names in os.walk(base, onerror=refused) for name in names}


def _is_inside(path: str, base: str) -> bool:
    """Whether it is a file that lies below the folder: what a link leads to elsewhere, devices and pipes are not."""
    target = os.path.realpath(path)
    if not target.startswith(os.path.join(os.path.realpath(base), "")):
        logger.warning("%s is a link out of %s: it is not followed", path, base)
        return False
    if not os.path.isfile(target):
        logger.warning("%s is no file: it is not opened", path)
        return False
    return True


def _belongs(path: str, written_as: str) -> bool:
    """Whether a file below a folder is one of the format's; hidden and marker files (_SUCCESS) are not."""
    if any(part.startswith((".", "_")) for part in path.split("/")):
        return False
    for suffix in COMPRESSIONS:
        path = path.removesuffix(suffix)
    return path.endswith(SUFFIXES[written_as])


def _matches(named: re.Pattern[str], path: str, written_as: str) -> bool:
    """Whether a pattern names a file, or a folder that it is one of the format's files `below`.

    A pattern takes as much of a path as it can, so what it names itself has nothing below.
    """
    found = named.fullmatch(path)
    return found is not None and (found["below"] is None or _belongs(found["below"].lstrip("/"), written_as))


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
