"""What proposes trials: an Optuna study that trains no point twice and knows dimensions that come and go. No Ray in it.

    study = Study(config.tuning)
    while (values := study.ask()) is not None:
        study.tell(values, [loss_of(values)])

A searcher that proposes a point whose result is known is told that result and asked again. After a restart `know`
gives it all that was told before, which is all of its state.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from app.errors import ConfigError
from app.settings.tuning import TuningConfig
from app.tuning import space
from app.tuning.space import Space, Values

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

PROPOSALS = 8
"""Times a searcher may propose what is known already before chance proposes in its place."""
DRAWS = 1_000
ENUMERATED = 100_000
"""Points of a finite space that are looked through for one that is left."""


class Study:
    """A searcher's memory: what was proposed and what came of it."""

    def __init__(self, tuning: TuningConfig, first: Iterable[Values] = ()) -> None:
        """`first` are points to propose before the searcher is asked.

        Raises:
            ConfigError: The searcher's package is not installed.
        """
        self._tuning, self._space = tuning, tuning.space
        self._distributions = space.distributions(tuning.space)
        self._modes = [objective.mode for objective in tuning.objectives]
        self._study: optuna.Study | None = None
        self._first = deque(values for values in first if space.holds(tuning.space, values))
        self._known: dict[str, Sequence[float] | None] = {}
        self._pending: dict[str, optuna.Trial] = {}
        self._random = np.random.default_rng(tuning.seed)
        check_installed(tuning)

    def know(self, values: Values, objectives: Sequence[float] | None) -> None:
        """Learn of a trial of an earlier attempt or search; None: it failed."""
        if not space.holds(self._space, values) or space.point(values) in self._known:
            return
        self._known[space.point(values)] = objectives
        if objectives is None:
            return
        if self._tuning.searcher in ("cma_es", "nsga2"):
            # Generations: their state moves on when they are asked.
            self._opened().tell(self._asked(values), list(objectives))
            return
        trial = optuna.trial.create_trial(
            params=space.complete(self._space, values), distributions=self._distributions, values=list(objectives)
        )
        self._opened().add_trial(trial)

    def ask(self) -> Values | None:
        """A point that was not tried yet and is not being tried; None: there is none left."""
        while self._first:
            values = self._first.popleft()
            if self._is_new(values):
                return self._begun(values, self._asked(values))
        # A Gaussian process that proposes a point of a continuous space again has converged. Told its value once more,
        # it would propose it once more, and learn from ever more of the same.
        converges = self._tuning.searcher == "gp" and space.size(self._space) is None
        for _ in range(1 if converges else PROPOSALS):
            trial = self._opened().ask(self._distributions)
            values = space.active(self._space, trial.params)
            if self._is_new(values):
                return self._begun(values, trial)
            known = self._known.get(space.point(values))
            if known is None or converges:
                self._opened().tell(trial, state=TrialState.FAIL)
            else:
                self._opened().tell(trial, list(known))
        drawn = self._drawn()
        return None if drawn is None else self._begun(drawn, self._asked(drawn))

    def tell(self, values: Values, objectives: Sequence[float] | None) -> None:
        """What came of a point that was asked for; None: the trial failed."""
        point = space.point(values)
        self._known[point] = objectives
        trial = self._pending.pop(point)
        if objectives is None or not np.all(np.isfinite(objectives)):
            self._opened().tell(trial, state=TrialState.FAIL)
        else:
            self._opened().tell(trial, list(objectives))

    def _opened(self) -> optuna.Study:
        """The study, which draws other points after a restart than it drew before."""
        if self._study is None:
            optuna.logging.set_verbosity(optuna.logging.WARNING)  # it would say that of each study
            kinds = optuna.study.StudyDirection
            directions = [kinds.MINIMIZE if mode == "min" else kinds.MAXIMIZE for mode in self._modes]
            sampler = Conditional(_sampler(self._tuning, len(self._known)), self._space)
            self._study = optuna.create_study(directions=directions, sampler=sampler)
        return self._study

    def _asked(self, values: Values) -> optuna.Trial:
        """An open trial of a point that is given."""
        self._opened().enqueue_trial(space.complete(self._space, values))
        return self._opened().ask(self._distributions)

    def _begun(self, values: Values, trial: optuna.Trial) -> Values:
        self._pending[space.point(values)] = trial
        return values

    def _is_new(self, values: Values) -> bool:
        point = space.point(values)
        return point not in self._known and point not in self._pending

    def _drawn(self) -> Values | None:
        """A point by chance; of a small finite space, one of those that are left."""
        size = space.size(self._space)
        if size is not None and size <= ENUMERATED:
            left = [values for values in space.points(self._space) if self._is_new(values)]
            return left[int(self._random.integers(len(left)))] if left else None
        sampler = optuna.samplers.RandomSampler(seed=int(self._random.integers(2**31)))
        study = optuna.create_study(sampler=sampler)
        for _ in range(DRAWS):
            values = space.active(self._space, study.ask(self._distributions).params)
            if self._is_new(values):
                return values
        return None


