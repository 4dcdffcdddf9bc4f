"""One root URI for everything Rayloop keeps: a local folder, or s3://, gs://, abfs://, hdfs://.

Layout below the root:
    tables/ catalog.db      Iceberg tables and the embedded catalog
    mlflow.db               the embedded MLflow store
    models/<model>/<run>/   model folders (weights, tokenizer, intent model, lineage.json)
    checkpoints/ search/    Ray Train and Ray Tune state
    receipts/<stage>/       what each stage run took and gave
    traffic/                exchanges and feedback
    ingested/ staging/      how far sources were read; blocks of ingests that run or were killed
    packed/                 blocks of tokens, by table version
    exports/ exported/      exports without a folder of their own; notes of all
    forgetting/             files that are to go, while they go
    reports/<stage>/        one folder a run: report.html, report.json
    code/                   the packaged code that deployed applications run
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from pyarrow import fs

from app.errors import StorageError
from app.filesystems import fill, is_object_store
from app.filesystems import open_uri as open_uri
from app.filesystems import resolve as resolve

STAGING, INGESTED = "staging", "ingested"
"""Folders that ingests write beside the tables: blocks on their way, and how far sources were read."""
UNUSED_S = 7 * 86_400
"""After so long a node forgets copies that nobody asks for."""
PACKED, PACKED_MANIFEST = "packed", "packed.json"
"""The folder of tokens made of table versions, and what says in each of which version."""


class Storage:
    """Files below one root URI; cheap to make, safe to pickle."""

    def __init__(self, root_uri: str) -> None:
        self.root_uri = resolve(root_uri).rstrip("/")
        self.filesystem, self.root_path = open_uri(self.root_uri)

    def __reduce__(self) -> tuple[type["Storage"], tuple[str]]:
        return Storage, (self.root_uri,)

    @property
    def is_local(self) -> bool:
        """Whether files can be appended to, fsynced and renamed."""
        return isinstance(self.filesystem, fs.LocalFileSystem)

    def uri(self, *parts: str) -> str:
        """The URI of something below the root, as it is written into versions and lineage."""
        return "/".join([self.root_uri, *parts])

    def path(self, *parts: str) -> str:
        """The path of something below the root, as `filesystem` takes it."""
        return "/".join([self.root_path, *parts])

    def exists(self, *parts: str) -> bool:
        """Whether a file or folder is there.

        Raises:
            StorageError: The store does not answer.
        """
        try:
            return bool(self.filesystem.get_file_info(self.path(*parts)).type != fs.FileType.NotFound)
        except OSError as error:
            raise StorageError(f"cannot look for {self.uri(*parts)} ({error})") from error

    def read(self, *parts: str) -> bytes:
        """The whole content of one file.

        Raises:
            StorageError: It is not there or cannot be read to its end.
        """
        try:
            with self.filesystem.open_input_file(self.path(*parts)) as file:
                content = bytearray(file.size())
                fill(file, memoryview(content))
                return bytes(content)
        except OSError as error:
            raise StorageError(f"cannot read {self.uri(*parts)} ({error})") from error

    def write(self, content: bytes, *parts: str) -> str:
        """Write one file so that readers see all of it or none; returns its URI.

        Files are written aside and renamed, local ones fsynced; object stores show an object only when it is whole.

        Raises:
            StorageError: It cannot be written.
        """
        path = self.path(*parts)
        try:
            if not self.is_local:
                self._write_remote(content, path)
                return self.uri(*parts)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=os.path.dirname(path), delete=False) as aside:
                aside.write(content)
                aside.flush()
                os.fsync(aside.fileno())
            os.replace(aside.name, path)
            sync_folder(os.path.dirname(path))
        except OSError as error:
            raise StorageError(f"cannot write {self.uri(*parts)} ({error})") from error
        return self.uri(*parts)

    def _write_remote(self, content: bytes, path: str) -> None:
        aside = path if is_object_store(self.filesystem) else f"{path}.{_unique()}"
        if aside != path:
            self.filesystem.create_dir(os.path.dirname(path), recursive=True)
        with self.filesystem.open_output_stream(aside, compression=None) as stream:
            stream.write(content)
        if aside != path:
            self.filesystem.move(aside, path)

    def list(self, *parts: str) -> list[str]:
        """The names directly below a folder, sorted; empty if the folder is not there.

        Raises:
            StorageError: The store does not answer.
        """
        folder = self.path(*parts)
        # Google's store names only what is below a folder, unless the folder was made as an object of its own.
        recursive = isinstance(self.filesystem, fs.GcsFileSystem)
        selector = fs.FileSelector(folder, allow_not_found=True, recursive=recursive)
        try:
            infos = self.filesystem.get_file_info(selector)
            return sorted({info.path.removeprefix(folder).lstrip("/").partition("/")[0] for info in infos})
        except OSError as error:
            raise StorageError(f"cannot list {self.uri(*parts)} ({error})") from error

    def files(self, *parts: str) -> Sequence[fs.FileInfo]:
        """All files below a folder, at any depth; none if it is not there.

        Raises:
            StorageError: The store does not answer.
        """
        selector = fs.FileSelector(self.path(*parts), recursive=True, allow_not_found=True)
        try:
            return [file for file in self.filesystem.get_file_info(selector) if file.type == fs.FileType.File]
        except OSError as error:
            raise StorageError(f"cannot list {self.uri(*parts)} ({error})") from error

    def upload(self, folder: Path, *parts: str) -> str:
        """Copy a local folder below the root; returns its URI. What is already there under that name goes.

        Raises:
            StorageError: It cannot be written.
        """
        target = self.path(*parts)
        if self.is_local:
            aside = Path(f"{target}.{_unique()}")
            try:
                shutil.copytree(folder, aside)
                shutil.rmtree(target, ignore_errors=True)
                os.replace(aside, target)
            except OSError as error:  # shutil's own are
                shutil.rmtree(aside, ignore_errors=True)
                raise StorageError(
                    f"cannot write {self.uri(*parts)} ({error})", "free some space or check permissions"
                ) from error
            return self.uri(*parts)
        try:
            if self.exists(*parts):
                self.filesystem.delete_dir(target)
            fs.copy_files(str(folder), target, destination_filesystem=self.filesystem)
        except OSError as error:
            raise StorageError(f"cannot write {self.uri(*parts)} ({error})") from error
        return self.uri(*parts)

    def remove(self, *parts: str) -> None:
        """Remove a folder and all below it; one that is not there is none.

        Raises:
            StorageError: It cannot be removed.
        """
        try:
            if self.exists(*parts):
                self.filesystem.delete_dir(self.path(*parts))
        except OSError as error:
            raise StorageError(f"cannot remove {self.uri(*parts)} ({error})") from error

    @contextlib.contextmanager
    def alone(self, *parts: str) -> Iterator[None]:
        """While this is open, no other process of this machine is in the same place. Only local roots have such locks.

        Args:
            parts: Of a file that stands for the place; it stays.

        Raises:
            StorageError: The file cannot be made.
        """
        if not self.is_local:
            yield
            return
        path = self.path(*parts)
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise StorageError(f"cannot write {self.uri(*parts)} ({error})") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def remove_file(self, *parts: str) -> None:
        """Remove a file that is there.

        Raises:
            StorageError: It cannot be removed.
        """
        try:
            self.filesystem.delete_file(self.path(*parts))
        except OSError as error:
            raise StorageError(f"cannot remove {self.uri(*parts)} ({error})") from error

    def add(self, folder: Path, *parts: str) -> str:
        """Copy the files of a local folder into one below the root, to what is there already; returns its URI.

        Raises:
            StorageError: They cannot be written. As far as the store lets them be removed none of them is left, nor a
                file that had the name of one; what else is there stays.
        """
        target = self.path(*parts)
        files = [file.relative_to(folder) for file in folder.rglob("*") if file.is_file()]
        try:
            self.filesystem.create_dir(target, recursive=True)
            fs.copy_files(str(folder), target, destination_filesystem=self.filesystem)
            if self.is_local:
                _sync(Path(target), files)
        except OSError as error:
            for file in files:
                with contextlib.suppress(OSError):  # one that was not written
                    self.filesystem.delete_file(f"{target}/{file}")
            raise StorageError(f"cannot write {self.uri(*parts)} ({error})") from error
        return self.uri(*parts)


def _sync(folder: Path, files: Iterable[Path]) -> None:
    """Make copied files survive a power cut."""
    written = [folder / file for file in files]
    for file in written:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    for parent in {file.parent for file in written}:
        sync_folder(str(parent))


def _unique() -> str:
    return f"partial-{os.getpid()}-{time.monotonic_ns()}"


@contextlib.contextmanager
def local_folder(uri: str) -> Iterator[Path]:
    """A local view of the folder at `uri`: the folder itself if it is local, else a copy, cached until it changes.

    Raises:
        StorageError: The folder is not there, or cannot be copied.
    """
    filesystem, path = open_uri(uri)
    try:
        if filesystem.get_file_info(path).type != fs.FileType.Directory:
            raise StorageError(f"no folder at {uri}", "check the path and that its stage has run")
        copied = Path(path) if isinstance(filesystem, fs.LocalFileSystem) else _copied(filesystem, path, uri)
    except OSError as error:
        raise StorageError(f"cannot read {uri} ({error})") from error
    yield copied


def _copied(filesystem: fs.FileSystem, path: str, uri: str) -> Path:
    infos = filesystem.get_file_info(fs.FileSelector(path, recursive=True))
    state = sorted((info.path, info.size, info.mtime_ns) for info in infos if info.type == fs.FileType.File)
    name = hashlib.sha256(repr((uri, state)).encode()).hexdigest()[:16]
    cached = node_cache() / name
    if cached.is_dir():
        os.utime(cached)
        return cached
    for other in cached.parent.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process has renamed or removed it
            if not other.name.startswith("blocks-") and time.time() - other.stat().st_mtime > UNUSED_S:
                shutil.rmtree(other, ignore_errors=True)  # one that still maps it keeps it
    partial = cached.with_name(f"{name}.{_unique()}")
    partial.mkdir()
    fs.copy_files(path, str(partial), source_filesystem=filesystem)
    for file, size, _ in state:
        copy = partial / file.removeprefix(path).lstrip("/")
        if copy.stat().st_size != size:
            raise StorageError(
                f"{uri} was cut short: {copy.name} has {copy.stat().st_size} of {size} bytes", "try again"
            )
    with contextlib.suppress(OSError):  # another process was faster
        os.replace(partial, cached)
    return cached


def node_cache() -> Path:
    """This user's folder on this node's disk for copies of what lies elsewhere; nobody else may enter it.

    Raises:
        StorageError: Somebody else has put another one in its place.
    """
    folder = Path(tempfile.gettempdir()) / f"rayloop-cache-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if found.st_uid != os.getuid() or not stat.S_ISDIR(found.st_mode) or found.st_mode & 0o077:
        raise StorageError(f"{folder} is not this user's alone", "remove it, or set TMPDIR to another folder")
    return folder


def sync_folder(folder: str) -> None:
    """Make a rename or a new file in a local folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
