"""Settings of `tuning`: what is searched over, by which method, and for how long."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from app.settings.section import Count, Fraction, Section

PERTURBED = (
    "training.learning_rate", "training.muon_learning_rate", "training.warmup_fraction",
    "training.min_learning_rate_fraction",
)  # fmt: skip
"""What a run under way looks up at each step, so that it may change when the run goes on from a checkpoint."""


FASTER = "tokens_per_s"
"""The metric of which more is better."""


class DimensionConfig(Section):
    """One dimension of a search."""

    kind: Literal["float", "log_float", "int", "choice"]
    """How values are drawn."""
    low: float | None = None
    """Lowest value of a range."""
    high: float | None = None
    """Highest value of a range."""
    choices: tuple[Any, ...] = ()
    """Values of a choice."""
    when: dict[str, Any] = {}
    """The dimension is there only where these other keys of the space have these values."""

    @model_validator(mode="after")
    def _complete(self) -> "DimensionConfig":
        if self.kind == "choice":
            if not self.choices:
                raise ValueError("a choice needs `choices`, a list of values")
        elif self.low is None or self.high is None or not self.low < self.high:
            raise ValueError(f"{self.kind} needs `low` < `high`, got low={self.low} high={self.high}")
        elif self.kind == "log_float" and self.low <= 0:
            raise ValueError(f"log_float needs low > 0, got {self.low}")
        return self

    @property
    def ends(self) -> tuple[float, float]:
        """Lowest and highest value of a range."""
        assert self.low is not None
        assert self.high is not None
        return self.low, self.high

    def allows(self, value: Any) -> bool:
        """Whether `value` is one of this dimension's."""
        if self.kind == "choice":
            return value in self.choices
        is_number = isinstance(value, int) if self.kind == "int" else isinstance(value, int | float)
        return is_number and not isinstance(value, bool) and self.ends[0] <= value <= self.ends[1]


class ObjectiveConfig(Section):
    """What a search makes small or large."""

    name: Literal["validation_loss", "perplexity", "training_loss", "tokens_per_s"]
    """Metric that a trial reports."""
    mode: Literal["min", "max"] = Field(default_factory=lambda given: "max" if given.get("name") == FASTER else "min")
    """Whether less or more of it is better; by default more tokens_per_s, and less of the others."""


