"""Runs, metrics, model versions and their aliases. Nothing else imports MLflow.

    registry = Registry(config)
    run_id = registry.start_run("train", params={"learning_rate": 1e-3}, tags={})
    registry.log_metrics(run_id, {"validation_loss": 1.2}, step=100)
    version = registry.register(run_id, uri, tags={"rayloop.stage": "train"})

The store is an SQLite file under a local root; `storage.tracking_uri` names a server at scale. Version tags:
rayloop.stage (train | compress), rayloop.table, rayloop.snapshot_id, rayloop.parent. Aliases: `candidate` is the
newest compressed version, `champion` the newest that passed evaluation.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from app.config import Config
from app.errors import ConfigError, RegistryError
from app.storage import Storage
from app.versions import ModelVersion

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion as Registered
    from mlflow.tracking import MlflowClient

STAGE_TAG = "rayloop.stage"
_PARAMETER_CHARS = 6_000  # MLflow's limit


def tracking_uri(config: Config) -> str:
    """Where runs and versions are recorded.

    Raises:
        ConfigError: The storage is remote and no tracking server is named.
    """
    if config.storage.tracking_uri:
        return config.storage.tracking_uri
    storage = Storage(config.storage.uri)
    if not storage.is_local:
        raise ConfigError(
            f"storage.uri is {config.storage.uri} and no MLflow server is named: SQLite serves one machine's disk",
            "set storage.tracking_uri, e.g. http://mlflow:5000",
        )
    return f"sqlite:///{storage.path('mlflow.db')}"


@contextmanager
def closing(close: Callable[[str], None]) -> Iterator[None]:
    """Close an MLflow run with the status of what became of the block: FINISHED, FAILED, or KILLED by a signal."""
    status = "KILLED"
    try:
        yield
        status = "FINISHED"
    except Exception:
        status = "FAILED"
        raise
    finally:
        close(status)


class Registry:
    """MLflow, in this project's words. Cheap to make: the store is opened at first use."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.model = config.registry.model
        self._opened: MlflowClient | None = None

    @property
    def _client(self) -> "MlflowClient":
        if self._opened is None:
            os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
            # Its messages about migrating a store that it has just made tell nobody anything.
            os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
            from mlflow.tracking import MlflowClient

            uri = tracking_uri(self.config)
            storage = Storage(self.config.storage.uri)
            if uri.startswith("sqlite:"):
                storage.filesystem.create_dir(storage.root_path, recursive=True)
            self._opened = MlflowClient(tracking_uri=uri, registry_uri=uri)
        return self._opened

    def start_run(self, stage: str, params: dict[str, Any], tags: dict[str, str]) -> str:
        """Begin a run in the experiment; returns its id."""
        run = self._client.create_run(
            self._experiment_id(), tags={STAGE_TAG: stage, **tags}, run_name=tags.get("rayloop.run", stage)
        )
        self.log_params(run.info.run_id, params)
        return str(run.info.run_id)

    def log_params(self, run_id: str, params: dict[str, Any]) -> None:
        """Record what a run was made with."""
        from mlflow.entities import Param

        listed = [Param(key, str(value)[:_PARAMETER_CHARS]) for key, value in params.items()]
        for start in range(0, len(listed), 100):  # MLflow's limit for one request
            self._client.log_batch(run_id, params=listed[start : start + 100])

    def unfinished_run(self, name: str) -> str | None:
        """The id of a run with the tag rayloop.run = `name` that has not ended well, so that it can be continued."""
        found = self._client.search_runs(
            [self._experiment_id()],
            filter_string=f"tags.`rayloop.run` = '{name}' and attributes.status != 'FINISHED'",
            max_results=1,
        )
        return str(found[0].info.run_id) if found else None

    def log_metrics(self, run_id: str, metrics: dict[str, float], step: int = 0) -> None:
        """Record values at a step; the MLflow page draws them while the run goes on."""
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1_000)
        self._client.log_batch(run_id, [Metric(key, float(value), now_ms, step) for key, value in metrics.items()])

    def history(self, run_id: str, names: Iterable[str]) -> dict[str, list[tuple[int, float]]]:
        """Metrics of a run by name, as (step, value) in the order of the steps; of one logged twice, as a step that is
        done again after a restart, the later value. What was never logged is left out."""
        found = {name: self._client.get_metric_history(run_id, name) for name in names}
        return {
            name: sorted({each.step: each.value for each in sorted(values, key=lambda each: each.timestamp)}.items())
            for name, values in found.items()
            if values
        }

    def set_tags(self, run_id: str, tags: dict[str, str]) -> None:
        """Put tags on a run."""
        for key, value in tags.items():
            self._client.set_tag(run_id, key, value)

    def end_run(self, run_id: str, status: str = "FINISHED") -> None:
        """Close a run as FINISHED, FAILED or KILLED."""
        self._client.set_terminated(run_id, status)

    def register(self, run_id: str, uri: str, tags: dict[str, str]) -> ModelVersion:
        """Make the folder at `uri` the next version of `registry.model`."""
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(self.model)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        made = self._client.create_model_version(
            self.model, source=uri, run_id=run_id, tags={**tags, "rayloop.uri": uri}
        )
        return _version(made)

    def version(self, version: str | None, stage: str | None = None) -> ModelVersion:
        """A version by its number; with none, the newest, or the newest that `stage` made.

        Raises:
            RegistryError: There is none.
        """
        if version is None:
            chosen = [found for found in self._versions() if stage in (None, found.tags.get(STAGE_TAG))]
            if not chosen:
                raise RegistryError(
                    f"model {self.model!r} has no version{f' made by {stage}' if stage else ''}",
                    f"run jobs.{stage or 'train'} first",
                )
            return _version(max(chosen, key=lambda found: int(found.version)))
        return _version(self._registered(version))

    def tags(self, version: ModelVersion) -> dict[str, str]:
        """The tags of a version.

        Raises:
            RegistryError: It is not registered.
        """
        return dict(self._registered(version.version, version.model).tags)

    def alias(self, name: str) -> ModelVersion | None:
        """The version that an alias stands for."""
        from mlflow.exceptions import MlflowException

        try:
            return _version(self._client.get_model_version_by_alias(self.model, name))
        except MlflowException as error:
            if error.error_code in _ABSENT:
                return None
            raise

    def set_alias(self, name: str, version: ModelVersion) -> None:
        """Let an alias stand for a version from now on."""
        self._client.set_registered_model_alias(version.model, name, version.version)

    def exists(self, version: ModelVersion) -> bool:
        """Whether the version is registered and its folder is there."""
        try:
            self._registered(version.version, version.model)
        except RegistryError:
            return False
        return Storage(version.uri).exists("config.json")

    def all_versions(self) -> list[tuple[ModelVersion, dict[str, str]]]:
        """Every version of every model, with its tags; none where there is no store, which asking does not make.

        Raises:
            RegistryError: The store does not answer, or is damaged.
            ConfigError: The storage is remote and no tracking server is named.
        """
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        tracking_uri(self.config)
        if self._embedded and not Storage(self.config.storage.uri).exists("mlflow.db"):
            return []
        found: list[Registered] = []
        token = None
        try:
            while True:
                page = self._client.search_model_versions(max_results=1_000, page_token=token)
                found += page
                token = page.token
                if not token:
                    break
        except (MlflowException, SQLAlchemyError) as error:
            raise RegistryError(
                f"the model registry cannot be asked ({type(error).__name__})",
                "check storage.tracking_uri, or that mlflow.db under storage.uri is an intact SQLite file",
            ) from error
        return [
            (
                ModelVersion(each.name, str(each.version), each.tags.get("rayloop.uri", str(each.source))),
                dict(each.tags),
            )
            for each in found
        ]

    def tag_version(self, version: ModelVersion, key: str, value: str) -> None:
        """Put a tag on a version, of whatever model."""
        self._client.set_model_version_tag(version.model, version.version, key, value)

    def _experiment_id(self) -> str:
        name = self.config.registry.experiment
        found = self._client.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        location = Storage(self.config.storage.uri).uri("mlflow-artifacts") if self._embedded else None
        return str(self._client.create_experiment(name, artifact_location=location))

    @property
    def _embedded(self) -> bool:
        return self.config.storage.tracking_uri is None

    def _versions(self) -> "list[Registered]":
        from mlflow.exceptions import MlflowException

        try:
            return list(self._client.search_model_versions(f"name='{self.model}'", max_results=10_000))
        except MlflowException as error:
            if error.error_code in _ABSENT:
                return []
            raise

    def _registered(self, version: str, model: str | None = None) -> "Registered":
        from mlflow.exceptions import MlflowException

        model = model or self.model
        try:
            return self._client.get_model_version(model, version)
        except MlflowException as error:
            if error.error_code not in _ABSENT:
                raise
        there = ", ".join(str(number) for number in sorted(int(found.version) for found in self._versions())) or "none"
        raise RegistryError(f"model {model!r} has no version {version!r}", f"versions are: {there}")


_ABSENT = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")


def _version(found: "Registered") -> ModelVersion:
    return ModelVersion(found.name, str(found.version), found.tags["rayloop.uri"])
