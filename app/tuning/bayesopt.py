"""The package bayesian-optimization as an Optuna sampler.

Ray's own BayesOptSearch (Ray 2.60) works with bayesian-optimization 1.4.3 and calls `UtilityFunction`, which versions
from 2.0 on do not have; here 3.4.0 is asked without it.
"""

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna
from optuna.distributions import FloatDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.search_space import IntersectionSearchSpace
from optuna.trial import FrozenTrial, TrialState

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution


class BayesOptSampler(BaseSampler):
    """Continuous numbers, one objective. Trials that are under way count as the worst so far, so that none is
    proposed twice (Ginsbourger et al. 2010, the constant liar)."""

    def __init__(self, seed: int, random_trials: int) -> None:
        self._seed, self._start = seed, random_trials
        self._independent = RandomSampler(seed=seed)
        self._common = IntersectionSearchSpace()

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> "dict[str, BaseDistribution]":
        """All dimensions, once there is a trial that has them."""
        found: dict[str, BaseDistribution] = self._common.calculate(study)
        return found

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: "dict[str, BaseDistribution]"
    ) -> dict[str, Any]:
        """The proposal for the trials so far; none while `random_trials` have not ended."""
        ended = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if len(ended) < self._start or not search_space:
            return {}
        from bayes_opt import BayesianOptimization
        from bayes_opt.acquisition import ExpectedImprovement

        sign = -1.0 if study.direction == optuna.study.StudyDirection.MINIMIZE else 1.0
        targets = [sign * each.values[0] for each in ended]
        optimizer = BayesianOptimization(
            None,
            dict.fromkeys(search_space, (0.0, 1.0)),
            acquisition_function=ExpectedImprovement(xi=0.0),
            random_state=self._seed + trial.number,
            verbose=0,
            allow_duplicate_points=True,
        )
        # Standardised: its Gaussian process expects a variance of about one.
        scale = float(np.std(targets)) or 1.0
        for each, target in zip(ended, targets, strict=True):
            optimizer.register(_units(each, search_space), (target - float(np.mean(targets))) / scale)
        lie = (min(targets) - float(np.mean(targets))) / scale
        for each in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if search_space.keys() <= each.params.keys():
                optimizer.register(_units(each, search_space), lie)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of scikit-learn, on length scales that reach the end of their range
            proposed = optimizer.suggest()
        return {name: _value(float(proposed[name]), search_space[name]) for name in search_space}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: "BaseDistribution"
    ) -> Any:
        """By chance."""
        return self._independent.sample_independent(study, trial, param_name, param_distribution)


def _units(trial: FrozenTrial, search_space: "dict[str, BaseDistribution]") -> dict[str, float]:
    """A trial's values as shares of their ranges."""
    return {name: _share(trial.params[name], distribution) for name, distribution in search_space.items()}


def _share(value: float, distribution: "BaseDistribution") -> float:
    assert isinstance(distribution, FloatDistribution)
    low, high = distribution.low, distribution.high
    if distribution.log:
        low, high, value = float(np.log(low)), float(np.log(high)), float(np.log(value))
    return (value - low) / (high - low)


def _value(share: float, distribution: "BaseDistribution") -> float:
    assert isinstance(distribution, FloatDistribution)
    low, high = distribution.low, distribution.high
    if distribution.log:
        low, high = float(np.log(low)), float(np.log(high))
    value = low + min(1.0, max(0.0, share)) * (high - low)
    value = float(np.exp(value)) if distribution.log else value
    return min(distribution.high, max(distribution.low, value))
