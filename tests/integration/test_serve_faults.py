"""Serving while replicas, the controller, the proxy and the cluster's control store are killed, and calls fail."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import ray
import yaml

from tests.answering_model import ANSWERS, ENDLESS
from tests.conftest import ROOT
from tests.faults import Fault
from tests.integration.test_ingest_faults import children, raylets
from tests.integration.test_serve import eventually, pids
from tests.shop import Shop, front_door, gone, running, told
from tests.users import Users

pytestmark = pytest.mark.timeout(1_800)


def system_process(title: str) -> int | None:
    """The process of one of Serve's own actors."""
    found = [pid for raylet in raylets() for pid, command in children(raylet).items() if title in command]
    return found[0] if len(found) == 1 else None


@pytest.mark.slow
@pytest.mark.fault("F17", seen="requests were on the replica, by its own count; it is gone from /proc")
def test_a_killed_replica_costs_at_most_what_was_in_flight_on_it(shop: Shop, fault: Fault) -> None:
    shop.serve("serving.language_model.replicas=2")
    before = eventually(lambda: len(running("LanguageModel")) == 2 and running("LanguageModel"))
    answers = {**ANSWERS, ENDLESS: shop.ask(ENDLESS, max_tokens=200).text}
    questions = [*ANSWERS, *[ENDLESS] * len(ANSWERS)]
    with Users(shop.url, shop.key, 16, questions, fault.random, body=lambda question: {"max_tokens": 200}) as users:
        users.answers_after(40)
        time.sleep(fault.random.uniform(0, 2))
        victim = fault.random.choice(sorted(before))
        actor = ray.get_actor(before[victim]["actor_name"], namespace="serve")
        counts = [0, 1]
        for _ in range(50):
            users.hold()
            while counts[-1] > counts[-2]:  # what is on its way arrives
                time.sleep(0.1)
                counts.append(ray.get(actor.get_num_ongoing_requests.remote(), timeout=60))
            if counts[-1] >= 3:
                break
            users.go_on()
            time.sleep(fault.random.uniform(0.2, 0.6))
            counts = [0, 1]
        on_it, in_flight = counts[-1], users.open
        assert on_it >= 3, counts
        os.kill(victim, signal.SIGKILL)
        killed_s = time.monotonic()
        fault.happened()
        users.go_on()
        eventually(lambda: len(running("LanguageModel").keys() - {victim}) == 2)
        fault.recovered()
        ready_s = time.monotonic() - killed_s
        users.answers_after(40)
    assert gone(victim)
    assert users.wrong(answers) == []
    assert [asked for asked in users.failed if asked not in in_flight] == [], "only what was under way may fail"
    assert 0 < len(users.failed) <= on_it, told(users.failed)
    assert [asked for asked in users.failed if asked.is_silent] == [], "a stream that is cut says so"
    assert {(asked.status, asked.error) for asked in users.failed if not asked.stream} <= {(503, "service_unavailable")}
    assert {asked.error for asked in users.failed} == {"service_unavailable"}
    assert ready_s < 60


@pytest.mark.slow
@pytest.mark.fault("F18", seen="the controller is gone from /proc, another one runs")
def test_without_its_controller_serve_answers_and_scaling_goes_on_once_it_is_back(shop: Shop, fault: Fault) -> None:
    size = "serving.language_model"
    shop.serve(
        f"{size}.replicas=[1, 2]", f"{size}.target_ongoing_requests=3", f"{size}.upscale_delay_s=0.5",
        f"{size}.downscale_delay_s=2",
    )  # fmt: skip
    eventually(lambda: len(running("LanguageModel")) == 1)
    before = system_process("ServeController")
    assert before
    with shop.users(2, fault.random) as users:
        users.answers_after(10)
        time.sleep(fault.random.uniform(0, 2))
        os.kill(before, signal.SIGKILL)
        fault.happened()
        users.answers_after(10)
        eventually(lambda: system_process("ServeController") not in (None, before))
        eventually(lambda: len(running("LanguageModel")) == 1)
        fault.recovered()
        users.answers_after(10)
    assert gone(before)
    with shop.users(12, fault.random) as crowd:
        eventually(lambda: len(running("LanguageModel")) == 2)
        crowd.answers_after(20)
    for who in (users, crowd):
        assert who.wrong(ANSWERS) == []
        assert who.failed == [], told(who.failed)
    eventually(lambda: len(running("LanguageModel")) == 1)


