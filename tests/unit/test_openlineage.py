"""Events of jobs: to a real server and to a file, whole and valid, without secrets, and never in a job's way."""

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from app import openlineage
from app.config import Config
from app.conversation import SCHEMA
from app.errors import ConfigError, SourceError, StageRefused
from app.job import Job, Outcome
from app.openlineage_names import place, public
from app.versions import as_json
from tests.openlineage_schema import problems
from tests.table_rows import add, table_of

SOURCES = {"sources": [{"uri": "/data/in.jsonl", "parts": 2, "bytes": 700, "digest": "d1"}]}


@dataclass
class Server:
    """A lineage server: keeps what is posted to it."""

    url: str = ""
    status: int = 201
    requests: list[tuple[str, dict[str, str], dict[str, Any]]] = field(default_factory=list)

    @property
    def events(self) -> list[dict[str, Any]]:
        return [event for _, _, event in self.requests]


@pytest.fixture
def server() -> Iterator[Server]:
    kept = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            kept.requests.append((self.path, dict(self.headers), json.loads(body)))
            self.send_response(kept.status)
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        kept.url = f"http://127.0.0.1:{listening.server_port}"
        thread = threading.Thread(target=listening.serve_forever, args=[0.05], daemon=True)
        thread.start()
        yield kept
        listening.shutdown()
        thread.join()


def appends(count: int) -> Callable[[Config], Outcome]:
    """A stage that adds rows to the table."""

    def act(config: Config) -> Outcome:
        version = add(config, range(count))
        return Outcome({"table": as_json(version)}, {"records_read": count + 2, "records_kept": count})

    return act


def raises(error: BaseException) -> Callable[[Config], Outcome]:
    def act(config: Config) -> Outcome:
        raise error

    return act


def run(
    store: str, act: Callable[[Config], Outcome], *settings: str, stage: str = "ingest", inputs: Any = None
) -> int:  # fmt: skip
    file = Path(store).parent / "c.yaml"
    file.write_text(f"storage: {{uri: {store}}}")
    made = Job(
        stage=stage,
        run=lambda config, taken: act(config),
        inputs=inputs or (lambda config: SOURCES),
        plan=lambda config, taken: {},
        sections=("ingestion",),
        packages=(),
        needs_cluster=False,
    )
    return made.main(["--config", str(file), *(part for setting in settings for part in ("--set", setting))])


def to(server: Server | str) -> str:
    return f"lineage.openlineage_uri={server if isinstance(server, str) else server.url}"


def of_file(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def states(events: list[dict[str, Any]]) -> list[str]:
    for event in events:
        assert problems(event) == []
    assert len({event["run"]["runId"] for event in events}) == 1
    return [event["eventType"] for event in events]


def warned(capsys: pytest.CaptureFixture[str]) -> list[str]:
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines() if line.startswith("{")]
    return [line["message"] for line in lines if line["level"] == "WARNING"]


def reason(event: dict[str, Any]) -> str:
    said: str = event["run"]["facets"]["errorMessage"]["message"]
    return said


# What is told


def test_a_run_is_told_to_a_server_from_its_start_to_the_table_version_it_made(server: Server, store: str) -> None:
    assert run(store, appends(10), to(server)) == 0
    assert states(server.events) == ["START", "COMPLETE"]
    assert {path for path, _, _ in server.requests} == {"/api/v1/lineage"}
    complete = server.events[1]
    assert complete["job"] | {"facets": None} == {"namespace": "rayloop", "name": "ingest", "facets": None}
    assert complete["job"]["facets"]["jobType"]["processingType"] == "BATCH"
    (table,) = complete["outputs"]
    assert (table["namespace"], table["name"]) == ("file", f"{store}/tables/support/conversations")
    config = Config().with_overrides({"storage.uri": store})
    snapshot = table_of(config).current_snapshot()
    facets = table["facets"]
    assert facets["version"]["datasetVersion"] == str(snapshot.snapshot_id)
    assert [column["name"] for column in facets["schema"]["fields"]] == SCHEMA.names
    assert facets["symlinks"]["identifiers"][0]["name"] == "support.conversations"
    size = sum(file.stat().st_size for file in Path(table["name"], "data").glob("*.parquet"))
    quality = facets["dataQualityMetrics"]
    assert (quality["rowCount"], quality["bytes"], quality["fileCount"]) == (10, size, 1)
    nulls = {name: column["nullCount"] for name, column in quality["columnMetrics"].items()}
    assert (nulls["conversation_id"], nulls["started_at"]) == (0, 10)
    written = table["outputFacets"]["outputStatistics"]
    assert (written["rowCount"], written["size"]) == (10, size)


