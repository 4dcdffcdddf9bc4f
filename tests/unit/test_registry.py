from pathlib import Path

import pytest

from app.config import Config
from app.errors import ConfigError, RegistryError
from app.registry import Registry
from app.versions import ModelVersion


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    return Registry(Config().with_overrides({"storage.uri": str(tmp_path_factory.mktemp("registry") / "store")}))


def registered(registry: Registry, folder: Path, stage: str) -> ModelVersion:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    run_id = registry.start_run(stage, {}, {})
    return registry.register(run_id, str(folder), {"rayloop.stage": stage, "rayloop.table": "t"})


def test_versions_are_numbered_and_found_by_stage(registry: Registry, tmp_path: Path) -> None:
    trained = registered(registry, tmp_path / "trained", "train")
    compressed = registered(registry, tmp_path / "compressed", "compress")
    assert int(compressed.version) == int(trained.version) + 1
    assert registry.version(None) == compressed
    assert registry.version(None, "train") == trained
    assert registry.version(trained.version) == trained
    assert trained.uri == str(tmp_path / "trained")
    assert registry.tags(trained)["rayloop.table"] == "t"


def test_an_alias_stands_for_one_version_at_a_time(registry: Registry, tmp_path: Path) -> None:
    first, second = (registered(registry, tmp_path / name, "compress") for name in ("first", "second"))
    assert registry.alias("challenger") is None
    registry.set_alias("challenger", first)
    registry.set_alias("challenger", second)
    assert registry.alias("challenger") == second


def test_a_version_exists_while_its_folder_does(registry: Registry, tmp_path: Path) -> None:
    version = registered(registry, tmp_path / "model", "train")
    assert registry.exists(version)
    (tmp_path / "model" / "config.json").unlink()
    assert not registry.exists(version)
    assert not registry.exists(ModelVersion("support", "999", version.uri))


@pytest.mark.parametrize("wrong", ["999", "three"])
def test_a_version_that_is_not_there_is_named_with_those_that_are(registry: Registry, wrong: str) -> None:
    with pytest.raises(RegistryError, match=f"no version '{wrong}'.*versions are: "):
        registry.version(wrong)


def test_an_empty_registry_says_what_to_run(store: str) -> None:
    empty = Registry(Config().with_overrides({"storage.uri": store}))
    with pytest.raises(RegistryError, match=r"no version made by compress: run jobs\.compress first"):
        empty.version(None, "compress")
    with pytest.raises(RegistryError, match=r"run jobs\.train first"):
        empty.version(None)
    assert empty.alias("champion") is None


def test_a_run_that_did_not_end_well_is_found_again_by_name(registry: Registry) -> None:
    killed = registry.start_run("train", {"training.seed": 1}, {"rayloop.run": "support-abc"})
    assert registry.unfinished_run("support-abc") == killed
    registry.end_run(killed, "KILLED")
    assert registry.unfinished_run("support-abc") == killed
    registry.end_run(killed)
    assert registry.unfinished_run("support-abc") is None


def test_metrics_and_tags_are_kept(registry: Registry) -> None:
    run_id = registry.start_run("train", {"n": 3, "long": "x" * 10_000}, {"rayloop.snapshot_id": "7"})
    registry.log_metrics(run_id, {"loss": 2.5}, step=1)
    registry.log_metrics(run_id, {"loss": 1.5}, step=2)
    registry.set_tags(run_id, {"seen": "yes"})
    run = registry._client.get_run(run_id)
    assert run.data.metrics == {"loss": 1.5}
    assert [point.step for point in registry._client.get_metric_history(run_id, "loss")] == [1, 2]
    assert run.data.params["n"] == "3"
    assert run.data.tags["rayloop.snapshot_id"] == "7"
    assert run.data.tags["seen"] == "yes"


def test_remote_storage_needs_a_named_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    remote = Config().with_overrides({"storage.uri": "s3://bucket/root"})
    with pytest.raises(ConfigError, match=r"set storage\.tracking_uri"):
        Registry(remote).start_run("train", {}, {})
