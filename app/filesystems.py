"""The filesystem behind a URI. Addresses and secrets of stores come from the environment, never from the URI.

    folder/x, /folder/x, file:///folder/x    local; a relative path is below RAYLOOP_HOME, else the current directory
    s3://bucket/x                            AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, or what else
                                             the AWS SDK finds; AWS_REGION; AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL
                                             for MinIO and the like
    gs://bucket/x                            GOOGLE_APPLICATION_CREDENTIALS, or the machine's own account;
                                             RAYLOOP_GCS_ENDPOINT for another address; STORAGE_EMULATOR_HOST for an
                                             emulator, which is asked without credentials
    abfs://container/x                       AZURE_STORAGE_ACCOUNT with AZURE_STORAGE_KEY or AZURE_STORAGE_SAS_TOKEN,
    abfs://container@account.../x            or what Azure's default credential finds (AZURE_CLIENT_ID, ...);
                                             RAYLOOP_AZURE_ENDPOINT for another address
    hdfs://host:port/x, hdfs:///x            HADOOP_CONF_DIR, HADOOP_USER_NAME, Kerberos' ticket; extra `hdfs`

http:// and ftp:// addresses are not stores: nothing here fetches from wherever a URI points to. The S3 client follows
redirects, which pyarrow 25 has no switch for, so an endpoint has to be one that is trusted.

A store that does not answer is asked again a few times and then given up: one that refuses connections within a
minute, one that keeps silent within two (S3, Google, HDFS) or four (Azure).
"""

import io
import os
import re
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pyarrow as pa
from pyarrow import fs

from app.errors import StorageError

CONNECT_S = 5.0
SILENCE_S = 10.0
"""How long a store may keep silent within one request."""
TRIES = 6
"""How often S3 is asked; waits between them double from at most 1 s: 15 s on average, 31 s at most."""
GCS_RETRY_S = 30
UNREAD = 0xFF
"""No byte of a text."""
AZURE_HOSTS = (".dfs.core.windows.net", ".blob.core.windows.net")
REMEDY = "use a local path, s3://, gs://, abfs:// or hdfs://"


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

    No connection is made for this alone, but to Amazon for a bucket's region where AWS_REGION is not set.

    Raises:
        StorageError: The scheme is none of ours, or the URI holds credentials, options or a way out of its folder.
    """
    uri = resolve(uri)
    if "://" not in uri:
        return fs.LocalFileSystem(), uri
    place = _place(uri)
    try:
        return OPENERS[place.scheme](place)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise StorageError(f"cannot open {uri!r} ({error})", REMEDY) from error


def is_object_store(filesystem: fs.FileSystem) -> bool:
    """Whether what is written is seen only when it is whole; such a store has no folders and no renames."""
    return isinstance(filesystem, fs.S3FileSystem | fs.GcsFileSystem | fs.AzureFileSystem)


def fill(file: pa.NativeFile, buffer: memoryview) -> int:
    """Read on into the buffer; returns how many bytes were to be had: all of it, unless the file ends.

    Raises:
        OSError: The store fails, or gives less than it says that there is.
    """
    before: int = file.tell()
    wanted: int = min(len(buffer), file.size() - before)
    if wanted <= 0:
        return 0
    # pyarrow 25 takes an answer of S3 that is too short for a whole one, and leaves the end of the buffer as it was.
    buffer[wanted - 1] = UNREAD
    got = int(file.readinto(buffer[:wanted]))
    if got == wanted and buffer[wanted - 1] == UNREAD:
        last = bytearray(1)
        file.seek(before + wanted - 1)
        got = wanted if file.readinto(last) == 1 and last[0] == UNREAD else wanted - 1
    if got != wanted:
        raise OSError(f"cut short between bytes {before} and {before + wanted}")
    return wanted


class Whole(io.RawIOBase):
    """A file of a store that is read anywhere, and is known to be all of what is asked for: see `fill`."""

    def __init__(self, file: pa.NativeFile) -> None:
        self._file = file

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go on from another place."""
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        """The place."""
        return int(self._file.tell())

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        """All of what is asked for, unless the file ends.

        Raises:
            OSError: The store fails, or gives less than it says that there is.
        """
        return fill(self._file, memoryview(buffer))  # `read` comes with a bytearray, whose slices are copies


class Place(NamedTuple):
    """A URI taken apart and found harmless."""

    scheme: str
    authority: str
    path: str
    """Without a slash at its beginning."""


