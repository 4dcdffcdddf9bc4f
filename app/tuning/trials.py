"""What is kept of trials, under `search/<name>` in the storage: enough to go on after any kind of end.

search.json         what the search is about; searches whose `subject` is the same have trials of the same value
trials/<id>.json    one trial, written when it begins and again when it has ended
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from app.config import Config
from app.errors import ConfigError
from app.settings.training import HOW_A_RUN_IS_COMPUTED
from app.settings.tuning import TuningConfig
from app.storage import Storage
from app.tuning import space
from app.tuning.space import Values
from app.versions import TableVersion, as_json, code_version, digest

FOLDER = "search"


@dataclass(frozen=True)
class Trial:
    """One trial: its settings and what came of it."""

    number: int
    """Its place in the search, from 0."""
    values: Values
    """What it trained with; where it was changed on its way, what it ended with."""
    state: Literal["running", "ended", "failed"] = "running"
    metrics: dict[str, float] = field(default_factory=dict)
    """Its last report."""
    curve: tuple[tuple[int, float], ...] = ()
    """Steps and the first objective at each of its reports."""
    changes: tuple[tuple[int, Values], ...] = ()
    """Steps at which pbt or pb2 made it go on from another trial's checkpoint, and with what."""
    seconds: float = 0.0
    error: str | None = None

    @property
    def steps(self) -> int:
        """How far it came."""
        return int(self.metrics.get("step", 0))

    def objectives(self, tuning: TuningConfig) -> list[float]:
        """What it reached."""
        return [float(self.metrics[objective.name]) for objective in tuning.objectives]


class Kept:
    """The trials of one search in the storage."""

    def __init__(self, config: Config, table: TableVersion) -> None:
        self.name, self.subject = search_name(config, table), subject(config, table)
        self.storage = Storage(config.storage.uri)
        self._config, self._table = config, table

    def open(self) -> None:
        """Say what the search is about."""
        tuning = self._config.tuning.model_dump(mode="json")
        about = {"subject": self.subject, "table": as_json(self._table), "tuning": tuning}
        self.storage.write(json.dumps(about, indent=2).encode(), FOLDER, self.name, "search.json")

    def write(self, trial_id: str, trial: Trial) -> None:
        """Keep a trial as it is now."""
        self.storage.write(json.dumps(asdict(trial)).encode(), FOLDER, self.name, "trials", f"{trial_id}.json")

    def read(self) -> dict[str, Trial]:
        """The trials of this search by their id, those that were cut short among them."""
        return _read(self.storage, self.name)

    def earlier(self) -> list[Trial]:
        """The trials that other searches on the same subject have ended; fewer steps are as good only to ASHA."""
        tuning = self._config.tuning
        found: list[Trial] = []
        for name in self.storage.list(FOLDER):
            if name != self.name and (_about(self.storage, name) or {}).get("subject") == self.subject:
                found += _read(self.storage, name).values()
        return [
            trial
            for trial in found
            if trial.state == "ended"
            and not trial.changes
            and space.holds(tuning.space, trial.values)
            and (tuning.scheduler == "asha" or trial.steps >= tuning.max_steps)
        ]

    def named(self, most: int) -> list[Values]:
        """The best settings of each search that `tuning.warm_start` names, as far as they lie in the space.

        Raises:
            ConfigError: There is no such search, or none of its trials lies in the space.
        """
        tuning, found = self._config.tuning, list[Values]()
        for name in tuning.warm_start:
            if _about(self.storage, name) is None:
                there = ", ".join(self.storage.list(FOLDER)) or "none"
                raise ConfigError(f"tuning.warm_start: there is no search {name!r}", f"searches are: {there}")
            ended = [trial for trial in _read(self.storage, name).values() if trial.state == "ended"]
            fitting = [trial for trial in ended if space.holds(tuning.space, trial.values)]
            if not fitting:
                raise ConfigError(
                    f"tuning.warm_start: none of the {len(ended)} trials of {name} lies in tuning.space",
                    "name a search over the same keys and ranges",
                )
            found += [trial.values for trial in ranked(tuning, fitting)[:most]]
        return found


def search_name(config: Config, table: TableVersion) -> str:
    """Names a search: the same for the same table version, tuning and training sections and code."""
    sections = config.digest("tuning", "training")
    return f"{config.registry.model}-{digest([as_json(table), sections, code_version('training', 'tuning')])[:16]}"


def subject(config: Config, table: TableVersion) -> str:
    """Digest of all that decides a trial's result, but its own settings."""
    searched = {key.removeprefix(space.TUNABLE) for key in config.tuning.space} | {"max_steps"}
    training = {key: value for key, value in config.training.identity().items() if key not in searched}
    steps: list[Any] = [config.tuning.max_steps, config.tuning.num_workers, config.training.blocks_per_step]
    if any(objective.name == "tokens_per_s" for objective in config.tuning.objectives):
        steps.append(config.training.model_dump(mode="json", include=set(HOW_A_RUN_IS_COMPUTED)))
    return digest([as_json(table), training, sorted(config.tuning.space), steps, code_version("training")])


def ranked(tuning: TuningConfig, trials: Sequence[Trial]) -> list[Trial]:
    """Best first, by the first objective."""
    sign = 1.0 if tuning.objectives[0].mode == "min" else -1.0
    return sorted(trials, key=lambda trial: sign * trial.objectives(tuning)[0])


def _about(storage: Storage, name: str) -> dict[str, Any] | None:
    if not storage.exists(FOLDER, name, "search.json"):
        return None
    about: dict[str, Any] = json.loads(storage.read(FOLDER, name, "search.json"))
    return about


def _read(storage: Storage, name: str) -> dict[str, Trial]:
    files = [file for file in storage.list(FOLDER, name, "trials") if file.endswith(".json")]
    found = {}
    for file in files:
        content = json.loads(storage.read(FOLDER, name, "trials", file))
        pairs = {key: tuple(map(tuple, content[key])) for key in ("curve", "changes")}
        found[file.removesuffix(".json")] = replace(Trial(content["number"], content["values"]), **(content | pairs))
    return found
