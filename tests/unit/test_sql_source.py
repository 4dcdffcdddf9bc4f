"""Queries as sources, on an SQLite file and on a real PostgreSQL."""

import json
import os
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psycopg
import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.dialects import mysql, postgresql, sqlite

from app.config import Config
from app.errors import ConfigError, SourceError, SourceUnavailable
from app.ingestion import sql
from app.ingestion.sources import parts_of
from tests.servers import postgres
from tests.servers.running import free_port

ALL = "SELECT id AS conversation_id, question AS user, answer, at FROM tickets ORDER BY id"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with postgres.start(tmp_path_factory.mktemp("postgres")) as uri:
        yield uri


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URI of a database with a table of 250 tickets."""
    if request.param == "sqlite":
        uri = f"sqlite:///{tmp_path}/tickets.db"
    else:
        server: str = request.getfixturevalue("server")
        uri = postgres.database(server, f"t{os.urandom(6).hex()}")
    execute(uri, "CREATE TABLE tickets (id INTEGER PRIMARY KEY, question TEXT, answer TEXT, at TIMESTAMP)")
    add(uri, 0, 250)
    return uri


@pytest.fixture
def tickets(server: str) -> str:
    """As `database`, on PostgreSQL alone."""
    uri = postgres.database(server, f"t{os.urandom(6).hex()}")
    execute(uri, "CREATE TABLE tickets (id INTEGER PRIMARY KEY, question TEXT, answer TEXT, at TIMESTAMP)")
    add(uri, 0, 250)
    return uri


def execute(uri: str, *statements: str) -> None:
    engine = create_engine(uri)
    with engine.begin() as connection:
        for statement in statements:
            connection.execute(text(statement))
    engine.dispose()


def add(uri: str, start: int, stop: int) -> None:
    rows = ", ".join(
        f"({n}, 'Where is order {n}?', 'On its way.', '2026-11-01 10:{n // 60 % 60:02}:{n % 60:02}')"
        for n in range(start, stop)
    )
    execute(uri, f"INSERT INTO tickets (id, question, answer, at) VALUES {rows}")


def count(uri: str) -> int:
    engine = create_engine(uri)
    with engine.connect() as connection:
        found = connection.execute(text("SELECT count(*) FROM tickets")).scalar()
    engine.dispose()
    return int(found or 0)


def config(uri: str, query: str = ALL, **source: Any) -> Config:
    given = {"uri": uri, "format": "sql", "query": query, **source}
    return Config().with_overrides({"ingestion.sources": [given], "ingestion.batch_rows": 100})


def read(config: Config, marks: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The new records, and the marks with what was read."""
    parts = parts_of(config, marks)
    rows = [
        json.loads(raw)
        for part in parts
        for call, _ in part.reads(config.ingestion)
        for piece in call()
        for raw in piece.raw
    ]
    return rows, marks | dict(part.mark for part in parts if part.mark is not None)


def test_a_whole_query_in_pieces(database: str) -> None:
    (part,) = parts_of(config(database), {})
    ((call, _),) = part.reads(config(database).ingestion)
    pieces = list(call())
    assert [len(piece.raw) for piece in pieces] == [100, 100, 50]
    assert [position for piece in pieces for position in piece.positions] == list(range(250))
    assert all(piece.identified for piece in pieces)
    assert json.loads(pieces[0].raw[1]) | {"at": None} == {
        "conversation_id": 1, "user": "Where is order 1?", "answer": "On its way.", "at": None,
    }  # fmt: skip
    assert part.mark is None  # it is read again each time


@pytest.mark.parametrize("column", ["conversation_id", "at"])
def test_a_cursor_column_gives_each_row_once(database: str, column: str) -> None:
    settings = config(database, cursor_column=column)
    rows, marks = read(settings, {})
    assert [row["conversation_id"] for row in rows] == list(range(250))
    assert read(settings, marks) == ([], marks)
    add(database, 250, 300)
    rows, marks = read(settings, marks)
    assert [row["conversation_id"] for row in rows] == list(range(250, 300))
    json.dumps(marks)


def test_what_is_added_between_planning_and_reading_is_left_to_the_next_time(database: str) -> None:
    settings = config(database, cursor_column="conversation_id")
    parts = parts_of(settings, {})
    add(database, 250, 260)
    rows = [raw for call, _ in parts[0].reads(settings.ingestion) for piece in call() for raw in piece.raw]
    assert len(rows) == 250
    assert len(read(settings, dict([parts[0].mark]))[0]) == 10  # type: ignore[list-item]