def _place(uri: str) -> Place:
    scheme, _, rest = uri.partition("://")
    authority, _, path = rest.partition("/")
    if scheme not in OPENERS:
        raise StorageError(f"cannot open {_shown(uri)!r}: {scheme}:// is no store", REMEDY)
    if scheme == "file":
        return Place(scheme, authority, path)
    container = re.fullmatch(r"[^@:]+@[^@:]+", authority) if scheme in ("abfs", "abfss") else None
    if "@" in authority and not container:
        raise StorageError(
            f"{_shown(uri)!r} holds credentials",
            "take them out: they belong into the environment, see app/filesystems.py",
        )
    if "?" in rest or "#" in authority:
        raise StorageError(
            f"{_shown(uri)!r} holds options", "take them out: addresses and secrets belong into the environment"
        )
    if not authority and scheme != "hdfs":
        raise StorageError(f"{uri!r} names no bucket", f"write it as {scheme}://bucket/path")
    if {authority, *path.split("/")} & {".", ".."}:
        raise StorageError(f"{uri!r} leads out of its folder by '..'", "write the path itself")
    return Place(scheme, authority, path)


def _shown(uri: str) -> str:
    """A URI that may hold secrets, for an error's sentence."""
    return re.sub(r"\?.*", "?...", re.sub(r"://[^/@]*@", "://...@", uri), flags=re.DOTALL)


def _local(place: Place) -> tuple[fs.FileSystem, str]:
    opened: tuple[fs.FileSystem, str] = fs.FileSystem.from_uri(f"file://{place.authority}/{place.path}")
    return opened


def _s3(place: Place) -> tuple[fs.FileSystem, str]:
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if region is None:  # stores of others take any, Amazon's is asked
        region = "us-east-1" if endpoint else fs.resolve_s3_region(place.authority)
    address = _address("AWS_ENDPOINT_URL", endpoint, "endpoint_override", "scheme") if endpoint else {}
    filesystem = fs.S3FileSystem(
        region=region,
        connect_timeout=CONNECT_S,
        request_timeout=SILENCE_S,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=TRIES),
        **address,
    )
    return filesystem, f"{place.authority}/{place.path}".rstrip("/")


def _gcs(place: Place) -> tuple[fs.FileSystem, str]:
    emulator = os.environ.get("STORAGE_EMULATOR_HOST")
    endpoint = emulator or os.environ.get("RAYLOOP_GCS_ENDPOINT")
    variable = "STORAGE_EMULATOR_HOST" if emulator else "RAYLOOP_GCS_ENDPOINT"
    address = _address(variable, endpoint, "endpoint_override", "scheme") if endpoint else {}
    filesystem = fs.GcsFileSystem(
        anonymous=emulator is not None, retry_time_limit=timedelta(seconds=GCS_RETRY_S), **address
    )
    return filesystem, f"{place.authority}/{place.path}".rstrip("/")


def _azure(place: Place) -> tuple[fs.FileSystem, str]:
    container, _, host = place.authority.partition("@")
    account = next((host.removesuffix(end) for end in AZURE_HOSTS if host.endswith(end)), None)
    if host and (account is None or "." in account):
        raise StorageError(
            f"{host!r} is no address of Azure's", "write abfs://container/path, and set RAYLOOP_AZURE_ENDPOINT"
        )
    account = account or os.environ.get("AZURE_STORAGE_ACCOUNT")
    if account is None:
        raise StorageError(f"abfs://{container} names no account", "set AZURE_STORAGE_ACCOUNT")
    settings: dict[str, Any] = {}
    if endpoint := os.environ.get("RAYLOOP_AZURE_ENDPOINT"):
        for service in ("blob", "dfs"):
            names = f"{service}_storage_authority", f"{service}_storage_scheme"
            settings |= _address("RAYLOOP_AZURE_ENDPOINT", endpoint, *names)
    # A key is sent to nobody but the account it belongs to.
    if account == os.environ.get("AZURE_STORAGE_ACCOUNT", account):
        secrets = {"account_key": "AZURE_STORAGE_KEY", "sas_token": "AZURE_STORAGE_SAS_TOKEN"}
        settings |= {key: os.environ[name] for key, name in secrets.items() if os.environ.get(name)}
    return fs.AzureFileSystem(account_name=account, **settings), f"{container}/{place.path}".rstrip("/")


def _hdfs(place: Place) -> tuple[fs.FileSystem, str]:
    try:
        from app.hdfs import filesystem
    except ModuleNotFoundError as error:
        raise StorageError(f"hdfs:// needs {error.name}", "install the extra `hdfs`") from None
    return filesystem(place.authority, SILENCE_S), f"/{place.path}".rstrip("/") or "/"


def _address(variable: str, endpoint: str, authority: str, scheme: str) -> Mapping[str, str]:
    """An endpoint of the environment in the words of a filesystem."""
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.netloc or parts.path.strip("/") or "@" in parts.netloc:
        raise StorageError(f"{variable} is no address", "write it as http://host:port or https://host")
    return {authority: parts.netloc, scheme: parts.scheme}


OPENERS = {
    "file": _local,
    "s3": _s3,
    "s3a": _s3,
    "gs": _gcs,
    "gcs": _gcs,
    "abfs": _azure,
    "abfss": _azure,
    "az": _azure,
    "hdfs": _hdfs,
}
