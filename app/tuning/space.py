"""The search space, from configuration keys to Optuna's distributions and back."""

from typing import TYPE_CHECKING, Any

from app.config import Config, DimensionConfig
from app.errors import ConfigError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

TUNABLE = "training."


def distributions(space: dict[str, DimensionConfig]) -> "dict[str, BaseDistribution]":
    """What Optuna draws each dotted key from."""
    return {key: _distribution(dimension) for key, dimension in space.items()}


def check(config: Config) -> None:
    """Refuse a space with a key or a value that no configuration could have.

    Raises:
        ConfigError: Naming the key; or there is nothing to search.
    """
    if not config.tuning.space:
        raise ConfigError("tuning.space is empty", "name at least one key, e.g. training.learning_rate")
    for key, dimension in config.tuning.space.items():
        if not key.startswith(TUNABLE):
            raise ConfigError(f"tuning.space.{key}: a trial only trains", f"search over keys that begin with {TUNABLE}")
        for value in _corners(dimension):
            try:
                config.with_overrides({key: value})
            except ConfigError as error:
                raise ConfigError(f"tuning.space.{key}: {value!r} is out of its range\n{error}") from None


def trial_config(config: Config, overrides: dict[str, Any]) -> Config:
    """What one trial trains with: its values, within the search's own steps and workers.

    Reports come every `grace_steps`, as ASHA decides at reports.
    """
    tuning = config.tuning
    return config.with_overrides(
        {
            **overrides,
            "training.max_steps": tuning.max_steps,
            "training.report_every_steps": tuning.grace_steps,
            "training.num_workers": tuning.num_workers,
            "training.keep_checkpoints": 1,
        }
    )


def _distribution(dimension: DimensionConfig) -> "BaseDistribution":
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if dimension.kind == "choice":
        return CategoricalDistribution(dimension.choices)
    assert dimension.low is not None
    assert dimension.high is not None
    if dimension.kind == "int":
        return IntDistribution(round(dimension.low), round(dimension.high))
    return FloatDistribution(dimension.low, dimension.high, log=dimension.kind == "log_float")


def _corners(dimension: DimensionConfig) -> tuple[Any, ...]:
    if dimension.kind == "choice":
        return dimension.choices
    ends = (dimension.low, dimension.high)
    return tuple(round(end) for end in ends if end is not None) if dimension.kind == "int" else ends