class Conditional(BaseSampler):
    """A sampler over all dimensions at once, in which those that are not there have always the same value.

    So a joint model learns nothing from them, and no searcher needs to know of conditions.
    """

    def __init__(self, inner: BaseSampler, dimensions: Space) -> None:
        self._inner, self._space = inner, dimensions

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> "dict[str, BaseDistribution]":
        """The inner sampler's."""
        found: dict[str, BaseDistribution] = self._inner.infer_relative_search_space(study, trial)
        return found

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: "dict[str, BaseDistribution]"
    ) -> Values:
        """The inner sampler's proposal, without what is not there."""
        drawn: Values = self._inner.sample_relative(study, trial, search_space)
        if len(drawn) < len(self._space):
            return drawn
        return space.complete(self._space, space.active(self._space, drawn))

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: "BaseDistribution"
    ) -> Any:
        """A single value: dimensions are drawn in their order, so those that this one waits for are known."""
        drawn = self._inner.sample_independent(study, trial, param_name, param_distribution)
        there = space.is_active(self._space, param_name, trial.params)
        return drawn if there else space.placeholder(self._space[param_name])

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Passed on."""
        self._inner.before_trial(study, trial)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """Passed on."""
        self._inner.after_trial(study, trial, state, values)


def check_installed(tuning: TuningConfig) -> None:
    """Refuse a searcher whose package is missing.

    Raises:
        ConfigError: Naming the extra to install.
    """
    import importlib.util

    if tuning.searcher == "bayesopt" and importlib.util.find_spec("bayes_opt") is None:
        raise ConfigError(
            "tuning.searcher is bayesopt, and bayesian-optimization is not installed",
            "install the extra: pip install '.[bayesopt]', or use searcher gp",
        )


def _sampler(tuning: TuningConfig, known: int) -> BaseSampler:
    """Optuna's sampler of a searcher's name."""
    samplers = optuna.samplers
    seed, start = tuning.seed + known, tuning.random_trials
    match tuning.searcher:
        case "gp":
            return samplers.GPSampler(seed=seed, n_startup_trials=start)
        case "tpe":
            return samplers.TPESampler(
                seed=seed, n_startup_trials=start, multivariate=True, constant_liar=tuning.concurrent_trials != 1
            )
        case "cma_es":
            return samplers.CmaEsSampler(seed=seed, n_startup_trials=start, warn_independent_sampling=False)
        case "nsga2":
            return samplers.NSGAIISampler(seed=seed, population_size=max(2, start))
        case "bayesopt":
            from app.tuning.bayesopt import BayesOptSampler

            return BayesOptSampler(seed=seed, random_trials=start)
        case "random":
            return samplers.RandomSampler(seed=seed)