def test_the_mark_is_named_so_that_servers_may_move(database: str) -> None:
    (part,) = parts_of(config(database, cursor_column="conversation_id", name="tickets"), {})
    assert part.mark == ("sql:tickets", 249)
    assert part.uri == "tickets@249"


@pytest.mark.parametrize("written", ["'a :noon %s 100% \\x'", "'12:30'", "':a :b::c'"])
def test_what_stands_in_quotes_is_no_parameter(database: str, written: str) -> None:
    (row,) = read(config(database, f"SELECT {written} AS user FROM tickets WHERE id = 7"), {})[0]
    assert row == {"user": written.strip("'")}


def test_postgresql_casts_and_types(tickets: str) -> None:
    query = """SELECT id::text AS conversation_id, 1.5::numeric AS n, 'abc'::bytea AS b, NULL AS nothing,
        '[{"role": "user", "content": "ü"}]'::jsonb AS messages, '2026-11-01 10:00+02'::timestamptz AS started_at,
        gen_random_uuid() AS u, ARRAY[1, 2] AS a FROM tickets WHERE id = 7"""
    (row,) = read(config(tickets, query), {})[0]
    assert row["conversation_id"] == "7"
    assert row["messages"] == [{"role": "user", "content": "ü"}]
    assert row["started_at"].startswith("2026-11-01T")
    assert (row["n"], row["b"], row["nothing"], row["a"]) == ("1.5", "abc", None, [1, 2])


def test_rows_that_are_no_text_are_told_by_their_place(database: str) -> None:
    broken, question = r"'\xff'::bytea", "question::bytea"
    if database.startswith("sqlite"):
        broken, question = "CAST(x'ff' AS TEXT)", "question"
    query = (
        f"SELECT id, CASE WHEN id IN (3, 120) THEN {broken} ELSE {question} END AS question FROM tickets ORDER BY id"
    )
    settings = config(database, query, columns={"conversation_id": "id", "user": "question"})
    (part,) = parts_of(settings, {})
    ((call, _),) = part.reads(settings.ingestion)
    rows = [row for piece in call() for row in zip(piece.positions, piece.raw, piece.problems or (), strict=True)]
    assert [(position, problem) for position, _, problem in rows if problem] == [
        (3, "invalid_encoding"), (120, "invalid_encoding"),
    ]  # fmt: skip
    assert json.loads(rows[249][1]) == {"id": 249, "question": "Where is order 249?"}


def test_a_postgresql_that_takes_any_bytes_for_text_gives_what_is_text(server: str) -> None:
    name = f"t{os.urandom(6).hex()}"
    with psycopg.connect(server.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} ENCODING 'SQL_ASCII' LOCALE 'C' TEMPLATE template0")
    uri = f"{server.rpartition('/')[0]}/{name}"
    with psycopg.connect(uri.replace("+psycopg", "")) as connection:
        connection.execute(r"CREATE TABLE tickets AS VALUES (E'gr\303\274n'), (E'gr\374n')")
    settings = config(uri, "SELECT column1 AS user FROM tickets")
    ((call, _),) = parts_of(settings, {})[0].reads(settings.ingestion)
    (piece,) = call()
    assert (piece.raw, piece.problems) == (('{"user":"grün"}'.encode(), b""), (None, "invalid_encoding"))


# Nothing can be changed


@pytest.mark.parametrize(
    "query",
    [
        "DELETE FROM tickets",
        "SELECT 1; DELETE FROM tickets",
        "INSERT INTO tickets VALUES (999)",
        "",
        "TRUNCATE tickets",
    ],
)
def test_a_query_that_is_no_select_is_refused_before_anyone_is_asked(query: str) -> None:
    with pytest.raises(ConfigError, match="one SELECT"):
        list(sql.read("postgresql+psycopg://nobody@127.0.0.1:9/x", query, 10, "id"))


WRITES = [
    "WITH gone AS (DELETE FROM tickets RETURNING id) SELECT id AS conversation_id FROM gone",
    "SELECT forget() AS conversation_id",
    "SELECT set_config('transaction_read_only', 'off', false) || forget()::text AS conversation_id",
    "SELECT id INTO copied FROM tickets",
    "SELECT nextval('numbers') AS conversation_id",
    "SELECT id AS conversation_id FROM tickets FOR UPDATE",
]


