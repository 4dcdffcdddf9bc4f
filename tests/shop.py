"""The served application as its faults' tests have it: two versions of a model, deployed again with other settings."""

import asyncio
import os
import random
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import yaml

from app import deployment
from app.config import load
from app.registry import Registry
from tests import answering_model
from tests.answering_model import ANSWERS
from tests.conftest import ROOT, Service
from tests.integration.test_ingest_faults import state
from tests.users import Asked, Users, ask


@dataclass(frozen=True)
class Shop:
    """The application in the place of the suite's: version 1 of a model is the champion, 2 answers otherwise."""

    url: str
    key: str
    config: Path
    registry: Registry
    store: Path

    def job(self, *settings: str) -> subprocess.CompletedProcess[str]:
        """jobs.serve with so many settings."""
        command = [sys.executable, "-m", "jobs.serve", "--config", str(self.config)]
        for setting in settings:
            command += ["--set", setting]
        environment = {**os.environ, "RAYLOOP_API_KEY": self.key}
        given = {"env": environment, "cwd": ROOT, "capture_output": True, "text": True}
        return subprocess.run(command, **given, timeout=600, check=False)

    def serve(self, *settings: str) -> None:
        """Deploy with so many settings."""
        ended = self.job(*settings)
        assert ended.returncode == 0, ended.stdout[-2_000:] + ended.stderr[-4_000:]

    def users(
        self, number: int, chance: random.Random, questions: Mapping[str, Any] = ANSWERS, **options: Any
    ) -> Users:
        return Users(self.url, self.key, number, list(questions), chance, **options)

    def ask(self, question: str, **body: Any) -> Asked:
        """One question, whatever it comes to."""

        async def answered() -> Asked:
            headers = {"Authorization": f"Bearer {self.key}"}
            asked = Asked(question, False, time.monotonic())
            async with httpx.AsyncClient(base_url=self.url, headers=headers, timeout=60) as client:
                await ask(client, asked, body)
            return asked

        return asyncio.run(answered())


def register(registry: Registry, folder: Path) -> Any:
    return registry.register(registry.start_run("compress", {}, {}), str(folder), {"rayloop.stage": "compress"})


def running(kind: str) -> dict[int, dict[str, Any]]:
    """Replicas by process id."""
    return {
        replica["pid"]: replica
        for replica in deployment.replicas("support")
        if replica["deployment"].startswith(kind) and replica["state"] == "RUNNING" and replica.get("pid")
    }


def front_door(shop: Shop) -> int | None:
    """The process that users reach."""
    port = urlsplit(shop.url).port
    connections = psutil.net_connections("tcp")
    found = {each.pid for each in connections if each.status == psutil.CONN_LISTEN and each.laddr.port == port}
    return found.pop() if len(found) == 1 else None


def gone(pid: int) -> bool:
    """Dead; its parent may not have looked yet."""
    try:
        return state(pid) == "Z"
    except OSError:
        return True


def told(asked: list[Asked]) -> str:
    """Of a failed comparison: what they came to."""
    return "\n".join(map(str, asked[:5]))


def slots_in_use(shop: Shop) -> int:
    response = httpx.get(f"{shop.url}/ready", timeout=60)
    assert response.status_code == 200
    return sum(response.json()["slots_in_use"].values())


def open_shop(service: Service, port: int, model_folder: Path, root: Path) -> Shop:
    """A shop whose registry has both versions; nothing is deployed yet."""
    answering_model.make_other(root / "other", model_folder, "2")
    config = root / "config.yaml"
    serving = {"port": port, "default_max_tokens": 400, "deploy_timeout_s": 400}
    config.write_text(yaml.safe_dump({"storage": {"uri": str(root / "store")}, "serving": serving}))
    registry = Registry(load(config))
    first = register(registry, model_folder)
    register(registry, root / "other")
    registry.set_alias("champion", first)
    return Shop(service.url, service.api_key, config, registry, root)
