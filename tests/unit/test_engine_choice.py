"""Which engine a variant gets, and what it reserves."""

import importlib.util
from pathlib import Path

import pytest
from pydantic import ValidationError
from ray import serve

from app.errors import ModelError
from app.serving.application import build_app
from app.serving.language_model import LanguageModel
from app.settings.serving import ServingConfig, VariantConfig, VllmConfig


def config(engine: str, gpus: float, shared: int = 1) -> ServingConfig:
    return ServingConfig.model_validate(
        {
            "variants": [{"name": "champion", "version": "3", "uri": "/nowhere", "engine": engine}],
            "language_model": {"cpus": 0.5, "gpus": gpus},
            "vllm": {"tensor_parallel_size": shared},
        }
    )


def language_model(config: ServingConfig) -> serve.Deployment:
    """The deployment as the application has it."""
    _, models, *_ = build_app(config)._bound_deployment.init_args
    deployment: serve.Deployment = models["champion"]._bound_deployment
    return deployment


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is in this environment")
def test_vllm_where_it_is_not_installed_says_what_to_install(tmp_path: Path) -> None:
    variant = VariantConfig(name="large", version="3", uri=str(tmp_path), engine="vllm")
    with pytest.raises(ModelError, match=r"variant large has engine: vllm.*pip install 'rayloop\[vllm\]'"):
        LanguageModel(ServingConfig(variants=(variant,)), variant)


@pytest.mark.parametrize(("engine", "shared", "gpus"), [("vllm", 1, 1), ("transformers", 4, 0), ("transformers", 4, 1)])
def test_a_model_on_one_gpu_has_it_in_the_replica(engine: str, shared: int, gpus: float) -> None:
    deployment = language_model(config(engine, gpus, shared))
    assert deployment.ray_actor_options == {"num_cpus": 0.5, **({"num_gpus": gpus} if gpus else {})}
    assert deployment._replica_config.placement_group_bundles is None


def test_a_model_on_several_gpus_has_a_bundle_each_and_the_replica_sits_on_the_first() -> None:
    replica = language_model(config("vllm", 4, 4))._replica_config
    assert replica.ray_actor_options == {"num_cpus": 0.5}
    assert replica.placement_group_bundles == [{"CPU": 0.5, "GPU": 1.0}, {"GPU": 1.0}, {"GPU": 1.0}, {"GPU": 1.0}]
    assert replica.placement_group_strategy == "STRICT_PACK"


def test_without_gpus_vllm_shares_the_model_among_processes_of_the_replica() -> None:
    replica = language_model(config("vllm", 0, 2))._replica_config
    assert replica.ray_actor_options == {"num_cpus": 0.5}
    assert replica.placement_group_bundles is None


def test_gpus_that_do_not_fit_the_share_are_a_configuration_error() -> None:
    with pytest.raises(ValidationError, match=r"size=4 GPUs share variant champion"):
        config("vllm", 1, 4)
    with pytest.raises(ValidationError, match=r"reserves 2 GPUs, and engine transformers runs on one"):
        config("transformers", 2, 1)


def test_a_gpu_that_torch_does_not_see_is_told(tmp_path: Path) -> None:
    wanted = config("transformers", 1)
    variant = wanted.variants[0].model_copy(update={"uri": str(tmp_path)})
    with pytest.raises(ModelError, match=r"variant champion reserves a GPU, and torch sees none.*CUDA"):
        LanguageModel(wanted, variant)


def test_settings_that_vllm_does_not_know_are_refused() -> None:
    with pytest.raises(ValidationError):
        VllmConfig.model_validate({"block_size": 16})
