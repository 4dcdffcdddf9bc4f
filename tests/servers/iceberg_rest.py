"""A small Iceberg REST catalog over HTTP, in front of pyiceberg's own SQL catalog: those paths of the specification
that are used. No catalog server can be had from the package registries; what a real one adds (credentials, views,
access rights) is not shown by this one.

    with iceberg_rest.start(tmp_path) as catalog:
        catalog.uri         # http://127.0.0.1:41234
        catalog.requests    # what was asked for, e.g. "POST /v1/namespaces/support/tables/conversations 200"
"""

import contextlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from pyiceberg.catalog.sql import SqlCatalog
from pyiceberg.exceptions import (
    CommitFailedException,
    NamespaceAlreadyExistsError,
    NoSuchNamespaceError,
    NoSuchTableError,
    TableAlreadyExistsError,
)
from pyiceberg.schema import Schema
from pyiceberg.table import CommitTableRequest, Table

STATUS = {
    NoSuchNamespaceError: 404,
    NoSuchTableError: 404,
    NamespaceAlreadyExistsError: 409,
    TableAlreadyExistsError: 409,
    CommitFailedException: 409,
}
NAMESPACES = "/v1/namespaces"
TABLES = re.compile(r"/v1/namespaces/([^/]+)/tables")
TABLE = re.compile(r"/v1/namespaces/([^/]+)/tables/([^/]+)")


@dataclass
class RestCatalog:
    """A running server."""

    uri: str
    requests: list[str] = field(default_factory=list)
    lost_answers: int = 0
    """So many of the next commits are made, and the connection is closed without an answer."""


@contextlib.contextmanager
def start(folder: Path) -> Iterator[RestCatalog]:
    """A server whose catalog is an SQLite file in `folder`, until the block ends."""
    catalog = SqlCatalog("served", uri=f"sqlite:///{folder}/served.db", warehouse=f"file://{folder}/served")
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(None)

        def do_HEAD(self) -> None:
            self._answer(None)

        def do_POST(self) -> None:
            self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}"))

        def _answer(self, asked: Any) -> None:
            path = self.path.partition("?")[0]
            try:
                with lock:
                    status, content = 200, _done(catalog, path, asked)
            except tuple(STATUS) as error:
                status = STATUS[type(error)]
                content = {"error": {"message": str(error), "type": type(error).__name__, "code": status}}
            served.requests.append(f"{self.command} {path} {status}")
            if served.lost_answers and asked is not None and TABLE.fullmatch(path):
                served.lost_answers -= 1
                self.close_connection = True
                return
            body = b"" if self.command == "HEAD" else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: Any) -> None:
            """Nothing: requests are kept."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served = RestCatalog(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _done(catalog: SqlCatalog, path: str, asked: Any) -> dict[str, Any]:
    """What a request is answered with."""
    if path == "/v1/config":
        return {"defaults": {}, "overrides": {}}
    if path == NAMESPACES and asked is not None:
        catalog.create_namespace(tuple(asked["namespace"]), asked.get("properties", {}))
        return {"namespace": asked["namespace"], "properties": {}}
    if (found := TABLES.fullmatch(path)) and asked is not None:
        schema = Schema.model_validate(asked["schema"])
        identifier = (found[1], asked["name"])
        return _loaded(catalog.create_table(identifier, schema, asked.get("location"), properties=asked["properties"]))
    if found := TABLE.fullmatch(path):
        identifier = (found[1], found[2])
        table = catalog.load_table(identifier)
        if asked is None:
            return _loaded(table)
        request = CommitTableRequest.model_validate(asked | {"identifier": {"namespace": [found[1]], "name": found[2]}})
        made = catalog.commit_table(table, request.requirements, request.updates)
        return json.loads(made.model_dump_json(by_alias=True))  # type: ignore[no-any-return]
    if path.startswith(f"{NAMESPACES}/"):
        name = path.removeprefix(f"{NAMESPACES}/")
        return {"namespace": [name], "properties": dict(catalog.load_namespace_properties(name))}
    raise NoSuchTableError(path)


def _loaded(table: Table) -> dict[str, Any]:
    metadata = json.loads(table.metadata.model_dump_json(by_alias=True))
    return {"metadata-location": table.metadata_location, "metadata": metadata, "config": {}}
