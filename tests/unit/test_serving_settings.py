"""The settings of the served application: what may change at run time, and Serve's own configuration of it."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from ray.serve.schema import ServeDeploySchema

from app.settings.serving import LIVE, LIVE_DEPLOYMENTS, ServingConfig

ROOT = Path(__file__).parents[2]
VARIANTS = [{"name": "a", "version": "1", "uri": "u", "weight": 3.0}, {"name": "b", "version": "2", "uri": "v"}]


def test_what_may_change_at_run_time_is_told_apart_and_put_together_again() -> None:
    config = ServingConfig.model_validate({"variants": VARIANTS, "max_choices": 3, "requests_per_minute": 5})
    start, live = config.at_start(), config.live()
    assert start.with_live(live) == config
    other = config.model_copy(update={"max_choices": 4, "system_prompt": "Be kind."})
    assert other.at_start() == start
    assert other.live() != live
    assert live["weights"] == {"a": 3.0, "b": 1.0}
    larger = config.model_copy(update={"context_tokens": 1_024})
    assert (larger.at_start() == start, larger.live() == live) == (False, True)
    assert set(live) == {*LIVE, "weights"}


def test_a_part_of_the_live_settings_leaves_the_others_as_they_are() -> None:
    config = ServingConfig.model_validate({"variants": VARIANTS, "max_choices": 3})
    changed = config.with_live({"weights": {"b": 7.0}, "requests_per_minute": 9})
    assert [variant.weight for variant in changed.variants] == [3.0, 7.0]
    assert (changed.max_choices, changed.requests_per_minute) == (3, 9)
    with pytest.raises(ValueError, match="context_tokens cannot change without new replicas"):
        config.with_live({"context_tokens": 64})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variants": [{**VARIANTS[0], "fallback": "none"}]}, "variant a falls back on none"),
        ({"variants": [{**VARIANTS[0], "fallback": "a"}]}, "variant a falls back on a"),
        ({"variants": [{**VARIANTS[0], "adapter_of": "a"}]}, r"variant a is an adapter of a; the models are \[\]"),
        (
            {"variants": [VARIANTS[0], *({**VARIANTS[1], "name": c, "adapter_of": d} for c, d in ("ba", "cb"))]},
            r"variant c is an adapter of b; the models are \['a'\]",
        ),
        (
            {"variants": [VARIANTS[0], {**VARIANTS[1], "adapter_of": "a", "fallback": "a"}]},
            "variant b falls back on a, which the same replicas write",
        ),
        (
            {"variants": [{**VARIANTS[0], "fallback": "b"}, {**VARIANTS[1], "adapter_of": "a"}]},
            "variant a falls back on b, which the same replicas write",
        ),
        (
            {"variants": [VARIANTS[0], {**VARIANTS[1], "adapter_of": "a", "engine": "vllm"}]},
            "variant b is served by the replicas of a: leave out size, and set engine: transformers",
        ),
        (
            {"variants": [VARIANTS[0], {**VARIANTS[1], "adapter_of": "a", "size": {"cpus": 1}}]},
            "variant b is served by the replicas of a",
        ),
        ({"language_model": {"replicas": [3, 2]}}, "fewest, most"),
        ({"rules": [{"name": "r", "message": "no"}]}, "neither patterns nor intents"),
        ({"rules": [{"name": "r", "message": "no", "patterns": ["("]}]}, "no regular expression"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ServingConfig.model_validate(settings)


def test_serves_own_configuration_is_that_of_the_application() -> None:
    content = yaml.safe_load((ROOT / "cluster" / "serve.yaml").read_text())
    (application,) = ServeDeploySchema.model_validate(content).applications
    config = ServingConfig.model_validate(application.args)
    assert {deployment.name for deployment in application.deployments} == set(LIVE_DEPLOYMENTS)
    for deployment in application.deployments:
        assert isinstance(deployment.user_config, dict)
        live = config.with_live(deployment.user_config)
        assert live.requests_per_minute == 600
        assert [rule.name for rule in live.rules] == ["off_topic"]
