"""One Ray cluster for the whole suite, with its own ports, so that another Ray on the machine is left alone."""

import json
import os
import secrets
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
API_KEY = "sk-rayloop-test"
SHARED_DATA = ROOT.parent / "shared" / "data"

# Every process of the test cluster inherits these.
os.environ["PYTHONPATH"] = str(ROOT)
os.environ["RAYLOOP_HOME"] = str(ROOT)
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(ROOT / ".venv" / "torch_extensions"))
# Ray reads these when it is imported, so they stand before any test module is.
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(24)
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The whole path comes last: it deploys over the application that the other tests talk to."""
    items.sort(key=lambda item: "end_to_end" in item.path.parts)


@dataclass(frozen=True)
class RunningCluster:
    """Addresses of the suite's cluster."""

    dashboard_url: str
    metrics_url: str
    http_port: int
    api_key: str


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCluster]:
    """The local Ray head that users start, with a state folder and ports of its own; the test process joins it."""
    import ray

    state = tmp_path_factory.mktemp("state")
    script = str(ROOT / "cluster" / "local.sh")
    environment = {**os.environ, "RAYLOOP_STATE": str(state), "RAYLOOP_API_KEY": API_KEY}
    started = subprocess.run([script, "start"], env=environment, capture_output=True, text=True, timeout=120)
    assert started.returncode == 0, started.stdout + started.stderr
    addresses = dict(
        line.removeprefix("export ").split("=", 1) for line in (state / "cluster.env").read_text().splitlines()
    )
    before = {name: os.environ.get(name) for name in addresses}
    os.environ.update(addresses)
    try:
        ray.init(address=addresses["RAY_ADDRESS"], log_to_driver=False)
        yield RunningCluster(
            dashboard_url=addresses["RAY_DASHBOARD"],
            metrics_url=addresses["RAYLOOP_METRICS"],
            http_port=int(addresses["RAYLOOP_HTTP_PORT"]),
            api_key=API_KEY,
        )
        ray.shutdown()
    finally:
        subprocess.run([script, "stop"], env=environment, check=False, timeout=120)
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.fixture
def store(tmp_path: Path) -> str:
    """A fresh storage root."""
    return str(tmp_path / "store")


@pytest.fixture
def shared_data() -> Path:
    """Real conversations; skips where they are not."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"real conversations are not at {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An int8 model folder with intent model and lineage, see tests/answering_model.py."""
    from tests import answering_model

    folder = tmp_path_factory.mktemp("models") / "int8"
    answering_model.make(folder, int8=True)
    return folder


@dataclass(frozen=True)
class Service:
    """The served application."""

    url: str
    api_key: str
    store: str
    config: Path
    job_id: str
    """Of the job that deployed it and has ended."""
    last_line: dict[str, Any]


@pytest.fixture(scope="session")
def service(cluster: RunningCluster, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The application as a submitted `jobs.serve` deploys it; the job has ended."""
    import yaml
    from ray.job_submission import JobStatus, JobSubmissionClient

    from app import deployment

    store = tmp_path_factory.mktemp("served")
    variant = {"name": "champion", "version": "3", "uri": str(model_folder)}
    handover = {"min_reply_confidence": 0.95}
    serving = {"port": cluster.http_port, "variants": [variant], "handover": handover, "default_max_tokens": 400}
    config = store / "config.yaml"
    config.write_text(yaml.safe_dump({"storage": {"uri": str(store / "store")}, "serving": serving}))
    client = JobSubmissionClient(cluster.dashboard_url)
    job = client.submit_job(
        entrypoint=f"python -m jobs.serve --config {config}",
        runtime_env={"working_dir": str(ROOT), "excludes": ["tests", ".git", ".rayloop"]},
    )
    deadline_s = time.monotonic() + 240
    while not (status := client.get_job_status(job)).is_terminal() and time.monotonic() < deadline_s:
        time.sleep(0.5)
    logs = client.get_job_logs(job)
    assert status == JobStatus.SUCCEEDED, logs
    url = f"http://127.0.0.1:{cluster.http_port}"
    last_line = json.loads(logs.strip().splitlines()[-1])
    yield Service(url, cluster.api_key, str(store / "store"), config, job, last_line)
    deployment.remove("support")
