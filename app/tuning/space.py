"""The search space, from configuration keys to Optuna's distributions and back."""

import itertools
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from app.config import Config
from app.errors import ConfigError
from app.settings.tuning import DimensionConfig

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

LORA = "training.lora."
TUNABLE = "training."
DECIDED = {
    "training.max_steps": "tuning.max_steps", "training.report_every_steps": "tuning.grace_steps",
    "training.num_workers": "tuning.num_workers", "training.keep_checkpoints": "nothing: a trial keeps one",
    "training.objective": "training.objective: a search compares trials of one",
}  # fmt: skip
"""Settings of a trial that are not its own to choose, and what says what they are."""
DATA = (
    "training.base_model",
    "training.vocab_size",
    "training.block_tokens",
    "training.loss_on",
    "training.validation_blocks",
)
"""Settings that other blocks of tokens are made for."""
Space = dict[str, DimensionConfig]
Values = dict[str, Any]


def distributions(space: Space) -> "dict[str, BaseDistribution]":
    """What Optuna draws each dotted key from."""
    return {key: _distribution(dimension) for key, dimension in space.items()}


def is_active(space: Space, key: str, values: Values) -> bool:
    """Whether a dimension is there, given values of the dimensions before it."""
    return all(
        other in values and values[other] == value and is_active(space, other, values)
        for other, value in space[key].when.items()
    )


def active(space: Space, values: Values) -> Values:
    """The values of the dimensions that are there; of the others none."""
    return {key: values[key] for key in space if key in values and is_active(space, key, values)}


def complete(space: Space, values: Values) -> Values:
    """A value for each dimension: of one that is not there the same one always, so that no searcher learns from it."""
    return {key: values[key] if key in values else placeholder(dimension) for key, dimension in space.items()}


def placeholder(dimension: DimensionConfig) -> Any:
    """What stands for a dimension that is not there: the first choice, or the middle of the range."""
    if dimension.kind == "choice":
        return dimension.choices[0]
    low, high = dimension.ends
    if dimension.kind == "log_float":
        return float((low * high) ** 0.5)
    middle = (low + high) / 2
    return round(middle) if dimension.kind == "int" else middle


def point(values: Values) -> str:
    """Names a point of the space: the same for the same values."""
    return json.dumps(values, sort_keys=True, default=str)


def holds(space: Space, values: Values) -> bool:
    """Whether values are a point of the space."""
    there = {key for key in space if is_active(space, key, values)}
    return there == values.keys() and all(space[key].allows(value) for key, value in values.items())


def size(space: Space) -> int | None:
    """Combinations of values, None for any number; conditions count as if they always held."""
    product = 1
    for dimension in space.values():
        if dimension.kind not in ("choice", "int"):
            return None
        product *= len(_every(dimension))
    return product


def points(space: Space) -> Iterator[Values]:
    """Every point of a space whose `size` is finite, some of them repeatedly where there are conditions."""
    for combination in itertools.product(*(_every(dimension) for dimension in space.values())):
        yield active(space, dict(zip(space, combination, strict=True)))


def check(config: Config) -> None:
    """Refuse a space with a key or a value that no configuration could have.

    Raises:
        ConfigError: Naming the key; or there is nothing to search, or trials could not train so.
    """
    if config.training.objective == "dpo":
        raise ConfigError(
            "trials learn from the table's conversations, training.objective=dpo from preference pairs",
            "leave the stage tune out, or tune with training.objective=sft",
        )
    if not config.tuning.space:
        raise ConfigError("tuning.space is empty", "name at least one key, e.g. training.learning_rate")
    for key, dimension in config.tuning.space.items():
        if not key.startswith(TUNABLE):
            raise ConfigError(f"tuning.space.{key}: a trial only trains", f"search over keys that begin with {TUNABLE}")
        if key in DECIDED:
            raise ConfigError(f"tuning.space.{key} cannot be searched: it is decided by {DECIDED[key]}", "leave it out")
        if key in DATA and dimension.kind != "choice":
            raise ConfigError(
                f"tuning.space.{key}: blocks of tokens are made for each value before the trials begin",
                "list the values: {kind: choice, choices: [...]}",
            )
        for value in _corners(dimension):
            try:
                config.with_overrides({key: value})
            except ConfigError as error:
                raise ConfigError(f"tuning.space.{key} cannot be {value!r}\n{error}") from None
        if key.startswith(LORA) and config.training.method != "lora" and "training.method" not in config.tuning.space:
            raise ConfigError(
                f"tuning.space.{key} is read only with training.method=lora, which is {config.training.method}",
                "set the method, or leave it out",
            )


def trial_config(config: Config, overrides: Values) -> Config:
    """What one trial trains with: its values, within the search's own steps and workers.

    A step learns from as many blocks as in training itself, in more micro batches where the trial has fewer workers:
    learning rates that are good for another number are others. Reports come every `grace_steps`, as schedulers decide
    at reports.
    """
    tuning, training = config.tuning, config.with_overrides(overrides).training
    return config.with_overrides(
        {
            **overrides,
            "training.global_batch_size": training.blocks_per_step,
            "training.max_steps": tuning.max_steps,
            "training.report_every_steps": tuning.grace_steps,
            "training.num_workers": tuning.num_workers,
            "training.keep_checkpoints": 1,
        }
    )


def data_settings(config: Config) -> Iterator[Values]:
    """Every combination of values of the space that blocks of tokens are made for."""
    finite = {key: dimension.choices for key, dimension in config.tuning.space.items() if key in DATA}
    for combination in itertools.product(*finite.values()):
        yield dict(zip(finite, combination, strict=True))


def _distribution(dimension: DimensionConfig) -> "BaseDistribution":
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if dimension.kind == "choice":
        return CategoricalDistribution(dimension.choices)
    low, high = dimension.ends
    if dimension.kind == "int":
        return IntDistribution(round(low), round(high))
    return FloatDistribution(low, high, log=dimension.kind == "log_float")


def _every(dimension: DimensionConfig) -> tuple[Any, ...]:
    """All values of a choice or of an int."""
    if dimension.kind == "choice":
        return dimension.choices
    low, high = dimension.ends
    return tuple(range(round(low), round(high) + 1))


def _corners(dimension: DimensionConfig) -> tuple[Any, ...]:
    if dimension.kind == "choice":
        return dimension.choices
    return tuple(round(end) for end in dimension.ends) if dimension.kind == "int" else dimension.ends
