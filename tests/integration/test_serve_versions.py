"""Serving while versions change: none is refused, no answer is of two of them, a broken one displaces nothing."""

import json
import threading
import time
from pathlib import Path

import httpx
import pytest

from app import deployment
from app.errors import StageFailed
from tests.answering_model import ANSWERS, OTHER_ANSWERS
from tests.faults import Fault
from tests.integration.test_serve import eventually
from tests.shop import Shop, register, running, told
from tests.users import Asked, Users

pytestmark = pytest.mark.timeout(1_800)
BY_VERSION = {"support/1": ANSWERS, "support/2": OTHER_ANSWERS}


def mixed(users: Users) -> list[Asked]:
    """Answers whose text is not that of the version that they name."""
    return [
        asked
        for asked in users.answered
        if asked.model not in BY_VERSION or asked.text != BY_VERSION[asked.model][asked.question]
    ]


class Listing(threading.Thread):
    """Asks for /v1/models and for a text's vector again and again."""

    def __init__(self, shop: Shop) -> None:
        super().__init__(daemon=True)
        self._shop, self._ended = shop, threading.Event()
        self.seen: list[tuple[str, ...]] = []
        self.vectors: dict[str, set[tuple[float, ...]]] = {}
        """By the version that they are said to be of."""
        self.failed: list[str] = []

    def __enter__(self) -> "Listing":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.join(60)

    def run(self) -> None:
        while not self._ended.wait(0.1):
            try:
                self._ask({"Authorization": f"Bearer {self._shop.key}"})
            except Exception as error:  # told by `failed`, not by a thread that is gone
                self.failed.append(repr(error))

    def _ask(self, headers: dict[str, str]) -> None:
        response = httpx.get(f"{self._shop.url}/v1/models", headers=headers, timeout=60)
        ids = [card["id"] for card in response.json()["data"]] if response.status_code == 200 else []
        if not self.seen or self.seen[-1] != tuple(ids):
            self.seen.append(tuple(ids))
        body = {"model": "support", "input": "thank you."}
        response = httpx.post(f"{self._shop.url}/v1/embeddings", json=body, headers=headers, timeout=60)
        if response.status_code != 200:
            self.failed.append(response.text)
            return
        told = response.json()
        self.vectors.setdefault(told["model"], set()).add(tuple(told["data"][0]["embedding"]))


def names(version: str, variant: str) -> tuple[str, ...]:
    return ("support", f"support/{version}", variant)


@pytest.mark.slow
@pytest.mark.fault("F19", seen="both versions answered while one job ran, and again while the next one did")
@pytest.mark.parametrize("way", ["promoted", "named"])
def test_a_version_takes_over_and_gives_back_under_load(shop: Shop, way: str, fault: Fault) -> None:
    first, second = shop.registry.version("1"), shop.registry.version("2")
    shop.serve()
    assert shop.ask("thank you").model == "support/1"
    variant = "champion" if way == "promoted" else "version-2"
    try:
        with Listing(shop) as listing, shop.users(6, fault.random) as users:
            users.answers_after(20)
            time.sleep(fault.random.uniform(0, 2))
            if way == "promoted":
                shop.registry.set_alias("champion", second)
            shop.serve(*([] if way == "promoted" else ["inputs.model_version=2"]))
            there_s = time.monotonic()
            eventually(lambda: {asked.model for asked in users.answered[-20:]} == {"support/2"})
            users.answers_after(20)
            if way == "promoted":
                shop.registry.set_alias("champion", first)
            shop.serve()
            eventually(lambda: {asked.model for asked in users.answered[-20:]} == {"support/1"})
            users.answers_after(20)
    finally:
        shop.registry.set_alias("champion", first)
    versions = [asked.model for asked in users.answered]
    assert versions.index("support/2") < len(versions) - 1
    assert {"support/1", "support/2"} == set(versions)
    assert any(asked.model == "support/1" and asked.begun_s > there_s for asked in users.answered)
    fault.happened()
    assert users.failed == [], told(users.failed)
    assert mixed(users) == [], told(mixed(users))
    variants = {(asked.model, asked.variant) for asked in users.answered if not asked.stream}
    assert variants == {("support/1", "champion"), ("support/2", variant)}
    assert set(listing.seen) == {names("1", "champion"), names("2", variant)}, listing.seen
    assert listing.failed == []
    assert sorted(listing.vectors) == ["support/1", "support/2"]
    (one,), (other,) = listing.vectors["support/1"], listing.vectors["support/2"]
    assert one != other
    assert listing.seen[-1] == names("1", "champion")