class TuningConfig(Section):
    """Search over configuration keys before training."""

    searcher: Literal["gp", "tpe", "cma_es", "nsga2", "bayesopt", "random"] = "gp"
    """What proposes trials: a Gaussian process, tree-structured Parzen estimators, covariance matrix adaptation
    (numbers only), a genetic algorithm (several objectives only), bayesian-optimization (extra `bayesopt`; one
    objective, continuous numbers only), or chance."""
    scheduler: Literal["asha", "pbt", "pb2", "none"] = "asha"
    """What happens to trials on their way: asha stops what lags behind; pbt and pb2 let it go on from the checkpoint of
    a better trial with changed learning rates, drawn by chance or proposed by a Gaussian process; none: nothing."""
    objectives: tuple[ObjectiveConfig, ...] = (ObjectiveConfig(name="validation_loss"),)
    """What is made small or large; of several, the best trade-offs are found. The logarithm of the evaluate stage's
    perplexity is `validation_loss`."""
    trials: Count = 4
    """Trials in all; fewer where the space has fewer points. With pbt and pb2, the size of the population."""
    concurrent_trials: Count | None = 2
    """Trials at a time; null: as many as the cluster has room for."""
    max_steps: Count = 40
    """Steps of a trial that is not stopped early; replaces `training.max_steps` within the search."""
    grace_steps: Count = 10
    """Steps before ASHA may stop a trial; also the steps between a trial's reports, and between the changes of pbt and
    pb2."""
    reduction_factor: Annotated[int, Field(ge=2)] = 2
    """ASHA keeps one trial in this many at each rung."""
    num_workers: Count = 1
    """Ray Train workers a trial."""
    random_trials: Count = 2
    """Trials drawn by chance before a searcher has anything to learn from."""
    max_failed_fraction: Fraction = 0.5
    """Share of `trials` that may fail; beyond it the search stops. A trial whose process dies has not failed: it starts
    again, `training.max_failures` times."""
    space: dict[str, DimensionConfig] = {
        "training.learning_rate": DimensionConfig(kind="log_float", low=5e-4, high=1e-2),
    }
    """Dotted configuration keys and the values they may take."""
    warm_start: tuple[str, ...] = ()
    """Names of earlier searches, folders under `search/`: their best settings are tried first. What earlier searches
    found on the same table version with the same training settings, code and steps is known without being named."""
    seed: int = 17
    """Of the searcher."""

    @model_validator(mode="after")
    def _consistent(self) -> "TuningConfig":
        problem = self._conditions() or self._searcher() or self._scheduler()
        if problem:
            raise ValueError(problem)
        return self

    def _conditions(self) -> str | None:
        """What is wrong with `when`."""
        before: dict[str, DimensionConfig] = {}
        for key, dimension in self.space.items():
            for other, value in dimension.when.items():
                if other not in before:
                    return f"space.{key}: `when` names {other!r}, which does not stand before it in the space"
                if not before[other].allows(value):
                    return f"space.{key}: `when` waits for {other} = {value!r}, which it never is"
            before[key] = dimension
        return None

    def _searcher(self) -> str | None:
        """Why the searcher cannot search this."""
        names = [objective.name for objective in self.objectives]
        if not names or len(set(names)) < len(names):
            return f"objectives must be at least one and all different, got {names}"
        several = len(names) > 1
        if self.searcher == "nsga2" and not several:
            return f"nsga2 trades several objectives against each other, got {names}: name two, or use searcher gp"
        if self.searcher in ("cma_es", "bayesopt") and several:
            return f"{self.searcher} knows one objective, got {names}: use gp, tpe or nsga2"
        kinds = {"cma_es": ("float", "log_float", "int"), "bayesopt": ("float", "log_float")}.get(self.searcher)
        for key, dimension in self.space.items():
            if kinds and dimension.kind not in kinds:
                return (
                    f"{self.searcher} searches {', '.join(kinds)} only, space.{key} is {dimension.kind}: use gp or tpe"
                )
            if kinds and dimension.when:
                return f"{self.searcher} knows no conditions, space.{key} has `when`: use gp or tpe"
        if self.searcher == "cma_es" and len(self.space) == 1:
            return f"cma_es needs two dimensions or more, got {list(self.space)}: use gp or tpe"
        return None

    def _scheduler(self) -> str | None:
        """Why the scheduler cannot work so."""
        if self.scheduler == "none":
            return None
        if len(self.objectives) > 1:
            return f"scheduler {self.scheduler} compares trials by one objective, got {len(self.objectives)}: use none"
        if self.scheduler == "asha":
            if self.grace_steps >= self.max_steps:
                return (
                    f"asha may stop a trial after grace_steps={self.grace_steps}, but trials have "
                    f"max_steps={self.max_steps}: lower grace_steps, or use scheduler none"
                )
            return None
        if self.searcher != "random":
            return f"{self.scheduler} proposes settings itself, got searcher {self.searcher}: use random"
        if self.num_workers > 1:
            return (
                f"{self.scheduler} passes checkpoints between trials of one worker, got num_workers {self.num_workers}"
            )
        if self.trials < 2:
            return f"{self.scheduler} needs a population, got trials {self.trials}: use 4 or more"
        if self.grace_steps >= self.max_steps:
            return (
                f"{self.scheduler} changes trials every grace_steps, got {self.grace_steps} of {self.max_steps} steps"
            )
        for key, dimension in self.space.items():
            if key not in PERTURBED:
                return (
                    f"{self.scheduler} changes settings of a run under way, which {key} is not one of: "
                    f"search over {', '.join(PERTURBED)}"
                )
            if dimension.kind not in ("float", "log_float"):
                return f"{self.scheduler} changes numbers, space.{key} is {dimension.kind}: use float or log_float"
        return None
