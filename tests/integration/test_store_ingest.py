"""The whole ingest with everything on a store: sources, table, marks, staging and report. Submitted as a user does."""

import gzip
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from app import tables
from app.config import Config
from app.storage import Storage
from tests.conftest import ROOT, RunningCluster
from tests.servers import postgres
from tests.servers.hdfs import Hdfs
from tests.servers.stores import STORES

pytestmark = pytest.mark.slow

INGEST = "-m jobs.ingest --config"
COUNT = """
import json, sys
from app import config, tables
found = config.load(sys.argv[1])
rows = tables.read(found, tables.latest(found), columns=["conversation_id"])
print(json.dumps({"status": "done", "rows": rows.count()}))
"""
"""Reads the table as training does, with Ray Data."""
QUERY = "SELECT 'q' || id AS conversation_id, id, question, answer FROM tickets"


def jsonl(start: int, stop: int) -> bytes:
    def row(number: int) -> dict[str, Any]:
        messages = [
            {"role": "user", "content": f"Where is order {number}? It is {number % 7} days late.", "intent": "status"},
            {"role": "assistant", "content": f"Order {number} is on its way."},
        ]
        return {"conversation_id": f"c{number}", "channel": "email", "messages": messages}

    return gzip.compress(b"".join(json.dumps(row(number)).encode() + b"\n" for number in range(start, stop)))


@pytest.fixture(params=["s3", "gs", "abfs", "hdfs"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, Mapping[str, str]]]:
    """The URI of a fresh folder on a store, and what workers have to have in their environment."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "hdfs":
            with Hdfs(tmp_path) as hdfs:
                yield hdfs.uri("base"), {}
        else:
            with STORES[request.param](tmp_path) as store:
                for name, value in store.environment.items():
                    patch.setenv(name, value)
                yield store.uri("base"), store.environment


@pytest.fixture
def database(tmp_path: Path) -> Iterator[str]:
    with postgres.start(tmp_path) as uri:
        execute(uri, "CREATE TABLE tickets (id SERIAL PRIMARY KEY, question TEXT, answer TEXT)")
        yield uri


def execute(uri: str, statement: str) -> None:
    import psycopg

    with psycopg.connect(uri.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute(statement)  # type: ignore[call-overload]  # a literal is asked for


def add_tickets(uri: str, count: int) -> None:
    said = "'My parcel is missing, number ' || n || ' of ' || gen_random_uuid(), 'We look into it, ' || n"
    execute(uri, f"INSERT INTO tickets (question, answer) SELECT {said} FROM generate_series(1, {count}) n")


def submitted(cluster: RunningCluster, command: str, file: Path, environment: Mapping[str, str]) -> dict[str, Any]:
    """The last line of a job that a user submits with the store's environment."""
    from ray.job_submission import JobSubmissionClient

    client = JobSubmissionClient(cluster.dashboard_url)
    job = client.submit_job(
        entrypoint=f"python {command} {file}",
        runtime_env={
            "working_dir": str(ROOT),
            "excludes": ["tests", ".git", ".rayloop"],
            "env_vars": {**environment, "RAYLOOP_HOME": str(file.parent)},
        },
    )
    deadline_s = time.monotonic() + 200
    while not client.get_job_status(job).is_terminal() and time.monotonic() < deadline_s:
        time.sleep(0.5)
    logs = client.get_job_logs(job).strip()
    line: dict[str, Any] = json.loads(logs.splitlines()[-1])
    assert line["status"] in ("done", "up_to_date"), logs[-6_000:]
    return line


def test_everything_may_lie_on_a_store_and_each_row_comes_once(
    cluster: RunningCluster, place: tuple[str, Mapping[str, str]], database: str, tmp_path: Path
) -> None:
    root, environment = place
    columns = {"user": "question", "assistant": "answer", "ignored": ["id"]}
    sources = [
        {"uri": f"{root}/in/*.jsonl.gz", "format": "jsonl"},
        {"uri": database, "format": "sql", "query": QUERY, "cursor_column": "id", "columns": columns},
    ]
    near = {"near_duplicates": {"detect": False}, "anomalies": {"detect": False}}
    settings = {
        "storage": {"uri": f"{root}/store", "catalog_uri": postgres.database(database, "catalog")},
        "ingestion": {"sources": sources, **near},
    }
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(settings))
    config = Config.model_validate(settings)
    Storage(root).write(jsonl(0, 300), "in", "a.jsonl.gz")
    add_tickets(database, 50)
    first = submitted(cluster, INGEST, file, environment)
    assert first["figures"]["records_read"] == 350
    assert first["figures"]["records_kept"] == 350
    assert submitted(cluster, INGEST, file, environment)["status"] == "up_to_date"
    Storage(root).write(jsonl(300, 400), "in", "b.jsonl.gz")
    add_tickets(database, 25)
    second = submitted(cluster, INGEST, file, environment)
    assert second["figures"]["records_read"] == 125
    held = tables.read_local(config, tables.latest(config), columns=["conversation_id", "source"])
    expected = [f"c{n}" for n in range(400)] + [f"q{n}" for n in range(1, 76)]
    assert sorted(held["conversation_id"].to_pylist()) == sorted(expected)
    assert f"{root}/in/b.jsonl.gz" in held["source"].to_pylist()
    counting = tmp_path / "count.py"
    counting.write_text(COUNT)
    assert submitted(cluster, str(counting), file, {**environment, "PYTHONPATH": str(ROOT)})["rows"] == len(expected)
    storage = Storage(f"{root}/store")
    assert len(storage.list("ingested")) == 2
    assert len(storage.list("reports", "ingest")) == 2
    assert not storage.list("staging")
    assert os.listdir(tmp_path).count("store") == 0
