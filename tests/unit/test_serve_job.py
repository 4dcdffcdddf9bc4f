"""What `jobs.serve` makes of its configuration before it deploys anything."""

import shutil
from pathlib import Path
from typing import Any

import pytest

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


def test_a_plan_counts_the_bytes_of_adapters_alone(store: Path) -> None:
    given = config(store)
    reads = serve.plan(given, serve.inputs(given))["reads"]
    whole, adapters = (reads[str(store / name)]["weights_bytes"] for name in ("base", "merged"))
    assert 0 < adapters < whole / 2


def test_an_adapter_that_does_not_fit_ends_the_job_before_anything_is_deployed(store: Path, tmp_path: Path) -> None:
    other = config(store, uri=str(tmp_path))
    with pytest.raises(ModelError, match="holds no adapters"):
        serve.run(other, serve.inputs(other))
    answering_model.make_adapter(tmp_path, store / "base")  # its lineage says that it was trained beside support/3
    with pytest.raises(ModelError, match="were trained beside support/3, and are to be served beside support/1"):
        serve.run(other, serve.inputs(other))
