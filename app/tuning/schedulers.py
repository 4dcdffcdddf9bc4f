"""What happens to trials on their way: Ray Tune's schedulers, from our settings.

Population-based training (Jaderberg et al. 2017) and its bandit form PB2 (Parker-Holder et al. 2020) let a trial that
lags behind go on from the checkpoint of one that leads, with other settings.
"""

import math
from typing import TYPE_CHECKING, Any

from app.settings.tuning import TuningConfig
from app.tuning.space import Space, Values

if TYPE_CHECKING:
    from ray.tune.schedulers import TrialScheduler


def changes_trials(tuning: TuningConfig) -> bool:
    """Whether trials pass on checkpoints."""
    return tuning.scheduler in ("pbt", "pb2")


def scheduler(tuning: TuningConfig) -> "TrialScheduler":
    """The scheduler of a search."""
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, PopulationBasedTraining
    from ray.tune.schedulers.pb2 import PB2

    objective = tuning.objectives[0]
    compared: dict[str, Any] = {"time_attr": "step", "metric": objective.name, "mode": objective.mode}
    population: dict[str, Any] = {
        "perturbation_interval": tuning.grace_steps,
        "require_attrs": False,
        "log_config": False,
        # Members wait for each other, so that none is done before another has anything to compare with.
        "synch": True,
    }
    match tuning.scheduler:
        case "asha":
            return ASHAScheduler(
                **compared,
                max_t=tuning.max_steps,
                grace_period=min(tuning.grace_steps, tuning.max_steps),
                reduction_factor=tuning.reduction_factor,
            )
        case "pbt":
            return PopulationBasedTraining(
                **compared,
                **population,
                hyperparam_mutations=ranges(tuning),
                custom_explore_fn=Bounded(tuning.space),
            )
        case "pb2":
            return PB2(**compared, **population, hyperparam_bounds={key: _ends(tuning, key) for key in tuning.space})
        case "none":
            return FIFOScheduler()


def ranges(tuning: TuningConfig) -> dict[str, Any]:
    """What a population's settings are drawn from, as `to_tune` gives them."""
    from ray import tune as ray_tune

    is_log = {key: each.kind == "log_float" and tuning.scheduler == "pbt" for key, each in tuning.space.items()}
    draws = {key: ray_tune.loguniform if is_log[key] else ray_tune.uniform for key in tuning.space}
    return {key: draws[key](*_ends(tuning, key)) for key in tuning.space}


def to_tune(tuning: TuningConfig, values: Values) -> Values:
    """A trial's settings as its scheduler sees them: PB2's model is of evenly spread numbers, so it sees logarithms."""
    if tuning.scheduler != "pb2":
        return values
    return {key: _power(tuning, key, value) for key, value in values.items()}


def from_tune(tuning: TuningConfig, seen: Values) -> Values:
    """A trial's settings, within their ranges: PB2 computes in single precision, which may step over an end."""
    if tuning.scheduler != "pb2":
        return dict(seen)
    powers = {key: 10.0**value if tuning.space[key].kind == "log_float" else value for key, value in seen.items()}
    return Bounded(tuning.space)(powers)


class Bounded:
    """Moves settings that were multiplied out of their range back to its end."""

    def __init__(self, space: Space) -> None:
        self._space = space

    def __call__(self, values: Values) -> Values:
        """The settings within their ranges."""
        ends = {key: self._space[key].ends for key in values}
        return {key: min(max(float(values[key]), low), high) for key, (low, high) in ends.items()}


def _power(tuning: TuningConfig, key: str, value: float) -> float:
    return math.log10(value) if tuning.space[key].kind == "log_float" else float(value)


def _ends(tuning: TuningConfig, key: str) -> list[float]:
    """Both ends of a range, as `to_tune` gives them."""
    low, high = (to_tune(tuning, {key: end})[key] for end in tuning.space[key].ends)
    return [low, high]
