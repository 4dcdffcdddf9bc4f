"""The whole path as a user walks it: `ray job submit`, a kill on the way, the same command again, a chat."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI
from ray.job_submission import JobStatus, JobSubmissionClient

from tests.conftest import ROOT, RunningCluster

CONFIG = """
storage: {{uri: {store}}}
ingestion:
  sample: {{conversations: 1500}}
training:
  base_model: preset:tiny
  vocab_size: 600
  block_tokens: 128
  max_steps: 80
  report_every_steps: 20
  validation_blocks: 16
  learning_rate: 5e-3
  optimizer: muon
  precision: bf16
tuning: {{trials: 2, concurrent_trials: 2, max_steps: 4, grace_steps: 2}}
compression: {{max_perplexity_increase: 0.2, min_bytes_reduction: 0.1}}
evaluation: {{replies: 24, max_reply_tokens: 16}}
serving: {{port: {port}}}
monitoring: {{interval_s: 2}}
"""

pytestmark = pytest.mark.timeout(1_800)  # three whole paths are walked before the first test

STAGES = ["ingest", "tune", "train", "compress", "evaluate", "serve", "monitor"]


@pytest.fixture(scope="module")
def config(cluster: RunningCluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lifecycle")
    file = folder / "tiny.yaml"
    file.write_text(CONFIG.format(store=folder / "store", port=cluster.http_port))
    return file


@pytest.fixture(scope="module")
def client(cluster: RunningCluster) -> JobSubmissionClient:
    return JobSubmissionClient(cluster.dashboard_url)


def submit(verb: str, config: Path, *more: str) -> subprocess.Popen[str]:
    ray = str(Path(sys.executable).parent / "ray")
    command = [ray, "job", "submit", "--working-dir", str(ROOT), "--", "python", "-m", f"jobs.{verb}", "--config"]
    return subprocess.Popen(
        [*command, str(config), *more], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ
    )


def finished(process: subprocess.Popen[str]) -> dict[str, Any]:
    output, _ = process.communicate(timeout=580)
    lines = [line for line in output.splitlines() if line.startswith('{"stage": ')]
    assert lines, output[-3000:]
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def processes_running(module: str) -> list[int]:
    """Process ids of `python -m <module>`."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdigit() else []
        except OSError:
            continue
        if words[1:3] == [b"-m", module.encode()]:
            found.append(int(entry.name))
    return found


@pytest.fixture(scope="module")
def lines(config: Path, client: JobSubmissionClient) -> dict[str, Any]:
    """Last lines of a path that was killed while it trained, of the one after it, and of a third."""
    killed = submit("lifecycle", config)
    deadline_s = time.monotonic() + 300
    while not processes_running("jobs.train"):
        assert killed.poll() is None, killed.communicate()[0][-3000:]
        assert time.monotonic() < deadline_s, "training never started"
        time.sleep(0.2)
    for pid in processes_running("jobs.lifecycle"):
        os.kill(pid, signal.SIGKILL)
    output, _ = killed.communicate(timeout=120)
    assert killed.returncode != 0
    assert '{"stage": "lifecycle"' not in output, "the kill came too late"
    resumed = finished(submit("lifecycle", config))
    return {"resumed": resumed, "again": finished(submit("lifecycle", config))}


def test_a_killed_path_goes_on_where_it_stopped(
    lines: dict[str, Any], client: JobSubmissionClient, config: Path
) -> None:
    line = lines["resumed"]
    assert line["error"] is None
    assert list(line["figures"]) == STAGES
    assert [line["figures"][stage]["status"] for stage in ("ingest", "tune")] == ["up_to_date", "up_to_date"]
    for stage in STAGES[:3]:
        assert len(jobs_of(client, stage, config)) == 1, f"{stage} was repeated"


def jobs_of(client: JobSubmissionClient, stage: str, config: Path) -> list[Any]:
    """Those of this path: other tests submit jobs to the same cluster."""
    jobs = [job for job in client.list_jobs() if (job.metadata or {}).get("rayloop_stage") == stage]
    return [job for job in jobs if str(config) in job.entrypoint]


def test_every_stage_is_a_job_of_its_own(lines: dict[str, Any], client: JobSubmissionClient, config: Path) -> None:
    for stage in STAGES:
        assert jobs_of(client, stage, config), stage
        assert all(job.status == JobStatus.SUCCEEDED for job in jobs_of(client, stage, config))


def test_a_second_run_finds_everything_up_to_date(lines: dict[str, Any]) -> None:
    statuses = {stage: figures["status"] for stage, figures in lines["again"]["figures"].items()}
    assert statuses == dict.fromkeys(STAGES[:-1], "up_to_date") | {"monitor": "done"}


def test_the_winner_of_the_search_is_what_was_trained(lines: dict[str, Any], config: Path) -> None:
    overrides = lines["resumed"]["outputs"]["tune"]["overrides"]
    receipts = list((config.parent / "store" / "receipts" / "train").iterdir())
    trained = json.loads(receipts[0].read_text())["config"]["training"]
    assert overrides["training.learning_rate"] == trained["learning_rate"]


def test_the_chatbot_answers_the_openai_client(lines: dict[str, Any], cluster: RunningCluster) -> None:
    api = OpenAI(base_url=f"http://127.0.0.1:{cluster.http_port}/v1", api_key=cluster.api_key)
    question = [{"role": "user", "content": "Where is my order 4512?"}]
    whole = api.chat.completions.create(model="support", messages=question, temperature=0, max_tokens=20)
    parts = api.chat.completions.create(model="support", messages=question, temperature=0, max_tokens=20, stream=True)
    streamed = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert whole.choices[0].message.content == streamed != ""


def test_why_leads_from_the_answer_to_the_source(lines: dict[str, Any], cluster: RunningCluster, config: Path) -> None:
    headers = {"Authorization": f"Bearer {cluster.api_key}"}
    base = f"http://127.0.0.1:{cluster.http_port}/v1"
    body = {"model": "support", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8}
    answer = httpx.post(f"{base}/chat/completions", json=body, headers=headers, timeout=60).json()
    chain = json.dumps(httpx.get(f"{base}/why/{answer['id']}", headers=headers, timeout=60).json())
    snapshot = lines["resumed"]["outputs"]["ingest"]["table"]["snapshot_id"]
    assert str(snapshot) in chain
    assert "sample:shop" in chain
    command = [sys.executable, "-m", "jobs.why", answer["id"], "--config", str(config)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    assert str(snapshot) in process.stdout


def test_a_misspelt_key_ends_a_submitted_job_with_code_two(cluster: RunningCluster, config: Path) -> None:
    process = submit("ingest", config, "--set", "ingestion.tabel=x")
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "did you mean 'table'?" in output
    assert "exit code 2" in output.lower().replace("exited with code", "exit code")
