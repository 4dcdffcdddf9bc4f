"""The monitor job on the real cluster, its application after the job has ended, and a real Prometheus.

Every PromQL expression of the dashboard is executed against that Prometheus and must return a series. The serving
and training metrics come from a small actor that uses the same definitions as the stages do.
"""

import json
import math
import os
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray.job_submission import JobSubmissionClient

from app import deployment, telemetry, traffic
from app.monitoring import grafana
from app.storage import Storage
from app.traffic import TrafficLog
from jobs import monitor
from tests.conftest import ROOT, RunningCluster
from tests.traffic_records import exchange, feedback, of_the_secret

PROMETHEUS = shutil.which("prometheus")
DASHBOARD = grafana.read()
EXPRESSIONS = [(panel["title"], target["expr"]) for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]
INTENTS = ["track_order", "refund", "größe"]


@dataclass(frozen=True)
class Watched:
    """A store with traffic, what the job that measured it said, and where the job's report is."""

    store: str
    config: Path
    line: dict[str, Any]
    log: str


def run_job(arguments: list[str]) -> tuple[dict[str, Any], str]:
    """Submit the job as users do; returns its last line and its whole log."""
    client = JobSubmissionClient()
    submission = client.submit_job(
        entrypoint=" ".join(["python", "-m", "jobs.monitor", *arguments]), runtime_env={"working_dir": str(ROOT)}
    )
    while not client.get_job_status(submission).is_terminal():
        time.sleep(0.5)
    log = client.get_job_logs(submission)
    return json.loads(log.splitlines()[-1]), log


def log_traffic(store: str) -> None:
    """Sixty exchanges, half with feedback, on two variants, in a file with a torn last line; one file apart."""
    log = TrafficLog(Storage(store), traffic.new_writer("first"))
    for number in range(60):
        log.append(
            exchange(
                number,
                received_at=traffic.now(),
                variant="candidate" if number % 4 == 0 else "champion",
                intent=INTENTS[number % 3],
                handover="reply_confidence" if number % 20 == 0 else None,
                status="cancelled" if number % 30 == 0 else "ok",
                time_to_first_token_s=0.01 * (number + 1),
                end_to_end_s=0.02 * (number + 1),
            )
        )
        if number % 2 == 0:
            rating, intent = (1 if number % 6 else -1), (INTENTS[number % 3] if number % 10 else "else")
            log.append(feedback(number, received_at=traffic.now(), rating=rating, intent=intent))
    (file,) = (Path(store) / "traffic" / "exchanges").iterdir()
    with file.open("ab") as stream:
        stream.write(b'{"kind": "exchange", "response_id": "chat')
    apart = TrafficLog(Storage(store), traffic.new_writer("apart"))
    apart.append(exchange(99, received_at=traffic.now(), variant="retired", intent="vanishing"))


