import socket
import zipfile
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import ray._private.runtime_env.protocol  # noqa: F401 - gives Protocol its download
from pyarrow.fs import LocalFileSystem, SubTreeFileSystem
from ray._common.runtime_env_uri import Protocol

from app import deployment
from app.deployment import package_code
from app.errors import ClusterError, ConfigError, StageFailed
from app.storage import Storage
from app.versions import APP


def test_the_package_holds_the_whole_code_and_the_page_below_one_folder(store: str) -> None:
    uri = package_code(Storage(store))
    with zipfile.ZipFile(urlsplit(uri).path) as package:
        names = set(package.namelist())
        content = package.read("rayloop/app/serving/page/index.html")
    expected = {f"rayloop/app/{file.relative_to(APP)}" for file in APP.rglob("*.py")}
    assert expected <= names
    assert all(name.startswith("rayloop/app/") for name in names)
    assert content == (APP / "serving" / "page" / "index.html").read_bytes()


def test_a_root_with_spaces_and_percent_signs_gives_a_uri_that_ray_reads(tmp_path: Path) -> None:
    uri = package_code(Storage(str(tmp_path / "my store 100%20")))
    fetched = tmp_path / "fetched.zip"
    Protocol.FILE.download_remote_uri(uri, str(fetched))
    assert zipfile.is_zipfile(fetched)


def test_the_same_code_is_packaged_once(store: str) -> None:
    first = package_code(Storage(store))
    made = Path(urlsplit(first).path).stat().st_mtime_ns
    assert package_code(Storage(store)) == first
    assert Path(urlsplit(first).path).stat().st_mtime_ns == made


@pytest.mark.parametrize(
    ("root", "scheme"),
    [("s3://bucket/root", "s3"), ("gs://bucket/root", "gs"), ("abfs://c@a.dfs.core.windows.net", "abfss")],
)
def test_the_uri_is_one_that_ray_fetches(tmp_path: Path, root: str, scheme: str) -> None:
    storage = Storage(str(tmp_path))
    storage.filesystem = SubTreeFileSystem("/", LocalFileSystem())
    storage.root_uri = root
    assert package_code(storage).startswith(f"{scheme}://")


def test_storage_that_ray_cannot_fetch_code_from_is_named(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    storage.filesystem = SubTreeFileSystem("/", LocalFileSystem())
    storage.root_uri = "hdfs://namenode/root"
    with pytest.raises(ConfigError, match="hdfs"):
        package_code(storage)


def test_a_port_that_another_program_has_is_named_before_anything_is_deployed() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ClusterError, match=rf"127\.0\.0\.1:{port} .*in use"):
            deployment._http_options({}, {"host": "127.0.0.1", "port": port})


def test_serve_cannot_be_moved_while_it_runs() -> None:
    running = {"controller_info": {"actor_id": "a"}, "http_options": {"host": "127.0.0.1", "port": 8000}}
    assert deployment._http_options(running, None) == {"host": "127.0.0.1", "port": 8000}
    assert deployment._http_options(running, {"host": "127.0.0.1", "port": 8000})["port"] == 8000
    with pytest.raises(ClusterError, match=r"listens on 127\.0\.0\.1:8000 and cannot move to 127\.0\.0\.1:8001"):
        deployment._http_options(running, {"host": "127.0.0.1", "port": 8001})


def test_only_applications_that_a_configuration_deployed_are_carried_over() -> None:
    details = {
        "applications": {
            "a": {"source": "declarative", "status": "RUNNING", "deployed_app_config": {"name": "a"}},
            "b": {"source": "imperative", "status": "RUNNING", "deployed_app_config": None},
            "c": {"source": "declarative", "status": "DELETING", "deployed_app_config": {"name": "c"}},
        }
    }
    assert deployment._configs(details) == {"a": {"name": "a"}}


def test_what_serve_says_is_told_without_its_traceback() -> None:
    message = (
        "The deployment failed to start 3 times in a row. See controller logs for details. Error:\n"
        '\x1b[36mray::ServeReplica.initialize()\x1b[39m (pid=1)\n  File "x.py", line 1, in result\n'
        'RuntimeError: Traceback (most recent call last):\n  File "y.py", line 2\n'
        "app.errors.ModelError: /empty/config.json cannot be read: the folder must hold a whole model\n\n"
    )
    application = {
        "message": "Failed to update the deployments ['LanguageModel'].",
        "deployments": {
            "LanguageModel": {"status": "UNHEALTHY", "message": message},
            "InputHandling": {"status": "HEALTHY", "message": ""},
        },
    }
    assert deployment._said(application) == (
        "Failed to update the deployments ['LanguageModel'].; LanguageModel: The deployment failed to start 3 times "
        "in a row. See controller logs for details. Error: app.errors.ModelError: /empty/config.json cannot be read: "
        "the folder must hold a whole model"
    )


class Dashboard:
    """Answers with one of `answers` after another."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *answers: Any) -> None:
        self._answers, self.asked = list(answers), 0
        monkeypatch.setattr(deployment, "_client", lambda: self)
        self.now_s = 0.0
        monkeypatch.setattr(deployment.time, "monotonic", lambda: self.now_s)
        monkeypatch.setattr(deployment.time, "sleep", self._sleep)

    def _sleep(self, seconds: float) -> None:
        self.now_s += seconds

    def get_serve_details(self, *_: Any) -> Any:
        self.asked += 1
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(answer, Exception):
            raise answer
        return {"applications": {"a": {"status": answer, "message": "why"}}}

    deploy_applications = get_serve_details


LOST = RuntimeError(
    'Request failed with status code 500: Traceback (most recent call last):\n  File "x.py", line 1\n'
    "ray.exceptions.ActorUnavailableError: The actor 17 is unavailable.\n."
)


def test_a_controller_that_cannot_be_reached_for_a_moment_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    Dashboard(monkeypatch, LOST, LOST, "RUNNING")
    assert deployment.status("a") == "RUNNING"
    dashboard = Dashboard(monkeypatch, LOST, "RUNNING")
    deployment._put({}, {"host": "127.0.0.1"})
    assert dashboard.asked == 2
    dashboard = Dashboard(monkeypatch, LOST)
    with pytest.raises(StageFailed) as caught:
        deployment.status("a")
    assert dashboard.asked == 1 + len(deployment.RETRY_S)
    assert caught.value.what == (
        "Ray Serve's controller cannot be reached: Request failed with status code 500: "
        "ray.exceptions.ActorUnavailableError: The actor 17 is unavailable."
    )


def test_what_serve_refuses_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    dashboard = Dashboard(monkeypatch, RuntimeError("Request failed with status code 400: no such field."))
    with pytest.raises(StageFailed, match="no such field"):
        deployment.status("a")
    assert dashboard.asked == 1


def test_only_what_serve_gives_up_is_given_up_before_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    away = [LOST] * 20
    Dashboard(monkeypatch, "DEPLOYING", *["UNHEALTHY"] * 100, *away, ConnectionError("gone"), "RUNNING")
    deployment._wait_until_running("a", 180.0)
    dashboard = Dashboard(monkeypatch, "DEPLOYING", "DEPLOY_FAILED")
    with pytest.raises(StageFailed, match="could not be deployed: why"):
        deployment._wait_until_running("a", 180.0)
    assert dashboard.now_s < 1
    dashboard = Dashboard(monkeypatch, "UNHEALTHY")
    with pytest.raises(StageFailed, match="is UNHEALTHY after 180 s: why"):
        deployment._wait_until_running("a", 180.0)
