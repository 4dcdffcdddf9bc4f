"""Rows of a query as records: read through SQLAlchemy, some at a time, in a transaction that can change nothing.

PostgreSQL refuses writes in it, by whatever function they are made; SQLite's file is opened for reading; MySQL and
MariaDB get a read-only transaction. Other databases have no such thing that could be asked for, and are refused. What
a superuser may do besides (read the server's files, open connections from it) only another role can prevent.

A cursor column has to grow with every row and in the order of commits: a row that appears later with a value at or
below the last one read is not seen. A sequence that slow transactions take numbers from does not do.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from app.errors import ConfigError, SourceError, SourceUnavailable
from app.ingestion.formats import Piece, as_record
from app.ingestion.streams import first_line
from app.privacy import Detector, Mask

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine

TCP_S = 30
"""How long a network may lose everything before the connection counts as lost."""
_AS_HELD = """SELECT set_config('client_encoding', 'SQL_ASCII', true)
    WHERE current_setting('server_encoding') = 'SQL_ASCII'"""
"""A PostgreSQL database of this encoding takes any bytes for text: they are asked for as they are."""
_SELECT = re.compile(r"^\s*(select|with)\b[^;]*;?\s*$", re.IGNORECASE)


def read(
    uri: str, query: str, batch_rows: int, id_column: str, cursor_column: str | None = None, after: Any = None,
    until: Any = None, timeout_s: float = 60.0,
) -> Iterator[Piece]:  # fmt: skip
    """The rows of a query, `batch_rows` at a time; positions number them from 0 in the query's order.

    A row that holds bytes which are no text is a record with a problem.

    Args:
        uri: SQLAlchemy's, without a password.
        query: One SELECT.
        batch_rows: Rows of a piece.
        id_column: The column that tells whether rows carry an id of their own.
        cursor_column: If given, only rows whose value is above `after` and not above `until`.
        after: The last value that was read; none: from the beginning.
        until: The highest value to read.
        timeout_s: How long the server may think.

    Raises:
        ConfigError: The query is not one SELECT, or the URI holds a password.
        SourceError: The query fails.
        SourceUnavailable: The server does not answer.
    """
    from sqlalchemy import text

    query, start = _checked(query), 0
    with _connected(uri, timeout_s) as connection:
        bounded = _bounded(query, _quoted(connection, cursor_column), after, until)
        found = connection.execution_options(stream_results=True, yield_per=batch_rows).execute(
            text(bounded), _values(after, until)
        )
        names = list(found.keys())
        for rows in found.partitions(batch_rows):
            records = [as_record(dict(zip(names, row, strict=True))) for row in rows]
            raw, problems = zip(*records, strict=True)
            yield Piece(range(start, start + len(raw)), raw, problems, id_column in names)
            start += len(raw)


def latest(uri: str, query: str, cursor_column: str, timeout_s: float = 60.0) -> Any:
    """The highest value of a column of the query now, as a JSON value; none if there is no row.

    Raises:
        As `read`.
    """
    from sqlalchemy import text

    query = _checked(query)
    with _connected(uri, timeout_s) as connection:
        column = _quoted(connection, cursor_column)
        value = connection.execute(text(f"SELECT max({column}) FROM ({query}) AS q")).scalar()
    return value if value is None or isinstance(value, int | float | str) else str(value)


def _bounded(query: str, column: str | None, after: Any, until: Any) -> str:
    if column is None:
        return query
    limits = [f"{column} > :after"] * (after is not None) + [f"{column} <= :until"] * (until is not None)
    where = f" WHERE {' AND '.join(limits)}" if limits else ""
    return f"SELECT * FROM ({query}) AS q{where} ORDER BY {column}"


def _values(after: Any, until: Any) -> dict[str, Any]:
    return {name: value for name, value in (("after", after), ("until", until)) if value is not None}


def _checked(query: str) -> str:
    if not _SELECT.match(query):
        raise ConfigError(
            "ingestion.sources: a query has to be one SELECT", "write what is to be read and nothing else"
        )
    # SQLAlchemy takes `:word` for a parameter, in quotes too; only ours are.
    return re.sub(r"(?<![:\w\\]):(?=\w+(?!:))", r"\\:", query.strip().removesuffix(";"))


def _quoted(connection: "Connection", column: str | None) -> str | None:
    """A column of the query `q`, as this database quotes it.

    With its table's name: MySQL takes what stands in double quotes for a text, and SQLite too where there is no such
    column.
    """
    if column is None:
        return None
    if not re.fullmatch(r"\w+", column):
        raise ConfigError(f"ingestion.sources: {column!r} is no column name", "name a column of the query")
    return f"q.{connection.dialect.identifier_preparer.quote_identifier(column)}"


@contextlib.contextmanager
def _connected(uri: str, timeout_s: float) -> "Iterator[Connection]":
    """A connection in a read-only transaction, and errors in our words."""
    from sqlalchemy.exc import DBAPIError, SQLAlchemyError

    engine = _engine(uri, timeout_s)
    try:
        try:
            connection = engine.connect()
        except SQLAlchemyError as error:
            raise _away(uri, error) from None
        with connection:
            for statement in _settings(engine.dialect.name, timeout_s):
                connection.exec_driver_sql(statement)
            yield connection
    except SQLAlchemyError as error:
        if isinstance(error, DBAPIError) and error.connection_invalidated:
            raise _away(uri, error) from None
        raise SourceError(f"the query on {uri} failed ({_cause(error)})", "correct ingestion.sources.query") from None
    finally:
        engine.dispose()


def _engine(uri: str, timeout_s: float) -> "Engine":
    from sqlalchemy import create_engine, event, make_url
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError
    from sqlalchemy.pool import NullPool

    try:
        url = make_url(uri)
        if url.password is not None or any("pass" in name.lower() for name in url.query):
            raise ConfigError(
                f"the source {url.set(query={}).render_as_string(hide_password=True)} has a password in its URI",
                "give it in the environment: PGPASSWORD, PGPASSFILE or what your driver reads",
            )
        kind = url.get_backend_name()
        if kind not in ("postgresql", "sqlite", "mysql", "mariadb"):
            raise ConfigError(
                f"{kind} is no database that is known to refuse writes", "use PostgreSQL, MySQL or SQLite"
            )
        if kind == "sqlite":
            if not os.path.isfile(url.database or ""):
                raise SourceError(f"there is no database at {uri}", "check ingestion.sources")
            made = create_engine(f"sqlite:///file:{quote(str(url.database))}?mode=ro&uri=true", poolclass=NullPool)
            event.listen(made, "connect", _without_decoding)
            return made
        wait: dict[str, Any] = {"connect_timeout": max(2, int(min(timeout_s, TCP_S)))}
        if kind == "postgresql":
            wait |= {"tcp_user_timeout": TCP_S * 1_000, "keepalives_idle": TCP_S, "keepalives_count": 3}
            wait["client_encoding"] = "UTF8"  # what SQLAlchemy itself asks has to come as text
        return create_engine(url, poolclass=NullPool, connect_args=wait)
    except (ArgumentError, NoSuchModuleError, ModuleNotFoundError) as error:
        raise ConfigError(
            f"{re.sub('://.*@', '://...@', uri)!r} is no database that can be reached ({type(error).__name__})",
            "write it as dialect+driver://user@host/database, and install the driver (extra `postgres`)",
        ) from None


def _without_decoding(connection: Any, record: Any) -> None:
    """SQLite takes any bytes for text, and its driver fails at those that are none: they are left to `as_record`."""
    connection.text_factory = _text


def _text(value: bytes) -> str | bytes:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value


def _settings(kind: str, timeout_s: float) -> list[str]:
    milliseconds = int(timeout_s * 1_000)
    if kind == "postgresql":
        return ["SET TRANSACTION READ ONLY", f"SET LOCAL statement_timeout = {milliseconds}", _AS_HELD]
    if kind == "sqlite":
        return ["PRAGMA query_only = ON"]
    return ["SET SESSION TRANSACTION READ ONLY", "COMMIT"]


def _away(uri: str, error: Exception) -> SourceUnavailable:
    return SourceUnavailable(
        f"the database {uri} does not answer ({_cause(error)})", "check the server and access rights"
    )


def _cause(error: Exception) -> str:
    # What a server says of a row may repeat what is in it.
    return Mask(Detector()).text(first_line(getattr(error, "orig", None) or error))
