"""What a search would read, compute and write at most; nothing is written to find out."""

from typing import Any

from app.config import Config
from app.storage import Storage
from app.training import planning
from app.tuning import space
from app.tuning.search import search_name
from app.versions import TableVersion


def plan(config: Config, table: TableVersion) -> dict[str, Any]:
    """The plan that `--dry-run` prints.

    Raises:
        ConfigError: The space names something that is no training setting.
    """
    space.check(config)
    tuning, storage = config.tuning, Storage(config.storage.uri)
    trial = planning.plan(space.trial_config(config, {}), table)
    name = search_name(config, table)
    return {
        "read": trial["read"],
        "trials": tuning.trials,
        "trials_at_a_time": tuning.concurrent_trials,
        "workers_at_a_time": tuning.concurrent_trials * tuning.num_workers,
        "space": {key: dimension.model_dump(exclude_defaults=True) for key, dimension in tuning.space.items()},
        "steps_at_most": tuning.trials * tuning.max_steps,
        "tokens_at_most": tuning.trials * trial["tokens"],
        "write": {"blocks": trial["write"]["blocks"], "search": storage.uri("search", name)},
        "continues": storage.exists("search", name),
    }
