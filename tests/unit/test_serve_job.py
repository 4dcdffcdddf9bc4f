"""What `jobs.serve` makes of its configuration before it deploys anything."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from app import lineage
from app.config import Config
from app.errors import ConfigError, ModelError, RegistryError
from app.registry import Registry
from app.serving.application import build_app
from jobs import serve
from tests import answering_model


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry with a model, and with a version that has adapters beside its merged weights."""
    root = tmp_path_factory.mktemp("serve")
    answering_model.make(root / "base")
    shutil.copytree(root / "base", root / "merged")
    answering_model.make_adapter(root / "merged" / "adapter", root / "base")
    (root / "merged" / "adapter" / "lineage.json").unlink()
    known = lineage.read(str(root / "base"))
    lineage.write(root / "base", dataclasses.replace(known, version="1", parent=None, stage="train"))
    lineage.write(root / "merged", dataclasses.replace(known, version="2", parent="support/1", stage="train"))
    registry = Registry(Config().with_overrides({"storage.uri": str(root / "store")}))
    for name in ("base", "merged"):
        registry.register(registry.start_run("train", {}, {}), str(root / name), {"rayloop.stage": "train"})
    return root


def config(store: Path, **adapted: Any) -> Config:
    variants = [{"name": "base", "version": "1"}, {"name": "polite", "version": "2", "adapter_of": "base", **adapted}]
    return Config.model_validate({"storage": {"uri": str(store / "store")}, "serving": {"variants": variants}})


def test_variants_are_looked_up_in_the_registry_where_they_name_no_folder(store: Path) -> None:
    given = config(store)
    variants = serve.serving(given, serve.inputs(given)).variants
    assert [variant.uri for variant in variants] == [str(store / "base"), str(store / "merged")]
    named = config(store, uri=str(store / "merged" / "adapter"))
    assert serve.serving(named, serve.inputs(named)).variants[1].uri == str(store / "merged" / "adapter")
    with pytest.raises(RegistryError, match="model 'support' has no version '9'"):
        serve.inputs(config(store, version="9"))
    with pytest.raises(ConfigError, match=r"serving\.variants \['base', 'polite'\] have no uri"):
        build_app(given.serving)


def test_what_changes_is_told_a_setting_a_line(store: Path) -> None:
    given = config(store)
    other = given.with_overrides({"serving.requests_per_minute": 100})
    before, after = (serve.application(each, serve.inputs(each), "file:///a.zip") for each in (given, other))
    assert serve.changes(None, before) == []
    assert serve.changes(before, before) == []
    assert serve.changes(before, after) == ["serving.requests_per_minute: null -> 100"]
    assert serve.changes(after, before) == ["serving.requests_per_minute: 100 -> null"]
    one = given.model_copy(
        update={"serving": given.serving.model_copy(update={"variants": given.serving.variants[:1]})}
    )
    moved = serve.application(one, serve.inputs(one), "file:///b.zip")
    told = serve.changes(before, moved)
    assert told == [
        'serving.variants.polite.version: "2" -> null', 'code: "file:///a.zip" -> "file:///b.zip"',
    ]  # fmt: skip


def test_a_plan_counts_the_bytes_of_adapters_alone(store: Path) -> None:
    given = config(store)
    reads = serve.plan(given, serve.inputs(given))["reads"]
    whole, adapters = (reads[str(store / name)]["weights_bytes"] for name in ("base", "merged/adapter"))
    assert 0 < adapters < whole / 2


def test_an_adapter_that_does_not_fit_ends_the_job_before_anything_is_deployed(store: Path, tmp_path: Path) -> None:
    other = config(store, uri=str(tmp_path))
    with pytest.raises(ModelError, match="holds no adapters"):
        serve.run(other, serve.inputs(other))
    answering_model.make_adapter(tmp_path, store / "base")  # its lineage says that it was trained beside support/3
    with pytest.raises(ModelError, match="were trained beside support/3, and are to be served beside support/1"):
        serve.run(other, serve.inputs(other))
    (tmp_path / "lineage.json").unlink()
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": None}))
    weights = load_file(tmp_path / "adapter_model.safetensors")
    name = next(name for name in weights if name.endswith("q_proj.lora_A.weight"))
    save_file({**weights, name: weights[name][:, :32].contiguous()}, tmp_path / "adapter_model.safetensors")
    for step in (serve.plan, serve.run):
        with pytest.raises(ModelError, match="is for 32 inputs and 64 outputs"):
            step(other, serve.inputs(other))


def test_with_haproxy_one_address_of_several_is_refused(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = config(store).with_overrides({"serving.host": "192.0.2.7"})
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    for step in (serve.plan, serve.run):
        with pytest.raises(ConfigError, match=r"serving\.host=192\.0\.2\.7: HAProxy calls"):
            step(given, serve.inputs(given))
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "0")
    assert serve.plan(given, serve.inputs(given))