def test_a_source_is_told_with_its_own_facets(server: Server, store: str) -> None:
    run(store, appends(10), to(server))
    for event in server.events:
        (source,) = event["inputs"]
        assert (source["namespace"], source["name"]) == ("file", "/data/in.jsonl")
        assert source["facets"]["version"]["datasetVersion"] == "d1"
        assert source["facets"]["dataSource"]["uri"] == "file:///data/in.jsonl"
        assert source["facets"]["dataQualityMetrics"]["bytes"] == 700
    assert server.events[1]["inputs"][0]["inputFacets"]["inputStatistics"]["rowCount"] == 12


def test_rows_of_the_version_and_rows_of_the_run_are_told_apart(server: Server, store: str) -> None:
    config = Config().with_overrides({"storage.uri": store})
    add(config, range(100, 140))
    run(store, appends(10), to(server))
    (table,) = server.events[1]["outputs"]
    assert table["facets"]["dataQualityMetrics"]["rowCount"] == 50
    assert table["outputFacets"]["outputStatistics"]["rowCount"] == 10


def test_a_file_gets_a_line_an_event_and_later_runs_are_added(store: str, tmp_path: Path) -> None:
    log = tmp_path / "new" / "events.jsonl"
    run(store, appends(3), to(str(log)))
    first = of_file(log)
    assert states(first) == ["START", "COMPLETE"]
    run(store, appends(4), to(log.as_uri()), "ingestion.sample.seed=9")
    assert of_file(log)[:2] == first
    assert states(of_file(log)[2:]) == ["START", "COMPLETE"]


def test_a_run_that_is_up_to_date_or_dry_tells_nothing(server: Server, store: str) -> None:
    file = Path(store).parent / "c.yaml"
    run(store, appends(3))
    assert run(store, appends(3), to(server)) == 0
    made = Job("ingest", raises(AssertionError()), lambda _: {}, lambda *_: {}, (), (), needs_cluster=False)  # type: ignore[arg-type]
    assert made.main(["--config", str(file), "--set", to(server), "--dry-run"]) == 0
    assert server.requests == []


def test_what_was_there_before_is_told_with_no_row_written(server: Server, store: str) -> None:
    config = Config().with_overrides({"storage.uri": store})
    there = add(config, range(5))
    run(store, lambda _: Outcome({"table": as_json(there)}, {}, "up_to_date"), to(server))
    (table,) = server.events[1]["outputs"]
    assert table["facets"]["version"]["datasetVersion"] == str(there.snapshot_id)
    assert table["outputFacets"]["outputStatistics"]["rowCount"] == 0


def test_training_goes_from_a_table_version_to_a_model_version(server: Server, store: str) -> None:
    config = Config().with_overrides({"storage.uri": store})
    taken = {"table": as_json(add(config, range(5)))}
    model = {"model": "support", "version": "3", "uri": f"{store}/models/support/run1"}
    run(store, lambda _: Outcome({"model": model}), to(server), stage="train", inputs=lambda _: taken)
    assert states(server.events) == ["START", "COMPLETE"]
    (table,), (made,) = server.events[1]["inputs"], server.events[1]["outputs"]
    assert table["facets"]["version"]["datasetVersion"] == str(taken["table"]["snapshot_id"])
    assert (made["name"], made["facets"]["version"]["datasetVersion"]) == (model["uri"], "3")
    assert made["facets"]["symlinks"]["identifiers"][0]["name"] == "support"


def test_an_output_that_was_an_input_is_told_as_that_alone(server: Server, store: str) -> None:
    model = {"model": "support", "version": "3", "uri": f"{store}/models/support/run1"}
    taken = {"model": model}
    run(store, lambda _: Outcome({"model": model, "champion": True}), to(server), inputs=lambda _: taken)
    assert [len(event["inputs"]) for event in server.events] == [1, 1]
    assert server.events[1]["outputs"] == []


