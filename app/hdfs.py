"""HDFS as a pyarrow filesystem, through a client that needs no JVM."""

import contextlib
import io
import time
from collections.abc import Iterator
from typing import Any

import hdfs_native.fsspec
from pyarrow import fs

WAITS_S = (0.2, 1.0, 3.0)
"""Between tries to read: the client gives a block up at the first error of its only DataNode, which may be no more
than a kept connection that the DataNode has closed meanwhile (hdfs-native 0.14)."""

FAILOVER = {
    "dfs.client.failover.max.attempts": "6",
    "dfs.client.failover.sleep.base.millis": "500",
    "dfs.client.failover.sleep.max.millis": "5000",
}
"""How NameNodes are asked: without it one that is away is asked for three minutes."""


class _Hdfs(hdfs_native.fsspec.HdfsFileSystem):
    """With times as pyarrow looks for them, OSError where something fails, and moves that replace."""

    cachable = False  # a client of a NameNode that was restarted is of no use

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.client: Any = _Client(self.client)

    def _convert_file_status(self, file_status: Any) -> dict[str, Any]:
        status: dict[str, Any] = super()._convert_file_status(file_status)
        return status | {"mtime": file_status.modification_time / 1_000}

    def ls(self, path: str, detail: bool = True, **settings: Any) -> list[Any]:
        with _failing(path):
            found: list[Any] = super().ls(path, detail, **settings)
        return found

    def mv(self, path1: str, path2: str, **settings: Any) -> None:
        super().mv(path1, path2, overwrite=True)

    def _open(self, path: str, mode: str = "rb", *arguments: Any, **settings: Any) -> Any:
        file: Any = super()._open(path, mode)
        return _Reader(self.client, path, file) if mode == "rb" else _Writer(path, file)


class _Client:
    """The client of hdfs-native, whose failures are RuntimeErrors."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)

        def call(*arguments: Any, **settings: Any) -> Any:
            with _failing(str(arguments[0]) if arguments else name):
                return method(*arguments, **settings)

        return call


class _Reader(io.RawIOBase):
    """A file that is read on where a DataNode failed, a few times."""

    def __init__(self, client: _Client, path: str, file: Any) -> None:
        self._client, self._path = client, path
        self._file: Any = file
        self._size = len(file)
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._size - self._at)
        content = self._tried(left if size is None or size < 0 else min(size, left))
        self._at += len(content)
        return content

    def _tried(self, size: int) -> bytes:
        for wait_s in WAITS_S:
            with contextlib.suppress(OSError):
                return self._once(size)
            self._file = None
            time.sleep(wait_s)
        return self._once(size)

    def _once(self, size: int) -> bytes:
        if self._file is None:
            self._file = self._client.read(self._path)  # where the blocks are now
        with _failing(self._path):
            self._file.seek(self._at)
            return bytes(self._file.read(size))


class _Writer(io.RawIOBase):
    def __init__(self, path: str, file: Any) -> None:
        self._path, self._file = path, file

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        with _failing(self._path):
            return int(self._file.write(content))

    def close(self) -> None:
        if not self.closed:
            with _failing(self._path):
                self._file.close()
        super().close()


@contextlib.contextmanager
def _failing(path: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise OSError(f"HDFS failed at {path}: {str(error)[:150]}") from None


def filesystem(authority: str, silence_s: float) -> fs.PyFileSystem:
    """The filesystem of a NameNode or name service; without one, of `fs.defaultFS` under HADOOP_CONF_DIR.

    Args:
        authority: host:port, or a name.
        silence_s: How long a server may keep silent.
    """
    host, _, port = authority.partition(":")
    settings = {"dfs.client.socket-timeout": str(int(silence_s * 1_000)), **FAILOVER}
    return fs.PyFileSystem(fs.FSSpecHandler(_Hdfs(host or None, int(port) if port else None, **settings)))
