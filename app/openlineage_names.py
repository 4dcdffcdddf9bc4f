"""Names of datasets, by OpenLineage's naming, and texts without credentials.

A dataset is named by its place, so that what other systems say of the same place meets in one graph: (file, /path),
(s3://bucket, key), (kafka://host:port, topic).
"""

import re
from pathlib import Path
from urllib.parse import urlsplit

from app import tables
from app.config import Config
from app.storage import Storage, resolve

FILES = ("file", "s3", "gs", "abfs", "abfss", "hdfs")
# What stands before a colon and digits is a host with its port.
_USER = re.compile(r"\b([a-z][a-z0-9+.-]*)://(?:([^\s/@:]*)|[^\s/@:]*:(?!\d+[/,\s])\S*)@", re.IGNORECASE)
_QUERY = re.compile(r"(\b[a-z][a-z0-9+.-]*://[^\s?]*)\?[^\s)'\"]*", re.IGNORECASE)


def place(config: Config, uri: str) -> tuple[str, str]:
    """Namespace and name of what is at a URI, by OpenLineage's naming; no credentials.

    Raises:
        TableError: It is an `iceberg:` source whose table is not there.
    """
    if uri.startswith("iceberg:"):
        return place(config, tables.open_table(config.storage, uri.removeprefix("iceberg:")).location())
    if uri.startswith("traffic:"):
        return place(config, Storage(config.serving.storage_uri or config.storage.uri).uri("traffic"))
    if uri.startswith("sample:"):
        return "rayloop", uri
    if "://" not in uri:
        return "file", resolve(uri)
    address = urlsplit(public(uri))
    scheme = {"postgresql": "postgres"}.get(address.scheme.split("+")[0], address.scheme.split("+")[0])
    if scheme in ("file", "sqlite"):
        return "file", address.path
    servers = address.netloc.split(",")[0]
    return f"{scheme}://{servers}", address.path if scheme == "hdfs" else address.path.strip("/") or "/"


def absolute(uri: str) -> str:
    """A path as a URI; a URI without credentials."""
    if "://" in uri or uri.startswith(("iceberg:", "traffic:", "sample:")):
        return public(uri)
    return Path(resolve(uri)).as_uri()


def public(text: str) -> str:
    """The text with users, passwords and query strings taken out of the URIs in it."""

    def bare(match: re.Match[str]) -> str:
        # Azure writes the container where others write a user.
        container = match[2] if match[1].lower() in ("abfs", "abfss") else None
        return f"{match[1]}://{container}@" if container else f"{match[1]}://"

    return _QUERY.sub(r"\1", _USER.sub(bare, text))