def test_a_table_that_cannot_be_looked_at_is_told_by_name(
    server: Server, store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = {"table": {"table": "support.conversations", "snapshot_id": 4711}}
    assert run(store, lambda _: Outcome(gone), to(server)) == 0
    assert states(server.events) == ["START", "COMPLETE"]
    (table,) = server.events[1]["outputs"]
    assert (table["name"], table["facets"]) == ("support.conversations", {})
    assert any(
        "support.conversations@4711 is described to OpenLineage by its name alone" in text for text in warned(capsys)
    )


def test_the_run_that_started_this_one_is_its_parent(
    server: Server, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    handed_on: dict[str, str] = {}

    def starts_another(config: Config) -> Outcome:
        handed_on.update(openlineage.child_environment())
        return Outcome()

    run(store, starts_another, to(server), stage="lifecycle")
    parent = server.events[0]["run"]["runId"]
    monkeypatch.setenv(openlineage.PARENT, handed_on[openlineage.PARENT])
    run(store, appends(1), to(server))
    child = server.events[2]["run"]
    assert child["runId"] != parent
    assert child["facets"]["parent"]["run"]["runId"] == parent
    assert child["facets"]["parent"]["job"] | {"facets": {}} == {
        "namespace": "rayloop",
        "name": "lifecycle",
        "facets": {},
    }
    assert problems(server.events[2]) == []


def test_a_parent_that_cannot_be_read_is_a_wrong_setting(
    server: Server, store: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(openlineage.PARENT, "airflow/dag")
    assert run(store, appends(1), to(server)) == 2
    assert "OPENLINEAGE_PARENT_ID is 'airflow/dag': write it as namespace/job/run id" in capsys.readouterr().err


# Ends that are none


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (SourceError("no file at /x", "check the path"), 1, "no file at /x: check the path"),
        (StageRefused("refused 12 % of records", "correct the sources", {"read": 3}), 1, "refused 12 % of records"),
        (KeyError("anna@example.com said so"), 1, "unexpected KeyError"),
    ],
)
def test_a_failure_and_a_refusal_are_told_as_fail_with_the_reason(
    server: Server, store: str, error: Exception, code: int, said: str
) -> None:
    assert run(store, raises(error), to(server)) == code
    assert states(server.events) == ["START", "FAIL"]
    assert said in reason(server.events[1])
    assert "anna" not in reason(server.events[1])
    assert server.events[1]["outputs"] == []
    assert server.events[1]["inputs"] == server.events[0]["inputs"] != []


def test_inputs_that_are_not_there_are_told_as_a_run_that_failed(server: Server, store: str) -> None:
    def missing(config: Config) -> Any:
        raise SourceError("source '/gone' does not exist")

    assert run(store, appends(1), to(server), inputs=missing) == 1
    assert states(server.events) == ["START", "FAIL"]
    assert reason(server.events[1]) == "source '/gone' does not exist"


def test_sigterm_is_told_as_abort(server: Server, store: str) -> None:
    def stopped(config: Config) -> Outcome:
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()
        raise AssertionError

    before = signal.getsignal(signal.SIGTERM)
    try:
        assert run(store, stopped, to(server)) == 143
    finally:
        signal.signal(signal.SIGTERM, before)
    assert states(server.events) == ["START", "ABORT"]


# Secrets


def test_the_key_comes_from_the_environment_and_goes_into_the_header_alone(
    server: Server, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(store, raises(SourceError("x")), to(server))
    monkeypatch.setenv("OPENLINEAGE_API_KEY", "key-4711")
    run(store, appends(2), to(f"{server.url}/behind/a/proxy"))
    assert "Authorization" not in server.requests[0][1]
    for path, headers, event in server.requests[2:]:
        assert path == "/behind/a/proxy/api/v1/lineage"
        assert headers["Authorization"] == "Bearer key-4711"
        assert "key-4711" not in json.dumps(event)


def test_secrets_of_the_configuration_are_in_no_event(
    server: Server, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = "postgresql+psycopg://reader:hunter2@db.example:5432/shop"
    bucket = "s3://AKIAKEY:s3cr3t@chats/in?endpoint_override=minio&secret_key=s3cr3t"
    taken = {"sources": [{"uri": uri, "parts": 1, "bytes": 1, "digest": "d"} for uri in (database, bucket)]}
    failure = SourceError(f"cannot reach {database!r} (access to {bucket} with password=s3cr3t-too)", "ask anna@x.org")
    settings = [
        'ingestion.sources=[{"uri": "postgresql+psycopg://db.example/shop", "format": "sql", "query": "select 1"}]',
        "ingestion.privacy.secrets.badge=BADGE-[0-9]+",
        f"storage.catalog_uri={database}",
    ]
    given = {"table": {"table": "support.conversations", "snapshot_id": 1}}
    run(store, raises(failure), to(server), *settings, inputs=lambda _: taken)
    run(store, raises(SourceError("no BADGE-77 here")), to(server), *settings, inputs=lambda _: taken)
    run(store, lambda _: Outcome(given), to(server), *settings, inputs=lambda _: taken)
    assert [event["eventType"] for event in server.events] == ["START", "FAIL", "START", "FAIL", "START", "COMPLETE"]
    told = json.dumps(server.events)
    for planted in ("hunter2", "s3cr3t", "AKIAKEY", "reader", "anna@x.org", "BADGE-77"):
        assert planted not in told
    assert [(source["namespace"], source["name"]) for source in server.events[0]["inputs"]] == [
        ("postgres://db.example:5432", "shop"),
        ("s3://chats", "in"),
    ]
    assert reason(server.events[1]).startswith("cannot reach 'postgresql+psycopg://db.example:5432/shop'")


def test_a_reason_that_cannot_be_searched_for_secrets_is_not_told(
    server: Server, store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(store, raises(SourceError("no BADGE-77")), to(server), "ingestion.privacy.secrets.badge=BADGE-[") == 1
    assert states(server.events) == ["START", "FAIL"]
    assert reason(server.events[1]).startswith("not told, since it cannot be searched for secrets (")
    assert "BADGE-77" not in json.dumps(server.events)
    assert "ingest: no BADGE-77" in capsys.readouterr().err, "the job's own error is what it was"


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("ftp://host/x", "it is http://, https://, file:// or a local path"),
        ("http:///x", "it names no host"),
        ("http://user:pass@host", "it must hold no secret: put the server's key into OPENLINEAGE_API_KEY"),
        ("https://host/?key=1", "it must hold no secret"),
    ],
)
def test_an_address_that_will_not_do_is_refused(uri: str, said: str) -> None:
    with pytest.raises(ConfigError, match=r"lineage\.openlineage_uri") as caught:
        Config().with_overrides({"lineage.openlineage_uri": uri})
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("a://u:p@h/x and b://v@g/y?z=1 (c)", "a://h/x and b://g/y (c)"),
        ("postgresql://u:p@ss/w@host/db", "postgresql://host/db"),
        ("abfss://container@account.dfs.core.windows.net/x", "abfss://container@account.dfs.core.windows.net/x"),
        ("abfss://account:key@container/x", "abfss://container/x"),
        ("hdfs://name:9000/user@home", "hdfs://name:9000/user@home"),
        ("kafka://a:9092,b:9092/chats", "kafka://a:9092,b:9092/chats"),
        ("s3://bucket/anna@home", "s3://bucket/anna@home"),
        ("support.conversations@4711", "support.conversations@4711"),
    ],
)
def test_credentials_are_taken_out_and_nothing_else(text: str, left: str) -> None:
    assert public(text) == left


