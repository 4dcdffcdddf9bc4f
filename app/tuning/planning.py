"""What a search would read, compute and write at most; nothing is written to find out."""

from typing import Any

from app.config import Config
from app.storage import Storage
from app.training import planning
from app.training.base_model import pinned
from app.tuning import space
from app.tuning.study import check_installed
from app.tuning.trials import search_name
from app.versions import TableVersion


def plan(config: Config, table: TableVersion) -> dict[str, Any]:
    """The plan that `--dry-run` prints.

    Raises:
        ConfigError: The space names something that is no training setting, or the searcher is not installed.
    """
    space.check(config)
    config, _ = pinned(config)
    check_installed(config.tuning)
    tuning, storage = config.tuning, Storage(config.storage.uri)
    trial = planning.plan(space.trial_config(config, {}), table)
    name = search_name(config, table)
    return {
        "read": trial["read"],
        "searcher": tuning.searcher,
        "scheduler": tuning.scheduler,
        "trials": tuning.trials,
        "trials_at_a_time": tuning.concurrent_trials,
        "workers_a_trial": tuning.num_workers,
        "space": {key: dimension.model_dump(exclude_defaults=True) for key, dimension in tuning.space.items()},
        "steps_at_most": tuning.trials * tuning.max_steps,
        "tokens_at_most": tuning.trials * trial["tokens"],
        "write": {"blocks": trial["write"]["blocks"], "search": storage.uri("search", name)},
        "continues": storage.exists("search", name),
    }
