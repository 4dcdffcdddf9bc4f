"""Which model training starts from: `training.base_model`, taken at its word once and then the same to the end."""

import re
from pathlib import Path

from app.config import Config
from app.errors import ConfigError, RegistryError
from app.registry import Registry
from app.storage import local_folder, resolve
from app.versions import ModelVersion

REGISTERED = "models:/"
_NAME = re.compile(r"models:/([^/@]+)(?:/([0-9]+)|@([^/@]+))")


def pinned(config: Config) -> tuple[Config, ModelVersion | None]:
    """The configuration with a registered base model replaced by its folder's URI, and its version if it is one.

    An alias such as models:/support@champion may stand for another version before a run has ended.

    Raises:
        ConfigError: It begins with models:/ and is of neither form.
        RegistryError: There is no such version or alias.
    """
    version = registered(config)
    if version is None:
        return config, None
    return config.with_overrides({"training.base_model": version.uri}), version


def registered(config: Config) -> ModelVersion | None:
    """The registered version that the base model names; none if it is a preset, a folder or a hub id.

    Raises:
        As `pinned`.
    """
    base_model = config.training.base_model
    if not base_model.startswith(REGISTERED):
        return None
    match = _NAME.fullmatch(base_model)
    if match is None:
        raise ConfigError(
            f"training.base_model={base_model} names no registered model", "write models:/name/3 or models:/name@alias"
        )
    name, number, alias = match.groups()
    registry = Registry(config.with_overrides({"registry.model": name}))
    if number is not None:
        return registry.version(number)
    found = registry.alias(alias)
    if found is None:
        raise RegistryError(f"no version of model {name!r} has the alias {alias!r}", "evaluate one, or name a number")
    return found


def source(base_model: str) -> str:
    """A base model as transformers takes it: the path of its folder, of a copy if it is remote; or a hub id.

    Raises:
        StorageError: A remote folder is not there, or cannot be copied.
    """
    if is_remote(base_model):
        with local_folder(base_model) as copy:  # cached: it stays
            return str(copy)
    folder = resolve(base_model)
    return folder if Path(folder).is_dir() else base_model


def is_remote(base_model: str) -> bool:
    """Whether it is a folder on another store than this machine's disk."""
    return "://" in base_model
