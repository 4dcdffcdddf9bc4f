import json

import pytest
import torch

from app.config import Config
from app.settings.training import TrainingConfig
from app.training.deepspeed_config import deepspeed_config, learning_rate


def training(**settings: object) -> TrainingConfig:
    return Config().with_overrides({f"training.{key}": value for key, value in settings.items()}).training


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_accepts_the_configuration(stage: int) -> None:
    from app.training.engine import import_deepspeed

    deepspeed = import_deepspeed()
    given = deepspeed_config(training(zero_stage=stage, precision="bf16", micro_batch_size=3))
    read = deepspeed.runtime.config.DeepSpeedConfig(given)
    assert read.zero_optimization_stage == stage
    assert read.train_micro_batch_size_per_gpu == 3
    assert read.bfloat16_config.enabled
    assert read.gradient_clipping == 1.0


def test_muon_is_not_clipped_after_its_update_has_taken_the_place_of_the_gradient() -> None:
    given = deepspeed_config(training(optimizer="muon", muon_learning_rate=0.03, learning_rate=4e-3))
    assert given["gradient_clipping"] == 0.0
    assert given["zero_optimization"]["reduce_scatter"] is False
    assert (given["optimizer"]["params"]["lr"], given["optimizer"]["params"]["adam_lr"]) == (0.03, 4e-3)


def test_learning_rate_rises_in_the_warm_up_and_falls_to_its_floor() -> None:
    settings = training(max_steps=100, warmup_fraction=0.1, learning_rate=1.0, min_learning_rate_fraction=0.2)
    rates = [learning_rate(step, settings) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == pytest.approx(1.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[100] == pytest.approx(0.2)


def test_learning_rate_is_the_cosine_of_torch() -> None:
    settings = training(max_steps=50, warmup_fraction=0.02, learning_rate=1.0, min_learning_rate_fraction=0.1)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=49, eta_min=0.1)
    for step in range(1, 50):
        assert learning_rate(step, settings) == pytest.approx(cosine.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        cosine.step()


@pytest.mark.parametrize("warmup_fraction", [0.0, 1.0])
def test_learning_rate_is_positive_at_the_extremes(warmup_fraction: float) -> None:
    settings = training(max_steps=3, warmup_fraction=warmup_fraction)
    assert all(0 < learning_rate(step, settings) <= settings.learning_rate for step in range(4))


def test_configuration_is_plain_json() -> None:
    assert json.loads(json.dumps(deepspeed_config(training())))
