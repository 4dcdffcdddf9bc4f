"""What `jobs.ingest` tells OpenLineage: batches, refusals, failures and a stream."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app import tables
from app.config import Config
from jobs.ingest import JOB
from tests.conftest import ROOT
from tests.integration.test_follow import Brokers, messages
from tests.integration.test_follow import brokers as kafka  # noqa: F401
from tests.openlineage_schema import problems

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.fixture
def arguments(tmp_path: Path, store: str) -> Iterator[list[str]]:
    file = tmp_path / "ingest.yaml"
    file.write_text(f"storage: {{uri: {store}}}\nlineage: {{openlineage_uri: {tmp_path}/events.jsonl}}\n")
    before = signal.getsignal(signal.SIGTERM)
    yield ["--config", str(file), "--set", "ingestion.near_duplicates.detect=false"]
    signal.signal(signal.SIGTERM, before)


def reads(source: dict[str, Any]) -> list[str]:
    return ["--set", f"ingestion.sources=[{json.dumps(source)}]"]


def events(tmp_path: Path) -> list[dict[str, Any]]:
    told = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [problems(event) for event in told] == [[]] * len(told)
    return told


def states(told: list[dict[str, Any]]) -> list[str]:
    assert len({event["run"]["runId"] for event in told}) == 1
    return [event["eventType"] for event in told]


def written(event: dict[str, Any]) -> tuple[int, int, int]:
    """Version, its rows, and rows that were added."""
    (table,) = event["outputs"]
    quality = table["facets"]["dataQualityMetrics"]
    version = int(table["facets"]["version"]["datasetVersion"])
    return version, quality["rowCount"], table["outputFacets"]["outputStatistics"]["rowCount"]


def versions(store: str) -> list[int]:
    table = tables.open_table(Config().with_overrides({"storage.uri": store}).storage, "support.conversations")
    return [snapshot.snapshot_id for snapshot in table.snapshots()]


def test_an_ingest_is_told_from_its_file_to_its_version(arguments: list[str], store: str, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(b"\n".join([*messages(*range(40)), b"{broken"]))
    assert JOB.main([*arguments, *reads({"uri": str(source), "format": "jsonl"})]) == 0
    told = events(tmp_path)
    assert states(told) == ["START", "COMPLETE"]
    assert written(told[1]) == (versions(store)[-1], 40, 40)
    (read,) = told[1]["inputs"]
    assert (read["namespace"], read["name"]) == ("file", str(source))
    assert read["facets"]["dataQualityMetrics"]["bytes"] == source.stat().st_size
    assert read["inputFacets"]["inputStatistics"]["rowCount"] == 41
    nulls = told[1]["outputs"][0]["facets"]["dataQualityMetrics"]["columnMetrics"]
    assert (nulls["source"]["nullCount"], nulls["position"]["nullCount"], nulls["started_at"]["nullCount"]) == (
        0,
        0,
        40,
    )


def test_a_refused_ingest_is_told_as_fail_without_what_customers_wrote(
    arguments: list[str], store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in.jsonl"
    bad = b'{"conversation_id": "a", "messages": "I am anna@example.com"}'
    source.write_bytes(b"\n".join([*messages(*range(4)), *[bad] * 6]))
    assert JOB.main([*arguments, *reads({"uri": str(source), "format": "jsonl"})]) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["status"] == "refused"
    told = events(tmp_path)
    assert states(told) == ["START", "FAIL"]
    assert told[1]["run"]["facets"]["errorMessage"]["message"].startswith("refused 60.0% of 10 records")
    assert told[1]["outputs"] == []
    assert "anna" not in json.dumps(told)
    assert versions(store) == []


def test_an_ingest_of_a_file_that_is_cut_short_is_told_as_fail(arguments: list[str], tmp_path: Path) -> None:
    source = tmp_path / "in.parquet"
    source.write_bytes(b"PAR1 and no more")
    assert JOB.main([*arguments, *reads({"uri": str(source), "format": "parquet"})]) == 1
    told = events(tmp_path)
    assert states(told) == ["START", "FAIL"]
    assert f"cannot read {source} as parquet" in told[1]["run"]["facets"]["errorMessage"]["message"]


def test_a_stream_is_one_run_with_an_event_for_each_version_it_makes(
    arguments: list[str],
    store: str,
    tmp_path: Path,
    kafka: Brokers,  # noqa: F811
) -> None:
    kafka.send(messages(*range(60)))
    source = {"uri": f"kafka://{kafka.servers}/chats", "format": "kafka", "name": "chats"}
    settings = ["--follow", "--set", "ingestion.follow.max_batches=2", "--set", "ingestion.follow.max_rows=30"]
    assert JOB.main([*arguments, *reads(source), *settings, "--set", "ingestion.follow.interval_s=0.2"]) == 0
    told = events(tmp_path)
    assert states(told) == ["START", "RUNNING", "RUNNING", "COMPLETE"]
    first, second = versions(store)
    assert [written(event) for event in told[1:]] == [(first, 30, 30), (second, 60, 30), (second, 60, 60)]
    for event in told:
        assert event["job"]["facets"]["jobType"]["processingType"] == "STREAMING"
        assert [(entry["namespace"], entry["name"]) for entry in event["inputs"]] == [
            (f"kafka://{kafka.servers.split(',')[0]}", "chats")
        ]


def test_a_stream_that_is_asked_to_stop_is_told_as_complete(arguments: list[str], store: str, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(messages(*range(10))))
    read = reads({"uri": str(tmp_path / "in.jsonl"), "format": "jsonl"})
    command = [sys.executable, "-m", "jobs.ingest", *arguments, *read, "--follow"]
    stream = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline_s = time.monotonic() + 180
    while '"RUNNING"' not in (file.read_text() if (file := tmp_path / "events.jsonl").exists() else ""):
        assert stream.poll() is None, stream.communicate()[0]
        assert time.monotonic() < deadline_s
        time.sleep(0.1)
    stream.send_signal(signal.SIGTERM)
    output = stream.communicate(timeout=60)[0]
    assert json.loads(output.splitlines()[-1])["status"] == "done", output
    told = events(tmp_path)
    assert states(told) == ["START", "RUNNING", "COMPLETE"]
    assert written(told[2]) == (versions(store)[-1], 10, 10)


def test_stages_of_a_lifecycle_name_its_run_as_their_parent(arguments: list[str], tmp_path: Path) -> None:
    settings = ["lifecycle.stages=[ingest]", "ingestion.sample.conversations=50", "ingestion.drift.detect=false"]
    more = [part for setting in settings for part in ("--set", setting)]
    ray = str(Path(sys.executable).parent / "ray")
    command = [ray, "job", "submit", "--working-dir", str(ROOT), "--", "python", "-m", "jobs.lifecycle"]
    done = subprocess.run([*command, *arguments, *more], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    told = events(tmp_path)
    assert [(event["job"]["name"], event["eventType"]) for event in told] == [
        ("lifecycle", "START"),
        ("ingest", "START"),
        ("ingest", "COMPLETE"),
        ("lifecycle", "COMPLETE"),
    ]
    path, stage = told[0]["run"], told[1]["run"]
    assert "parent" not in path["facets"]
    assert stage["facets"]["parent"]["run"]["runId"] == path["runId"] != stage["runId"]
    assert stage["facets"]["externalQuery"]["externalQueryId"].startswith("ingest-")
    assert told[3]["outputs"][0]["facets"]["version"] == told[2]["outputs"][0]["facets"]["version"]
