"""One root URI for everything Rayloop keeps: a local folder, or s3://, gs://, abfs://, hdfs://.

Layout below the root:
    tables/ catalog.db      Iceberg tables and the embedded catalog
    mlflow.db               the embedded MLflow store
    models/<model>/<run>/   model folders (weights, tokenizer, intent model, lineage.json)
    checkpoints/ search/    Ray Train and Ray Tune state
    receipts/<stage>/       what each stage run took and gave
    traffic/                exchanges and feedback
    reports/<stage>/        one folder a run: report.html, report.json
    code/                   the packaged code that deployed applications run
"""

import contextlib
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
from pyarrow import fs

from app.errors import StorageError


def resolve(uri: str) -> str:
    """Make a relative path absolute against RAYLOOP_HOME, else the current directory; URIs stay as they are.

    A submitted job runs in a copy of the code, so its current directory is not the user's.
    """
    if "://" in uri:
        return uri
    home = os.environ.get("RAYLOOP_HOME", os.getcwd())
    return os.path.normpath(os.path.join(home, os.path.expanduser(uri)))


def open_uri(uri: str) -> tuple[fs.FileSystem, str]:
    """The filesystem and the path within it of a URI or local path.

    Raises:
        StorageError: No filesystem answers to the URI's scheme.
    """
    try:
        filesystem, path = fs.FileSystem.from_uri(resolve(uri))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise StorageError(
            f"cannot open {uri!r} ({error})", "use a local path, s3://, gs://, abfs:// or hdfs://"
        ) from error
    return filesystem, path


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
        """Whether a file or folder is there."""
        return bool(self.filesystem.get_file_info(self.path(*parts)).type != fs.FileType.NotFound)

    def read(self, *parts: str) -> bytes:
        """The whole content of one file.

        Raises:
            StorageError: It is not there or cannot be read.
        """
        try:
            with self.filesystem.open_input_stream(self.path(*parts), compression=None) as stream:
                return bytes(stream.read())
        except OSError as error:
            raise StorageError(f"cannot read {self.uri(*parts)} ({error})") from error

    def write(self, content: bytes, *parts: str) -> str:
        """Write one file so that readers see all of it or none; returns its URI.

        Local files are written aside, fsynced and renamed; object stores show an object only when it is whole.
        """
        path = self.path(*parts)
        try:
            self.filesystem.create_dir(os.path.dirname(path), recursive=True)
            if not self.is_local:
                with self.filesystem.open_output_stream(path, compression=None) as stream:
                    stream.write(content)
                return self.uri(*parts)
            with tempfile.NamedTemporaryFile(dir=os.path.dirname(path), delete=False) as aside:
                aside.write(content)
                aside.flush()
                os.fsync(aside.fileno())
            os.replace(aside.name, path)
            sync_folder(os.path.dirname(path))
        except OSError as error:
            raise StorageError(f"cannot write {self.uri(*parts)} ({error})") from error
        return self.uri(*parts)

    def list(self, *parts: str) -> list[str]:
        """The names directly below a folder, sorted; empty if the folder is not there."""
        selector = fs.FileSelector(self.path(*parts), allow_not_found=True)
        return sorted(info.base_name for info in self.filesystem.get_file_info(selector))

    def upload(self, folder: Path, *parts: str) -> str:
        """Copy a local folder below the root; returns its URI. What is already there under that name goes."""
        target = self.path(*parts)
        if self.is_local:
            aside = Path(f"{target}.partial-{os.getpid()}-{time.monotonic_ns()}")
            shutil.copytree(folder, aside)
            shutil.rmtree(target, ignore_errors=True)
            os.replace(aside, target)
        else:
            fs.copy_files(str(folder), target, destination_filesystem=self.filesystem)
        return self.uri(*parts)


@contextlib.contextmanager
def local_folder(uri: str) -> Iterator[Path]:
    """A local view of the folder at `uri`: the folder itself if it is local, else a copy cached by URI.

    Raises:
        StorageError: The folder is not there.
    """
    filesystem, path = open_uri(uri)
    if filesystem.get_file_info(path).type != fs.FileType.Directory:
        raise StorageError(f"no folder at {uri}", "check the path and that its stage has run")
    if isinstance(filesystem, fs.LocalFileSystem):
        yield Path(path)
        return
    cached = Path(tempfile.gettempdir()) / "rayloop-cache" / hashlib.sha256(uri.encode()).hexdigest()[:16]
    if not cached.is_dir():
        partial = Path(f"{cached}.partial-{os.getpid()}")
        partial.mkdir(parents=True, exist_ok=True)
        fs.copy_files(path, str(partial), source_filesystem=filesystem)
        os.replace(partial, cached)
    yield cached


def sync_folder(folder: str) -> None:
    """Make a rename or a new file in a local folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
