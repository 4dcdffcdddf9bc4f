"""Iceberg catalogs: SQLite, a real PostgreSQL server, and a REST catalog that is named; several writers at once."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from app import table_versions, tables
from app.catalog import catalog_properties
from app.config import Config
from app.errors import TableChanged, TableError, TableNotFound
from app.forget import forget
from app.settings.tables import MaintenanceConfig
from app.snapshots import ancestors
from app.table_maintenance import compact, expire
from tests.concurrent_writer import numbers
from tests.faults import Fault
from tests.servers import iceberg_rest, postgres
from tests.table_rows import add, ids, rows, stage, table_of

WRITERS, ROUNDS = 3, 3


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with postgres.start(tmp_path_factory.mktemp("postgres")) as uri:
        yield uri


def configured(store: str, catalog_uri: str | None) -> Config:
    return Config().with_overrides({"storage.uri": store, "storage.catalog_uri": catalog_uri})


def write_at_once(
    config: Config, folder: Path, fault: Fault, meanwhile: Callable[[], None] = lambda: None
) -> list[int]:
    """How often each of three writers was refused; the table is checked row by row."""
    folder.mkdir()
    fixed = [config.storage.uri, config.storage.catalog_uri or "", str(folder)]
    commands = [
        [
            sys.executable,
            "-m",
            "tests.concurrent_writer",
            *fixed,
            str(number),
            str(WRITERS),
            str(ROUNDS),
            str(fault.seed),
        ]
        for number in range(WRITERS)
    ]
    running = [
        subprocess.Popen(command, cwd=os.getcwd(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for command in commands
    ]
    while any(process.poll() is None for process in running):
        meanwhile()
        time.sleep(0.02)
    ended = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0] * WRITERS, ended
    told = [json.loads(output.splitlines()[-1]) for output, _ in ended]

    expected = sorted(number for writer in range(WRITERS) for turn in range(ROUNDS) for number in numbers(writer, turn))
    found = sorted(tables.read_local(config, tables.latest(config), ["position"])["position"].to_pylist())
    assert found == expected, "no row is lost and none is there twice"
    assert len({snapshot for entry in told for snapshot in entry["snapshots"]}) == WRITERS * ROUNDS
    if any(entry["refused"] for entry in told):
        fault.happened(max(entry["longest_s"] for entry in told))
        fault.recovered()
    return [entry["refused"] for entry in told]


def check_history(config: Config) -> None:
    """Each append is one version, and one history holds them all."""
    counts = [20 * (place + 1) for place in range(WRITERS * ROUNDS)]
    assert [entry.rows for entry in table_versions.versions(config)] == counts
    assert len(list(ancestors(table_of(config)))) == len(counts)


@pytest.mark.fault("F5", seen="all meet before they append; two of three are refused in each round")
def test_three_writers_on_sqlite_lose_no_row(store: str, tmp_path: Path, fault: Fault) -> None:
    config = configured(store, None)
    refused = write_at_once(config, tmp_path / "meeting", fault)
    # All opened the table before any of them appended, so in each round only one could be the first.
    assert sum(refused) >= ROUNDS * (WRITERS - 1)
    check_history(config)


@pytest.mark.fault("F5", seen="all meet before they append; two of three are refused in each round")
def test_three_writers_on_postgresql_lose_no_row(server: str, store: str, tmp_path: Path, fault: Fault) -> None:
    config = configured(store, postgres.database(server, f"writers-{fault.seed}"))
    refused = write_at_once(config, tmp_path / "meeting", fault)
    assert sum(refused) >= ROUNDS * (WRITERS - 1)
    check_history(config)
    assert not (Path(store) / "catalog.db").exists()


@pytest.mark.slow
@pytest.mark.fault("F5", seen="writers were refused, and maintenance compacted and expired versions meanwhile")
@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_writers_and_maintenance_at_once_lose_no_row(
    store: str, tmp_path: Path, kind: str, request: pytest.FixtureRequest, fault: Fault
) -> None:
    server = (
        None if kind == "sqlite" else postgres.database(request.getfixturevalue("server"), f"maintained-{fault.seed}")
    )
    config = configured(store, server)
    settings = MaintenanceConfig(min_small_files=2, expire_days=1e-9, keep_versions=0)
    done = {"compact": 0, "expire": 0}

    def maintain() -> None:
        with contextlib.suppress(TableNotFound, TableChanged):  # not made yet; the writers were faster
            done["compact"] += compact(config, table_of(config), settings).snapshot_id is not None
            done["expire"] += len(expire(config, table_of(config), settings).expired)

    write_at_once(config, tmp_path / "meeting", fault, maintain)
    assert done["compact"] > 0
    assert done["expire"] > 0
    maintain()
    assert len(table_versions.versions(config)) == 1


def test_the_whole_path_on_postgresql(server: str, store: str) -> None:
    check_whole_path(configured(store, postgres.database(server, "catalog")))


def test_the_whole_path_on_a_rest_catalog(store: str, tmp_path: Path) -> None:
    with iceberg_rest.start(tmp_path) as catalog:
        check_whole_path(configured(store, catalog.uri))
        assert catalog.requests.count("POST /v1/namespaces/support/tables/conversations 200") >= 11
    assert not (Path(store) / "catalog.db").exists()


def test_of_two_writers_on_a_rest_catalog_the_second_is_refused(store: str, tmp_path: Path) -> None:
    with iceberg_rest.start(tmp_path) as catalog:
        config = configured(store, catalog.uri)
        add(config, [1])
        mine = table_of(config)
        file = stage(mine, rows([2]), "mine")
        add(config, [3])
        with pytest.raises(TableChanged, match="run the job again"):
            tables.append(mine, [file], {})
        assert catalog.requests[-2:] == [
            "POST /v1/namespaces/support/tables/conversations 409",
            "GET /v1/namespaces/support/tables/conversations 200",
        ]
        tables.append(table_of(config), [file], {})
        assert ids(config, tables.latest(config)) == [f"conversation-{number}" for number in (1, 2, 3)]


@pytest.mark.fault("F5", seen="the catalog closed the connection after the commit")
def test_a_commit_whose_answer_is_lost_is_found_and_not_made_twice(store: str, tmp_path: Path) -> None:
    with iceberg_rest.start(tmp_path) as catalog:
        config = configured(store, catalog.uri)
        add(config, [1])
        catalog.lost_answers = 1
        version = add(config, [2])
        assert catalog.lost_answers == 0, "it was lost"
        assert tables.latest(config) == version
        assert ids(config, version) == ["conversation-1", "conversation-2"]
        assert len(table_versions.versions(config)) == 2


def check_whole_path(config: Config) -> None:
    """Create, append, tag, read, compact, expire, forget, go back."""
    with pytest.raises(TableError, match=r"no table support\.conversations .* run jobs\.ingest first"):
        tables.latest(config)
    versions = [add(config, [2 * number, 2 * number + 1]) for number in range(8)]
    assert table_versions.tag(config, versions[1], "raw")
    assert tables.resolve(config, "raw") == versions[1]
    assert len(ids(config, versions[1])) == 4
    compact(config, table_of(config), MaintenanceConfig())
    assert len(ids(config, tables.latest(config))) == 16
    done = expire(config, table_of(config), MaintenanceConfig(expire_days=1e-9, keep_versions=1))
    assert done.expired == [version.snapshot_id for version in versions if version != versions[1]]
    assert table_versions.rollback(config, versions[1])
    assert ids(config, tables.latest(config)) == [f"conversation-{number}" for number in range(4)]
    outcome = forget(config, ["conversation-1"], MaintenanceConfig(orphan_hours=1e-9))
    assert outcome.tables[0].rows == 1
    for version in (tables.latest(config), tables.resolve(config, "raw")):
        assert ids(config, version) == ["conversation-0", "conversation-2", "conversation-3"]


def test_looking_makes_nothing_in_postgresql(server: str, store: str) -> None:
    import psycopg

    uri = postgres.database(server, "untouched")
    with pytest.raises(TableError, match=r"no table support\.conversations"):
        tables.latest(configured(store, uri))
    with psycopg.connect(uri.replace("+psycopg", "")) as connection:
        found = connection.execute("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'").fetchone()
    assert found == (0,)


def test_no_connection_to_postgresql_is_left_open(server: str, store: str) -> None:
    import psycopg

    uri = postgres.database(server, "connections")
    config = configured(store, uri)
    add(config, [1])
    opened = [table_of(config) for _ in range(20)]
    counting = "SELECT count(*) FROM pg_stat_activity WHERE datname = 'connections'"
    deadline_s = time.monotonic() + 30
    with psycopg.connect(uri.replace("+psycopg", ""), autocommit=True) as connection:
        # The server's process of a connection that was closed ends a moment later.
        while (found := connection.execute(counting).fetchone()) != (1,):  # this one
            assert time.monotonic() < deadline_s, found
            time.sleep(0.1)
    assert len(opened) == 20


def test_a_postgresql_that_does_not_answer_is_said_without_its_password(store: str) -> None:
    config = configured(store, f"postgresql+psycopg://me:s3cret@127.0.0.1:{_closed_port()}/iceberg")
    with pytest.raises(
        TableError, match=r"the Iceberg catalog does not answer .* check storage\.catalog_uri"
    ) as caught:
        add(config, [1])
    assert "s3cret" not in str(caught.value)


def test_a_rest_catalog_is_named_by_its_address() -> None:
    config = Config().with_overrides(
        {"storage.uri": "s3://bucket/root/", "storage.catalog_uri": "https://catalog.example/"}
    )
    properties = catalog_properties(config.storage)
    expected = {
        "name": "rayloop",
        "type": "rest",
        "uri": "https://catalog.example/",
        "warehouse": "s3://bucket/root/tables",
    }
    assert expected.items() <= properties.items()


def test_a_rest_catalog_that_does_not_answer_is_said(store: str) -> None:
    started_s = time.monotonic()
    with pytest.raises(TableError, match=r"the Iceberg catalog does not answer .* check storage\.catalog_uri"):
        tables.latest(configured(store, f"http://127.0.0.1:{_closed_port()}"))
    assert time.monotonic() - started_s < 30


def _closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