@pytest.mark.slow
@pytest.mark.fault("F18", seen="the proxy is gone from /proc; connections broke")
def test_users_reconnect_once_the_proxy_is_back(shop: Shop, fault: Fault) -> None:
    shop.serve()
    before = front_door(shop)
    assert before
    with shop.users(8, fault.random) as users:
        users.answers_after(20)
        time.sleep(fault.random.uniform(0, 2))
        os.kill(before, signal.SIGKILL)
        in_flight = users.open
        fault.happened()
        eventually(lambda: front_door(shop) not in (None, before))
        users.answers_after(1)
        fault.recovered()
        back_s = time.monotonic()
        users.answers_after(40)
    assert gone(before)
    assert users.wrong(ANSWERS) == []
    assert any(asked in in_flight for asked in users.failed)
    # HAProxy answers 503 itself until it knows where the application is.
    others = [asked for asked in users.failed if asked not in in_flight]
    assert {asked.status for asked in others} <= {0, 503}, told(others)
    assert {asked.error for asked in others if asked.status == 503} <= {"service_unavailable"}, told(others)
    late = [asked for asked in users.failed if asked.begun_s > back_s]
    assert late == [], told(late)


@pytest.mark.slow
@pytest.mark.fault("F18", seen="what keeps HAProxy's configuration is gone from /proc")
def test_users_notice_nothing_of_the_proxy_s_manager_and_new_replicas_are_found_once_it_is_back(
    shop: Shop, fault: Fault
) -> None:
    shop.serve()
    before, door = system_process("HAProxyManager"), front_door(shop)
    assert before
    assert door
    with shop.users(8, fault.random) as users:
        users.answers_after(20)
        time.sleep(fault.random.uniform(0, 2))
        os.kill(before, signal.SIGKILL)
        fault.happened()
        eventually(lambda: system_process("HAProxyManager") not in (None, before))
        eventually(lambda: front_door(shop) not in (None, door))
        fault.recovered()
        users.answers_after(20)
        # Where a replica of the ingress is replaced, only who reads the new configuration finds the new one.
        (old,) = pids("InputHandling")
        shop.serve("serving.input.max_ongoing_requests=99")
        eventually(lambda: old not in pids("InputHandling") and gone(old))
        assert front_door(shop)
        users.answers_after(20)
    assert gone(before)
    assert users.wrong(ANSWERS) == []
    assert users.failed == [], told(users.failed)


# Faults of a whole cluster, each in one of its own