def broken(shop: Shop, model_folder: Path, how: str) -> str:
    """The version of a model that cannot be served."""
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    folder = shop.store / how
    if not folder.exists():
        shutil.copytree(model_folder, folder)
        weights = folder / "model.safetensors"
        if how == "damaged":
            weights.write_bytes(weights.read_bytes()[:-1_000])
        elif how == "no_numbers":
            tensors = load_file(weights)
            name = next(name for name in tensors if name.endswith("norm.weight"))
            tensors[name] = torch.full_like(tensors[name], float("nan"))
            save_file(tensors, weights, {"format": "pt"})
        else:
            (folder / "tokenizer.json").write_text("{}")
        register(shop.registry, folder)
    found = [version for version, _ in shop.registry.all_versions() if version.uri == str(folder)]
    return str(found[0].version)


REASONS = {
    "damaged": "model.safetensors is damaged",
    "no_numbers": "writes something else when it is batched",
    "no_tokenizer": "could not be deployed",
}


@pytest.mark.slow
@pytest.mark.fault("F20", seen="the job failed with the reason")
@pytest.mark.parametrize("how", ["damaged", "no_numbers", "no_tokenizer"])
def test_a_broken_version_displaces_nothing(shop: Shop, model_folder: Path, how: str, fault: Fault) -> None:
    version = broken(shop, model_folder, how)
    shop.serve()
    before, config = running("").keys(), deployment.deployed("support")

    def body(question: str) -> dict[str, str]:
        return {"model": "support/1" if len(question) % 2 else "support"}

    with Listing(shop) as listing, shop.users(4, fault.random, body=body) as users:
        users.answers_after(10)
        time.sleep(fault.random.uniform(0, 1))
        ended = shop.job(f"inputs.model_version={version}")
        line = json.loads(ended.stdout.splitlines()[-1])
        assert (ended.returncode, line["status"]) == (1, "failed"), ended.stdout
        assert REASONS[how] in line["error"], line["error"]
        fault.happened()
        users.answers_after(20)
        again = shop.job()
        line = json.loads(again.stdout.splitlines()[-1])
        assert (again.returncode, line["status"]) == (0, "up_to_date"), again.stdout + again.stderr
        fault.recovered()
    assert deployment.deployed("support") == config
    assert users.failed == [], told(users.failed)
    assert users.wrong(ANSWERS) == []
    assert {asked.model for asked in users.answered} == {"support/1"}
    assert listing.seen == [names("1", "champion")]
    assert listing.failed == []
    kept = {replica["pid"] for replica in deployment.replicas("support") if replica["deployment"] == "LanguageModel-1"}
    assert kept <= before, "the replicas that answered are the ones that did before"


@pytest.mark.slow
@pytest.mark.fault("F20", seen="Serve gave up, and told the reason")
@pytest.mark.parametrize(("how", "reason"), [("dying", "ActorDied"), ("unwell", "the model has forgotten everything")])
def test_a_version_that_crashes_or_is_not_well_displaces_nothing(
    shop: Shop, how: str, reason: str, fault: Fault
) -> None:
    shop.serve()
    config = deployment.deployed("support")
    assert config
    with shop.users(4, fault.random) as users:
        users.answers_after(10)
        time.sleep(fault.random.uniform(0, 1))
        with pytest.raises(StageFailed, match=f"{reason}.*What ran before is serving again"):
            deployment.deploy({**config, "import_path": f"tests.broken:{how}"}, timeout_s=400)
        fault.happened()
        users.answers_after(20)
        fault.recovered()
    assert deployment.deployed("support") == config
    assert users.failed == [], told(users.failed)
    assert users.wrong(ANSWERS) == []