@pytest.mark.parametrize(
    ("uri", "namespace", "name"),
    [
        ("/data/in.jsonl", "file", "/data/in.jsonl"),
        ("file:///data/in.jsonl", "file", "/data/in.jsonl"),
        ("s3://bucket/a/*.jsonl", "s3://bucket", "a/*.jsonl"),
        ("gs://bucket", "gs://bucket", "/"),
        ("hdfs://name:9000/a/b", "hdfs://name:9000", "/a/b"),
        ("abfss://box@acct.dfs.core.windows.net/a", "abfss://box@acct.dfs.core.windows.net", "a"),
        ("kafka://a:9092,b:9092/chats", "kafka://a:9092", "chats"),
        ("postgresql+psycopg://u@h:5432/shop", "postgres://h:5432", "shop"),
        ("sample:shop", "rayloop", "sample:shop"),
        ("traffic:", "file", "/store/traffic"),
    ],
)
def test_places_are_named_as_the_specification_has_it(uri: str, namespace: str, name: str) -> None:
    assert place(Config().with_overrides({"storage.uri": "/store"}), uri) == (namespace, name)


def test_an_iceberg_source_is_the_place_of_its_table(store: str) -> None:
    config = Config().with_overrides({"storage.uri": store})
    add(config, [1])
    assert place(config, "iceberg:support.conversations") == ("file", f"{store}/tables/support/conversations")