@dataclass(frozen=True)
class Own:
    """A head beside the suite's, with the application on it."""

    environment: dict[str, str]
    url: str
    key: str
    config: Path
    logs: Path

    def job(self) -> subprocess.CompletedProcess[str]:
        """jobs.serve on it."""
        command = [sys.executable, "-m", "jobs.serve", "--config", str(self.config)]
        given = {"env": self.environment, "cwd": ROOT, "capture_output": True, "text": True}
        return subprocess.run(command, **given, timeout=600, check=False)

    def local(self, verb: str) -> subprocess.CompletedProcess[str]:
        """cluster/local.sh for it."""
        command = [str(ROOT / "cluster" / "local.sh"), verb]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=120, check=False)

    def actors(self) -> set[str]:
        """Names of Serve's actors, as the cluster knows them."""
        script = (
            "import ray; ray.init(log_to_driver=False, logging_level='error');"
            "print('\\n'.join(one['name'] for one in ray.util.list_named_actors(all_namespaces=True)))"
        )
        command = [sys.executable, "-c", script]
        given = {"env": self.environment, "capture_output": True, "text": True}
        return set(subprocess.run(command, **given, timeout=120, check=True).stdout.split())

    def replicas(self, kind: str) -> set[int]:
        """Process ids of the replicas that run, as the dashboard tells; none where it does not."""
        headers = {"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"}
        try:
            address = f"{self.environment['RAY_DASHBOARD']}/api/serve/applications/"
            response = httpx.get(address, headers=headers, timeout=5)
            application = response.json()["applications"]["support"]
        except (httpx.HTTPError, ValueError, KeyError):
            return set()
        if application["status"] != "RUNNING":
            return set()
        replicas = application["deployments"][kind]["replicas"]
        return {replica["pid"] for replica in replicas if replica["state"] == "RUNNING"}

    def control_store(self) -> int:
        """The process of the GCS."""
        port = self.environment["RAY_ADDRESS"].rpartition(":")[2]
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                command = (folder / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if command[0].endswith(b"/gcs_server") and f"--gcs_server_port={port}".encode() in command:
                return int(folder.name)
        raise AssertionError("there is no GCS")


def own(folder: Path, model: Path, key: str, offset: int, **environment: str) -> Own:
    """Start one.

    Args:
        offset: What its ports are higher by than those of the suite's.
    """
    script = str(ROOT / "cluster" / "local.sh")
    suites = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_DASHBOARD")
    wanted = {name: value for name, value in os.environ.items() if name not in suites}
    offset += int(os.environ.get("RAYLOOP_PORT_OFFSET", "0"))
    wanted |= {
        "RAYLOOP_STATE": str(folder / "state"),
        "RAYLOOP_API_KEY": key,
        "RAYLOOP_PORT_OFFSET": str(offset),
        **environment,
    }
    started = subprocess.run([script, "start"], env=wanted, capture_output=True, text=True, timeout=120, check=False)
    assert started.returncode == 0, started.stdout + started.stderr
    lines = (folder / "state" / "cluster.env").read_text().splitlines()
    wanted |= dict(line.removeprefix("export ").split("=", 1) for line in lines)
    port = int(wanted["RAYLOOP_HTTP_PORT"])
    variant = {"name": "champion", "version": "3", "uri": str(model)}
    config = folder / "config.yaml"
    serving = {"port": port, "variants": [variant], "default_max_tokens": 400, "deploy_timeout_s": 400}
    config.write_text(yaml.safe_dump({"storage": {"uri": str(folder / "store")}, "serving": serving}))
    temp = started.stdout.split("logs in ")[1].strip()
    return Own(wanted, f"http://127.0.0.1:{port}", key, config, Path(temp) / "session_latest" / "logs")


@pytest.mark.slow
@pytest.mark.fault("F16", seen="the GCS is gone from /proc, and then the whole head")
def test_without_its_control_store_a_local_head_ends_and_is_started_again(
    model_folder: Path, tmp_path: Path, fault: Fault
) -> None:
    head = own(tmp_path, model_folder, "sk-own", 2_000)
    try:
        ended = head.job()
        assert ended.returncode == 0, ended.stdout + ended.stderr
        with Users(head.url, head.key, 2, list(ANSWERS), fault.random) as users:
            users.answers_after(4)
            time.sleep(fault.random.uniform(0, 2))
            store = head.control_store()
            os.kill(store, signal.SIGKILL)
            killed_s = time.monotonic()
            users.answers_after(4)
            assert gone(store)
            # HAProxy is left of the head, or nothing is.
            over = ("service_unavailable", "ConnectError")
            eventually(lambda: {asked.error for asked in users.ended[-40:]} <= {*over}, within_s=180)
            fault.happened()
            print("all were refused", time.monotonic() - killed_s, "s after the GCS was gone")
        assert users.wrong(ANSWERS) == []
        assert [asked for asked in users.failed if asked.is_silent and asked.stream and asked.error == ""] == []
        ended = head.job()
        assert ended.returncode == 1
        line = json.loads(ended.stdout.splitlines()[-1])
        assert line["error"] == (
            "no Ray cluster is running here: start one with `make start`, or set RAY_ADDRESS to yours"
        )
        assert head.local("status").returncode == 1
        assert "started a local Ray head" in head.local("start").stdout
        ended = head.job()
        assert ended.returncode == 0, ended.stdout + ended.stderr
        with Users(head.url, head.key, 2, list(ANSWERS), fault.random) as users:
            users.answers_after(1)
            fault.recovered()
        assert users.failed == [], told(users.failed)
        assert users.wrong(ANSWERS) == []
    finally:
        head.local("stop")


@pytest.mark.slow
@pytest.mark.fault("F16", seen="the GCS is gone from /proc, the dashboard knows nothing meanwhile; another GCS runs")
def test_with_a_control_store_on_disk_serve_answers_through_its_restart(
    model_folder: Path, tmp_path: Path, fault: Fault
) -> None:
    kept = {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(tmp_path / "gcs")}
    head = own(tmp_path, model_folder, "sk-own", 2_000, **kept)
    again: subprocess.Popen[bytes] | None = None
    try:
        ended = head.job()
        assert ended.returncode == 0, ended.stdout + ended.stderr
        actors, models = head.actors(), head.replicas("LanguageModel-1")
        assert len(models) == 1
        with Users(head.url, head.key, 4, list(ANSWERS), fault.random) as users:
            users.answers_after(8)
            store = head.control_store()
            folder = Path(f"/proc/{store}")
            command = (folder / "cmdline").read_bytes().decode().rstrip("\0").split("\0")
            set_up = dict(line.split("=", 1) for line in (folder / "environ").read_text().split("\0") if "=" in line)
            os.kill(store, signal.SIGKILL)
            time.sleep(fault.random.uniform(0.5, 4.0))
            assert gone(store)
            assert head.replicas("LanguageModel-1") == set()
            fault.happened()
            # What a supervisor does: the same command again.
            again = subprocess.Popen(
                command, env=set_up, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            eventually(lambda: head.replicas("LanguageModel-1") == models)
            fault.recovered()
            users.answers_after(8)
        assert users.failed == [], told(users.failed)
        assert users.wrong(ANSWERS) == []
        assert head.actors() == actors
        os.kill(next(iter(models)), signal.SIGKILL)
        eventually(lambda: len(head.replicas("LanguageModel-1") - models) == 1)
        with Users(head.url, head.key, 4, list(ANSWERS), fault.random) as users:
            users.answers_after(8)
        assert users.wrong(ANSWERS) == []
    finally:
        head.local("stop")
        if again:
            again.wait(60)


@pytest.mark.slow
@pytest.mark.fault("F24", seen="the logs say of both calls that failures were injected")
def test_answers_are_exact_while_calls_between_processes_fail_and_are_late(
    model_folder: Path, tmp_path: Path, fault: Fault
) -> None:
    push, lease = "CoreWorkerService.grpc_client.PushTask", "NodeManagerService.grpc_client.RequestWorkerLease"
    several = {"num_lower_bound_req_failures": 1 + fault.random.randrange(2), "num_lower_bound_resp_failures": 1}
    failures = {
        push: {"num_failures": -1, "req_failure_prob": 3, "resp_failure_prob": 2, "in_flight_failure_prob": 0},
        lease: {"num_failures": -1, "req_failure_prob": 20, "resp_failure_prob": 20, **several},
    }
    late = [f"{push.replace('client', 'server')}=0:20000", f"{lease.replace('client', 'server')}=0:50000"]
    chaos = {"RAY_testing_rpc_failure": json.dumps(failures), "RAY_testing_asio_delay_us": ",".join(late)}
    head = own(tmp_path, model_folder, "sk-own", 2_000, **chaos)
    try:
        # Serve gives a deployment up whose start fails three times; then the same command is given again.
        for jobs in (1, 2, 3):  # noqa: B007 - told below
            ended = head.job()
            if not ended.returncode:
                break
            assert "application support could not be deployed" in ended.stdout, ended.stdout + ended.stderr
        assert ended.returncode == 0, ended.stdout + ended.stderr
        with Users(head.url, head.key, 6, list(ANSWERS), fault.random) as users:
            users.answers_after(150, within_s=240)
        logs = b"".join(file.read_bytes() for file in head.logs.glob("*") if file.is_file())
        seen = {
            call: sum(logs.count(f"Inject RPC {kind} failure for {call}".encode()) for kind in ("request", "response"))
            for call in (push, lease)
        }
        print(f"injected: {seen}; {jobs} jobs; {len(users.failed)} questions failed, {len(users.answered)} did not")
        assert len(users.failed) < len(users.answered) / 2
        assert min(seen.values()) > 0, seen
        fault.happened()
        assert users.wrong(ANSWERS) == []
        assert {(asked.status, asked.error) for asked in users.failed if not asked.stream} <= {
            (503, "service_unavailable")
        }, told(users.failed)
        # Input handling that cannot be reached is replaced too: then a stream has no end, which HTTP tells the client.
        assert [asked for asked in users.failed if asked.is_silent and not asked.error] == []
    finally:
        head.local("stop")