@pytest.fixture(scope="module")
def watched(cluster: RunningCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """Traffic, and the job run on it; its application goes with the fixture."""
    folder = tmp_path_factory.mktemp("monitor")
    store, config = str(folder / "store"), folder / "config.yaml"
    config.write_text(
        f"storage: {{uri: {store}}}\nmonitoring: {{interval_s: 1}}\nserving: {{port: {cluster.http_port}}}\n"
    )
    log_traffic(store)
    line, log = run_job(["--config", str(config)])
    assert line["status"] == "done", log
    yield Watched(store, config, line, log)
    deployment.remove("monitor")


@ray.remote(num_cpus=0)
class Stages:
    """Emits what serving and training emit, with their own definitions of the metrics."""

    def emit(self, seconds: float) -> None:
        ends_s = time.monotonic() + seconds
        requests, feedbacks = telemetry.counter(telemetry.REQUESTS), telemetry.counter(telemetry.FEEDBACK)
        handovers = telemetry.counter(telemetry.HANDOVERS)
        tokens = [telemetry.counter(metric) for metric in (telemetry.COMPLETION_TOKENS, telemetry.PROMPT_TOKENS)]
        times = [
            telemetry.histogram(metric) for metric in (telemetry.TIME_TO_FIRST_TOKEN, telemetry.END_TO_END_LATENCY)
        ]
        slots = telemetry.gauge(telemetry.SLOTS_IN_USE)
        training = [
            telemetry.gauge(metric)
            for metric in (
                telemetry.TRAINING_LOSS,
                telemetry.VALIDATION_LOSS,
                telemetry.TRAINING_TOKENS_PER_SECOND,
            )
        ]
        while time.monotonic() < ends_s:
            requests.inc(tags={"route": "/v1/chat/completions", "status": "200"})
            feedbacks.inc(tags={"variant": "champion", "rating": "positive"})
            handovers.inc(tags={"reason": "intent"})
            slots.set(3, tags={"variant": "champion"})
            for counter in tokens:
                counter.inc(7, tags={"variant": "champion"})
            for histogram in times:
                histogram.observe(0.2, tags={"variant": "champion"})
            for gauge in training:
                gauge.set(1.5, tags={"run": "r1"})
            time.sleep(0.25)


@dataclass(frozen=True)
class Prometheus:
    """A running server."""

    url: str

    def series(self, expression: str) -> list[dict[str, Any]]:
        """The series that an expression gives now; an expression that does not parse raises HTTPError."""
        expression = expression.replace("$__rate_interval", "40s")
        with urllib.request.urlopen(f"{self.url}/api/v1/query?{urllib.parse.urlencode({'query': expression})}") as got:
            found: list[dict[str, Any]] = json.load(got)["data"]["result"]
        return found

    def values(self, expression: str, tag: str = "") -> dict[str, float]:
        """Each series' value by one of its tags."""
        return {one["metric"].get(tag, ""): float(one["value"][1]) for one in self.series(expression)}


@pytest.fixture(scope="module")
def prometheus(cluster: RunningCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Our own configuration, with the state folder of this cluster and a shorter interval."""
    if PROMETHEUS is None:
        pytest.skip("prometheus is not installed: apt-get install prometheus")
    folder = tmp_path_factory.mktemp("prometheus")
    state = Path(os.environ["RAY_AUTH_TOKEN_PATH"]).parent
    text = (ROOT / "cluster" / "monitoring" / "prometheus.yml").read_text()
    assert "../../.rayloop/" in text
    text = text.replace("../../.rayloop/", f"{state}/").replace("scrape_interval: 10s", "scrape_interval: 2s")
    text = text.replace("scrape_timeout: 5s", "scrape_timeout: 2s")
    (folder / "prometheus.yml").write_text(text)
    shutil.copy(ROOT / "cluster" / "monitoring" / "alerts.yml", folder)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [
        PROMETHEUS, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address={address}", "--log.level=warn",
    ]  # fmt: skip
    server = subprocess.Popen(command, stderr=(folder / "log").open("wb"))
    stages = Stages.remote()
    stages.emit.remote(600)
    try:
        yield Prometheus(f"http://{address}")
    finally:
        ray.kill(stages)
        server.terminate()
        server.wait(timeout=30)


def wait_for(condition: Any, what: str) -> None:
    """Ray exports every 10 s and forgets after 20: three minutes are far beyond both."""
    ends_s = time.monotonic() + 180
    while not condition():
        assert time.monotonic() < ends_s, f"waited in vain for {what}"
        time.sleep(1)


# Order matters below: Prometheus collects while the job runs.


def test_prometheus_and_the_job_start(prometheus: Prometheus, watched: Watched) -> None:
    assert watched.line["inputs"]["traffic"].startswith(watched.store)
    assert watched.line["figures"]["dashboard"] == "not pushed: monitoring.grafana_url is not set"


def test_figures_are_those_of_the_traffic(watched: Watched) -> None:
    figures = watched.line["figures"]
    assert (figures["exchanges"], figures["feedback"], figures["cancelled"]) == (61, 30, 2)
    assert figures["time_to_first_token_s_p50"] == pytest.approx(0.3, abs=0.01)
    assert figures["positive_fraction"] == pytest.approx(20 / 30)
    assert figures["intent_accuracy"] == pytest.approx(24 / 30)
    assert {name: one["exchanges"] for name, one in figures["variants"].items()} == {
        "candidate": 15, "champion": 45, "retired": 1,
    }  # fmt: skip
    assert figures["handovers"] == {"reply_confidence": 3}


def test_report_is_there_and_no_word_of_a_customer_anywhere(watched: Watched) -> None:
    page = Path(watched.line["outputs"]["report"])
    texts = [page.read_text(), page.with_name("report.json").read_text(), watched.log, json.dumps(watched.line)]
    assert "größe" in texts[0]
    for text in texts:
        assert of_the_secret(text) == []


def test_a_dry_run_is_never_up_to_date_and_writes_nothing(watched: Watched, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(Path(watched.store).rglob("*"))
    assert monitor.JOB.main(["--config", str(watched.config), "--dry-run"]) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["status"] == "done"
    plan = line["figures"]["plan"]
    assert plan["reads"]["files"] == 3
    assert plan["reads"]["bytes"] > 10_000
    assert plan["deploys"]["route_prefix"] is None
    assert sorted(Path(watched.store).rglob("*")) == before


def test_a_grafana_that_is_down_does_not_fail_the_stage(
    watched: Watched, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYLOOP_GRAFANA_TOKEN", "glsa_secret-of-the-test")
    down = ["--set", "monitoring.grafana_url=http://127.0.0.1:9", "--set", "monitoring.deploy=false"]
    assert monitor.JOB.main(["--config", str(watched.config), *down]) == 0
    said = capsys.readouterr()
    line = json.loads(said.out.splitlines()[-1])
    assert line["status"] == "done"
    assert line["figures"]["dashboard"] == "not pushed: Grafana cannot be reached (ConnectionError)"
    assert "glsa_secret" not in said.out + said.err
    assert not any("glsa_secret" in file.read_text() for file in Path(watched.store, "receipts").rglob("*.json"))


def test_application_watches_on_after_the_job_without_a_route(cluster: RunningCluster, watched: Watched) -> None:
    assert deployment.status("monitor") == "RUNNING"
    running = deployment.deployed("monitor")
    assert running is not None
    assert running["route_prefix"] is None
    log = TrafficLog(Storage(watched.store), traffic.new_writer("late"))
    log.append(exchange(500, received_at=traffic.now(), variant="late"))

    def exported() -> bool:
        text = urllib.request.urlopen(cluster.metrics_url).read().decode()
        return 'variant="late"' in text

    wait_for(exported, "an exchange that was logged after the job had ended")


def test_every_expression_of_the_dashboard_gives_a_series(prometheus: Prometheus, watched: Watched) -> None:
    assert len(EXPRESSIONS) >= 20
    missing: list[tuple[str, str]] = EXPRESSIONS

    def all_found() -> bool:
        nonlocal missing
        missing = [(title, expression) for title, expression in EXPRESSIONS if not numbers(expression)]
        return not missing

    def numbers(expression: str) -> bool:
        found = prometheus.series(expression)
        return bool(found) and not any(math.isnan(float(one["value"][1])) for one in found)

    try:
        wait_for(all_found, "a series for every expression")
    except AssertionError:
        pytest.fail(f"no series for {missing}")


def test_monitored_metrics_have_the_values_of_the_traffic(prometheus: Prometheus, watched: Watched) -> None:
    expected = {"candidate": 15, "champion": 45, "retired": 1, "late": 1}
    exchanges = "max by (variant) (ray_rayloop_monitored_exchanges)"
    wait_for(lambda: prometheus.values(exchanges, "variant") == expected, f"the exchanges to be {expected}")
    assert prometheus.values("max(ray_rayloop_monitored_intent_accuracy)") == {"": pytest.approx(0.8)}
    # The gauges are set one after another: Ray may have exported them in between.
    counts = {"track_order": 21, "refund": 20, r"gr\xf6\xdfe": 20, "vanishing": 1}
    intents = "max by (intent) (ray_rayloop_monitored_intents)"
    wait_for(lambda: prometheus.values(intents, "intent") == counts, f"the intents to be {counts}")
    assert of_the_secret(urllib.request.urlopen(os.environ["RAYLOOP_METRICS"]).read().decode()) == []


def test_a_label_that_left_the_window_leaves_the_metrics(prometheus: Prometheus, watched: Watched) -> None:
    for file in (Path(watched.store) / "traffic" / "exchanges").glob("*apart*"):
        file.unlink()
    gone = ("ray_rayloop_monitored_intents{intent='vanishing'}", "ray_rayloop_monitored_exchanges{variant='retired'}")
    wait_for(lambda: not any(prometheus.series(one) for one in gone), "the vanished intent and variant to go")
    assert prometheus.series("ray_rayloop_monitored_exchanges{variant='champion'}")


def test_prometheus_configuration_is_valid() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed: apt-get install prometheus")
    file = ROOT / "cluster" / "monitoring" / "prometheus.yml"
    checked = subprocess.run([promtool, "check", "config", str(file)], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_alerts_fire_at_the_first_bad_loss_and_at_many(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed: apt-get install prometheus")
    file = ROOT / "cluster" / "monitoring" / "alerts.yml"
    rules = {rule["alert"]: rule for rule in yaml.safe_load(file.read_text())["groups"][0]["rules"]}

    def alert(name: str, run: str) -> dict[str, Any]:
        texts = {key: text.replace("{{ $labels.run }}", run) for key, text in rules[name]["annotations"].items()}
        return {"exp_labels": {"run": run, **rules[name]["labels"]}, "exp_annotations": texts}

    series = "ray_rayloop_training_bad_losses_total"
    expected = [  # the first bad loss is counted in minute 12
        ("TrainingLossIsBad", 14, ["often", "once"]),
        ("TrainingLossIsBad", 30, []),
        ("TrainingLossStaysBad", 14, []),
        ("TrainingLossStaysBad", 30, ["often"]),
    ]
    test = {
        "interval": "1m",
        "input_series": [
            {"series": f'{series}{{run="once"}}', "values": "_x12 1x30"},
            {"series": f'{series}{{run="often"}}', "values": "_x12 1+1x30"},
        ],
        "alert_rule_test": [
            {"alertname": name, "eval_time": f"{minute}m", "exp_alerts": [alert(name, run) for run in runs]}
            for name, minute, runs in expected
        ],
    }
    (tmp_path / "test.yml").write_text(yaml.safe_dump({"rule_files": [str(file)], "tests": [test]}))
    command = [promtool, "test", "rules", "test.yml"]
    checked = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr
