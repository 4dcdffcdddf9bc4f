"""One Ray cluster for the whole suite, with its own ports, so that another Ray on the machine is left alone."""

import json
import logging
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from hypothesis import settings

from tests import faults
from tests.faults import Fault

# How long an example takes says more of the machine than of the code.
settings.register_profile("rayloop", deadline=None)
settings.load_profile("rayloop")

ROOT = Path(__file__).parent.parent
API_KEY = "sk-rayloop-test"
ENGINE = os.environ.get("RAYLOOP_TEST_ENGINE", "transformers")
"""Of the served application; vllm in an environment that has it, see tests/integration/test_vllm.py."""
GPUS = int(os.environ.get("RAYLOOP_TEST_GPUS", "0"))
"""That the served application's language model reserves, where there is one."""
VLLM = {"dtype": "float32", "kv_cache_bytes": 2**26, "enforce_eager": True}
SHARED_DATA = ROOT.parent / "shared" / "data"

# Every process of the test cluster inherits these.
os.environ["PYTHONPATH"] = str(ROOT)
os.environ["RAYLOOP_HOME"] = str(ROOT)
os.environ["RAYLOOP_VENV"] = sys.prefix
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(ROOT / ".venv" / "torch_extensions"))
# Ray reads these when it is imported, so they stand before any test module is.
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(24)
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The whole path comes last: it deploys over the application that the other tests talk to. Tests of faults say
    which, see tests/faults.py."""
    items.sort(key=lambda item: "end_to_end" in item.path.parts)
    for item in items:
        if mark := item.get_closest_marker("fault"):
            item.user_properties += [("fault", mark.args[0]), ("seen", mark.kwargs["seen"])]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Each fault is made once a seed."""
    if metafunc.definition.get_closest_marker("fault"):
        if "seed" not in metafunc.fixturenames:
            metafunc.fixturenames.append("seed")
        metafunc.parametrize("seed", faults.SEEDS, indirect=True, ids="seed{}".format)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """A test that would have passed without its fault fails."""
    yield
    fault = getattr(item, "funcargs", {}).get("fault")
    assert fault is None or fault.has_happened, "the fault did not happen"


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """What a fault's place follows from."""
    number: int = request.param
    return number


@pytest.fixture
def fault(seed: int, record_property: Callable[[str, object], None]) -> Fault:
    """The fault that a test with the mark `fault` makes."""
    return Fault(seed, record_property)


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


@pytest.fixture(autouse=True)
def _logged_to_the_root() -> None:
    """A job's main keeps the messages of `app` from the root logger, where `caplog` listens."""
    logging.getLogger("app").propagate = True


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
    """A model folder with intent model and lineage, see tests/answering_model.py; int8 where the engine takes that."""
    from tests import answering_model

    folder = tmp_path_factory.mktemp("models") / "model"
    threshold = None if ENGINE == "vllm" else 0.0 if GPUS else 6.0
    answering_model.make(folder, threshold)
    return folder


@pytest.fixture(scope="session")
def adapter_folder(model_folder: Path) -> Path:
    """Adapters for that model, with which it greets."""
    from tests import answering_model

    folder = model_folder.parent / "adapter"
    answering_model.make_adapter(folder, model_folder)
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
    engine: str


@pytest.fixture(scope="session")
def service(
    cluster: RunningCluster, model_folder: Path, adapter_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    """The application as a submitted `jobs.serve` deploys it; the job has ended. `polite` is asked by its name only."""
    import yaml
    from ray.job_submission import JobStatus, JobSubmissionClient

    from app import deployment

    store = tmp_path_factory.mktemp("served")
    variant = {"name": "champion", "version": "3", "uri": str(model_folder), "engine": ENGINE}
    adapted = {"adapter_of": "champion", "weight": 0, "engine": ENGINE}
    polite = {"name": "polite", "version": "4", "uri": str(adapter_folder), **adapted}
    handover = {"min_reply_confidence": 0.95}
    serving = {
        "port": cluster.http_port, "variants": [variant, polite], "handover": handover, "default_max_tokens": 400,
        "vllm": VLLM, "language_model": {"gpus": GPUS},
    }  # fmt: skip
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
    yield Service(url, cluster.api_key, str(store / "store"), config, job, last_line, ENGINE)
    deployment.remove("support")


@pytest.fixture(scope="module")
def shop(
    service: Service, cluster: RunningCluster, model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """The application in the place of the suite's, which is deployed again afterwards; see tests/shop.py."""
    from tests.shop import open_shop

    yield open_shop(service, cluster.http_port, model_folder, tmp_path_factory.mktemp("versions"))
    command = [sys.executable, "-m", "jobs.serve", "--config", str(service.config)]
    environment = {**os.environ, "RAYLOOP_API_KEY": service.api_key}
    subprocess.run(command, env=environment, capture_output=True, cwd=ROOT, timeout=600, check=True)


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[openai.OpenAI]:
    """OpenAI's own, which tries nothing twice."""
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key=service.api_key, max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def http(service: Service) -> Iterator[httpx.Client]:
    """Plain HTTP with the key."""
    headers = {"Authorization": f"Bearer {service.api_key}"}
    with httpx.Client(base_url=service.url, headers=headers, timeout=60) as client:
        yield client