# Servers that are not there


def test_a_server_that_is_down_is_named_and_stops_nothing(
    store: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openlineage, "TIMEOUT_S", 60.0)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        started_s = time.monotonic()
        assert run(store, appends(2), to(url)) == 0
    assert time.monotonic() - started_s < openlineage.TIMEOUT_S
    texts = warned(capsys)
    assert [text.split(" (")[0] for text in texts] == [
        f"the START event of ingest was not delivered to {url}",
        f"the COMPLETE event of ingest was not delivered to {url}",
    ]
    assert "Connection refused" in texts[0]


def test_a_server_that_never_answers_is_waited_for_once(
    store: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openlineage, "TIMEOUT_S", 3.0)
    monkeypatch.setattr(openlineage, "IMPATIENT_S", 0.2)
    stop = threading.Event()

    def drip(listening: socket.socket) -> None:
        # A byte now and then keeps each wait of an HTTP client short and its whole endless.
        connection, _ = listening.accept()
        with connection:
            connection.sendall(b"HTTP/1.1 200 OK\r\n")
            while not stop.wait(0.1):
                connection.sendall(b"x")

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=drip, args=[listening], daemon=True)
        thread.start()
        config = Config().with_overrides(
            {"storage.uri": store, "lineage.openlineage_uri": f"http://127.0.0.1:{listening.getsockname()[1]}"}
        )
        with openlineage.reporting(config, "ingest", "local") as run:
            started_s = time.monotonic()
            run.start(SOURCES)
            waited_s = time.monotonic() - started_s
            run.complete({}, {})
            then_s = time.monotonic() - started_s - waited_s
        stop.set()
        thread.join()
    assert waited_s >= 3.0
    assert 0.2 <= then_s < 3.0
    assert "(no answer within 3 s); the job goes on" in caplog.text


@pytest.mark.parametrize("status", [401, 500])
def test_a_server_that_says_no_is_warned_of(
    server: Server, store: str, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    server.status = status
    assert run(store, appends(2), to(server)) == 0
    assert len(server.requests) == 2, "each event is tried, once"
    assert [f"({status} " in text for text in warned(capsys)] == [True, True]


def test_a_file_that_cannot_be_written_is_warned_of(
    store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(store, appends(2), to(str(tmp_path))) == 0
    assert warned(capsys)[0].startswith(f"the START event of ingest was not delivered to {tmp_path} (")


# The check itself


def test_events_that_break_the_schema_are_found(server: Server, store: str) -> None:
    run(store, appends(2), to(server))
    good = server.events[1]
    assert problems(good) == []

    def broken(change: Callable[[dict[str, Any]], Any]) -> list[str]:
        event = json.loads(json.dumps(good))
        change(event)
        return problems(event)

    quality = ("outputs", 0, "facets", "dataQualityMetrics")
    for change, said in [
        (lambda event: event["run"].pop("runId"), "'runId' is a required property"),
        (lambda event: event["run"].update(runId="4711"), "is not a 'uuid'"),
        (lambda event: event.update(eventTime="2026-11-24 10:00"), "is not a 'date-time'"),
        (lambda event: event.update(eventType="END"), "is not valid under any of the given schemas"),
        (lambda event: event.pop("producer"), "'producer' is a required property"),
        (lambda event: _at(event, *quality).update(rowCount="many"), "dataQualityMetrics"),
        (lambda event: _at(event, *quality).pop("columnMetrics"), "'columnMetrics' is a required property"),
        (lambda event: _at(event, *quality).pop("_producer"), "'_producer' is a required property"),
        (lambda event: _at(event, "job", "facets").update(rows={}), "no facet of the specification is called rows"),
    ]:
        assert any(said in problem for problem in broken(change)), said


def _at(value: Any, *path: str | int) -> Any:
    for step in path:
        value = value[step]
    return value