@pytest.mark.parametrize("query", WRITES)
def test_postgresql_refuses_whatever_would_write(tickets: str, query: str) -> None:
    body = "DELETE FROM tickets; SELECT 1"
    execute(tickets, f"CREATE FUNCTION forget() RETURNS integer LANGUAGE sql AS '{body}'", "CREATE SEQUENCE numbers")
    with pytest.raises(SourceError, match=r"read-only|read-write|must not contain data-modifying|not allowed here"):
        read(config(tickets, query), {})
    assert count(tickets) == 250
    execute(tickets, "SELECT forget()")  # it would have
    assert count(tickets) == 0


def test_sqlite_refuses_what_would_write_and_makes_no_file(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/none.db"
    with pytest.raises(SourceError, match="there is no database at"):
        read(config(uri), {})
    assert list(tmp_path.iterdir()) == []
    sqlite3.connect(tmp_path / "some.db").execute("CREATE TABLE t (id)").connection.close()
    with pytest.raises(SourceError, match="failed"):
        read(config(f"sqlite:///{tmp_path}/some.db", "WITH x AS (SELECT 1) DELETE FROM t"), {})


@pytest.mark.parametrize(
    "uri",
    [
        "postgresql+psycopg://reader:planted@127.0.0.1:9/x",
        "postgresql+psycopg://reader@127.0.0.1:9/x?password=planted",
        "postgres://reader:planted@127.0.0.1:9/x",
        "nosuch://reader:planted@127.0.0.1:9/x",
    ],
)
def test_a_password_in_the_uri_is_refused_and_not_repeated(uri: str) -> None:
    with pytest.raises(ConfigError) as refused:
        list(sql.read(uri, "SELECT 1", 10, "id"))
    assert "planted" not in str(refused.value)


def test_a_database_that_could_not_refuse_writes_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no database that is known to refuse writes"):
        list(sql.read("oracle://reader@127.0.0.1/x", "SELECT 1", 10, "id"))


# What can go wrong


def test_a_query_that_fails_says_why(database: str) -> None:
    with pytest.raises(SourceError, match="nosuch") as failed:
        read(config(database, "SELECT nosuch FROM tickets"), {})
    assert not isinstance(failed.value, SourceUnavailable)
    with pytest.raises(ConfigError, match="no column name"):
        read(config(database, cursor_column='id" OR 1=1 --'), {})


def test_a_cursor_column_that_the_query_does_not_have_is_an_error(database: str) -> None:
    with pytest.raises(SourceError, match="updated"):
        parts_of(config(database, cursor_column="updated"), {})


def test_a_cursor_column_is_quoted_as_the_database_does() -> None:
    """In double quotes MySQL takes it for a text, which is above no row's value."""
    dialects = {"mysql": mysql.dialect(), "postgresql": postgresql.dialect(), "sqlite": sqlite.dialect()}
    quoted = {name: sql._quoted(SimpleNamespace(dialect=found), "id") for name, found in dialects.items()}
    assert quoted == {"mysql": "q.`id`", "postgresql": 'q."id"', "sqlite": 'q."id"'}


def test_a_server_that_thinks_for_too_long_is_stopped(tickets: str) -> None:
    with pytest.raises(SourceError, match="statement timeout"):
        read(config(tickets, "SELECT pg_sleep(60)::text AS conversation_id", timeout_s=0.3), {})


def test_a_server_that_is_away_may_come_back() -> None:
    uri = f"postgresql+psycopg://postgres@127.0.0.1:{free_port()}/postgres"
    with pytest.raises(SourceUnavailable, match=re.escape(uri)):
        read(config(uri), {})
    with pytest.raises(SourceUnavailable, match="does not answer"):
        read(config(uri, cursor_column="conversation_id"), {})


def test_a_server_that_goes_away_while_it_is_read_may_come_back(tickets: str) -> None:
    settings = config(tickets, "SELECT n::text AS conversation_id, repeat('x', 1000) FROM generate_series(1, 100000) n")
    (part,) = parts_of(settings, {})
    ((call, _),) = part.reads(settings.ingestion)
    rows = call()
    assert len(next(rows).raw) == 100
    # Connections that were closed a moment ago may still be listed, as idle.
    others = "datname = current_database() AND state <> 'idle' AND pid <> pg_backend_pid()"
    engine = create_engine(tickets)
    with engine.connect() as connection:
        ended = connection.execute(text(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {others}"))
        assert list(ended.scalars()) == [True]
    engine.dispose()
    with pytest.raises(SourceUnavailable, match="does not answer"):
        list(rows)
