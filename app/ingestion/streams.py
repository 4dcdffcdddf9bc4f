"""The bytes of a file, local or on a store: read in large pieces, and known to be all of them."""

import contextlib
import io
import os
import stat
from collections.abc import Iterator

import pyarrow as pa
from pyarrow import fs

from app.errors import SourceError, SourceUnavailable
from app.filesystems import Whole

FETCH_BYTES = 8 << 20
"""What is asked of a store at a time: CSV is parsed 8 KB at a time, and each request takes milliseconds."""


@contextlib.contextmanager
def opened(
    filesystem: fs.FileSystem, path: str, uri: str, compression: str | None, in_order: bool
) -> Iterator[pa.NativeFile]:
    """The file's content, unpacked.

    Args:
        filesystem: Where it is.
        path: Its name there.
        uri: What errors call it.
        compression: gzip, zstd or none.
        in_order: Whether it is read from its beginning, or the beginning of a part, onwards.

    Raises:
        SourceError: It is no file, or the store holds less of it than it says.
        SourceUnavailable: The store stopped answering.
    """
    local = isinstance(filesystem, fs.LocalFileSystem)
    if local and os.path.exists(path) and not stat.S_ISREG(os.stat(path).st_mode):
        raise SourceError(f"{uri} is no file but a device, pipe or socket", "name a file in ingestion.sources")
    with contextlib.nullcontext() if local else answering(uri):
        file = filesystem.open_input_file(path)
    with file:
        if local:
            yield _unpacked(file, compression)
        else:
            whole = _Whole(file, uri)
            content = io.BufferedReader(whole, FETCH_BYTES) if in_order else whole
            yield _unpacked(pa.PythonFile(content, mode="r"), compression)


def _unpacked(file: pa.NativeFile, compression: str | None) -> pa.NativeFile:
    return pa.CompressedInputStream(file, compression) if compression else file


class _Whole(Whole):
    """A file of a store, which ends where the store says that it ends, or with an error."""

    def __init__(self, file: pa.NativeFile, uri: str) -> None:
        super().__init__(file)
        self._uri = uri

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        with answering(self._uri):
            return super().readinto(buffer)


@contextlib.contextmanager
def answering(uri: str) -> Iterator[None]:
    """What becomes of a store's errors.

    Raises:
        SourceUnavailable: It does not answer, or not to the end.
    """
    try:
        yield
    except (FileNotFoundError, PermissionError, io.UnsupportedOperation):
        raise
    except OSError as error:
        raise SourceUnavailable(f"the store behind {uri} failed ({first_line(error)})", "try again") from None


def first_line(error: Exception) -> str:
    """What a library says of an error, in one line."""
    # Only what a library says of the file: a record's text could be personal.
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
