"""Compression on a real cluster: accepted, refused, and models that cannot be compressed."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from app import lineage
from app import model as models
from app.compression import gate
from app.compression.pipeline import compress
from app.compression.quantize import scales
from app.config import Config
from app.errors import ClusterError, ModelError, StageRefused
from app.ingestion.pipeline import ingest
from app.intent import IntentModel
from app.registry import Registry
from app.versions import ModelVersion, TableVersion, as_json
from jobs.compress import JOB
from tests.conftest import ROOT, RunningCluster
from tests.trained import SETTINGS, register, train_quickly


@pytest.fixture(scope="module")
def config(cluster: RunningCluster, tmp_path_factory: pytest.TempPathFactory) -> Config:
    return Config().with_overrides({**SETTINGS, "storage.uri": str(tmp_path_factory.mktemp("compress") / "store")})


@pytest.fixture(scope="module")
def table(config: Config) -> TableVersion:
    return ingest(config).version


@pytest.fixture(scope="module")
def trained(config: Config, table: TableVersion, tmp_path_factory: pytest.TempPathFactory) -> ModelVersion:
    return train_quickly(config, table, tmp_path_factory.mktemp("trained"))


def run(config: Config, tmp_path: Path, *arguments: str) -> tuple[int, dict[str, Any], str]:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    command = [sys.executable, "-m", "jobs.compress", "--config", str(file), *arguments]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    return ended.returncode, json.loads(ended.stdout.splitlines()[-1]), ended.stderr


@pytest.fixture(scope="module")
def accepted(
    config: Config, trained: ModelVersion, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ModelVersion, dict[str, Any]]:
    """The version and the last line of a job that was within its budget."""
    code, line, errors = run(config, tmp_path_factory.mktemp("job"))
    assert (code, line["status"]) == (0, "done"), errors
    assert line["inputs"] == {"model": as_json(trained)}
    return ModelVersion(**line["outputs"]["model"]), line


def test_an_accepted_model_is_a_registered_candidate_that_knows_its_parent(
    config: Config, table: TableVersion, trained: ModelVersion, accepted: tuple[ModelVersion, dict[str, Any]]
) -> None:
    version, _ = accepted
    registry = Registry(config)
    tags = registry.tags(version)
    assert (tags["rayloop.stage"], tags["rayloop.parent"]) == ("compress", trained.version)
    assert (tags["rayloop.table"], tags["rayloop.snapshot_id"]) == (table.table, str(table.snapshot_id))
    assert registry.alias("candidate") == version
    assert registry.alias("champion") is None
    origin, before = lineage.read(version.uri), lineage.read(trained.uri)
    assert (origin.stage, origin.parent, origin.version) == ("compress", trained.version, version.version)
    assert origin.sources == before.sources != []
    assert version.uri.endswith(f"/models/{config.registry.model}/{origin.run_id}")


def test_its_folder_serves_all_by_itself(trained: ModelVersion, accepted: tuple[ModelVersion, dict[str, Any]]) -> None:
    folder = Path(accepted[0].uri)
    assert scales(folder) == 14
    model, tokenizer = models.load(folder)
    assert tokenizer.chat_template
    assert sum(type(module).__name__ == "DequantisingLinear8bit" for module in model.modules()) == 14
    ours, parents = (IntentModel.load(Path(uri) / "intent") for uri in (str(folder), trained.uri))
    np.testing.assert_array_equal(ours.weights, parents.weights)


def test_figures_are_what_lies_on_disk(trained: ModelVersion, accepted: tuple[ModelVersion, dict[str, Any]]) -> None:
    version, line = accepted
    figures = line["figures"]
    assert figures["accepted"] is True
    assert figures["bytes_before"] == gate.weights_bytes(trained.uri) == models.weights_bytes(Path(trained.uri))
    assert figures["bytes_after"] == gate.weights_bytes(version.uri) < 0.5 * figures["bytes_before"]
    assert figures["perplexity_after"] == pytest.approx(figures["perplexity_before"], rel=0.03)
    assert 1.0 < figures["perplexity_before"] < 200.0
    assert all(figures[f"tokens_per_s_{side}"] > 0 for side in ("before", "after"))


def test_the_same_job_again_is_up_to_date(
    config: Config, accepted: tuple[ModelVersion, dict[str, Any]], tmp_path: Path
) -> None:
    code, line, _ = run(config, tmp_path)
    assert (code, line["status"], line["outputs"]) == (0, "up_to_date", accepted[1]["outputs"])


def test_a_model_outside_the_budget_is_refused_with_its_figures_and_leaves_no_version(
    config: Config, trained: ModelVersion, accepted: tuple[ModelVersion, dict[str, Any]]
) -> None:
    strict = config.with_overrides({"compression.min_bytes_reduction": 0.99})
    registry, folders = Registry(config), Path(trained.uri).parent
    before = sorted(folders.iterdir())
    with pytest.raises(StageRefused, match=r"min_bytes_reduction is 99\.0%") as refusal:
        compress(strict, trained)
    assert refusal.value.figures["accepted"] is False
    assert refusal.value.figures["bytes_before"] == gate.weights_bytes(trained.uri)
    assert sorted(folders.iterdir()) == before
    assert registry.version(None) == registry.alias("candidate") == accepted[0]


def test_a_compressed_model_is_not_compressed_again(
    config: Config, trained: ModelVersion, accepted: tuple[ModelVersion, dict[str, Any]]
) -> None:
    with pytest.raises(ModelError, match=f"compressed already: compress version {trained.version}"):
        compress(config, accepted[0])


def test_a_damaged_model_folder_is_said_in_one_sentence(
    config: Config, table: TableVersion, trained: ModelVersion, tmp_path: Path
) -> None:
    import shutil

    folder = tmp_path / "damaged"
    shutil.copytree(trained.uri, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1_000])
    other = config.with_overrides({"registry.model": "damaged"})
    version = register(other, table, folder)
    code, line, errors = run(other, tmp_path)
    assert (code, line["status"], line["outputs"]) == (1, "failed", {})
    assert line["error"].startswith(f"{version.uri}/model.safetensors is damaged (")
    assert "\n" not in line["error"]
    assert "Traceback" not in errors


def test_a_model_that_fits_no_node_is_said_instead_of_waited_for(config: Config, trained: ModelVersion) -> None:
    with pytest.raises(ClusterError, match="no node of the cluster has 1 CPU, 1 GPU"):
        compress(config.with_overrides({"training.use_gpu": True}), trained)


def test_dry_run_plans_and_writes_nothing(config: Config, trained: ModelVersion) -> None:
    before = sorted(Path(config.storage.uri).rglob("*"))
    planned = JOB.plan(config, JOB.inputs(config))
    assert planned["read"]["bytes"] == gate.weights_bytes(trained.uri)
    assert sorted(Path(config.storage.uri).rglob("*")) == before
