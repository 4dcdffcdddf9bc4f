"""The configuration: one frozen tree, a section a stage, one YAML file, one way to override it.

    config = load("jobs/configs/demo.yaml", ["training.learning_rate=1e-3"])

Everything is checked at once and every error names the file, the key, what is allowed and the nearest
spelling. A field is documented by the string under it. Units are in the names: `_s` seconds, `_bytes`,
`_tokens`, `_chars`, `_fraction` (0 to 1). Environment variables carry only addresses and secrets:
RAYLOOP_HOME, RAYLOOP_API_KEY, RAYLOOP_GRAFANA_TOKEN, OPENLINEAGE_API_KEY, and what the object stores' own clients read.
"""

import difflib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import Field, ValidationError
from pydantic_core import ErrorDetails

from app.errors import ConfigError
from app.settings.ingestion import IngestionConfig
from app.settings.lineage import LineageConfig
from app.settings.section import Count, Fraction, Positive, Section, VersionName
from app.settings.serving import ServingConfig
from app.settings.tables import ExportConfig, ForgetConfig, MaintenanceConfig, VersionsConfig
from app.settings.training import TrainingConfig
from app.settings.tuning import TuningConfig
from app.versions import digest

Stage = Literal["ingest", "tune", "train", "compress", "evaluate", "serve", "monitor"]
STAGES: tuple[Stage, ...] = get_args(Stage)


class StorageConfig(Section):
    """Where everything is kept."""

    uri: str = ".rayloop/store"
    """Root of all data: a local folder (relative to RAYLOOP_HOME), s3://, gs://, abfs:// or hdfs://."""
    catalog_uri: str | None = None
    """SQLAlchemy URI of the Iceberg catalog; none: an SQLite file under a local `uri`."""
    tracking_uri: str | None = None
    """MLflow tracking and registry URI; none: an SQLite file under a local `uri`."""


class InputsConfig(Section):
    """The versions a stage starts from; none means the newest. `jobs.lifecycle` fills these in."""

    snapshot_id: VersionName | None = None
    """Version of `ingestion.table` to read: a snapshot's id, or a tag such as train-2026-11."""
    model_version: VersionName | None = None
    """Version of `registry.model` to compress, evaluate, serve or export."""


class RegistryConfig(Section):
    """Names in MLflow."""

    model: str = "support"
    """Registered model that versions are made of."""
    experiment: str = "rayloop"
    """MLflow experiment that runs appear in."""


class CompressionConfig(Section):
    """From a model version to a smaller one."""

    method: Literal["int8"] = "int8"
    """bitsandbytes LLM.int8() of the linear layers."""
    llm_int8_threshold: Annotated[float, Field(ge=0)] = 6.0
    """Activations beyond this magnitude stay in higher precision (Dettmers et al. 2022, section 3.2); on a CPU, all of
    those of layers with at most half a million weights do, see app/int8.py."""
    max_perplexity_increase: Annotated[float, Field(ge=0)] = 0.03
    """Budget: perplexity may rise by this share; beyond it the compressed model is refused."""
    min_bytes_reduction: Fraction = 0.3
    """Budget: the folder's weights must shrink by this share."""
    validation_blocks: Count = 64
    """Held-out blocks that perplexity is measured on."""


class GateConfig(Section):
    """What a model version must reach to become the champion; none: not asked for."""

    max_perplexity: float | None = None
    """Highest perplexity on held-out replies."""
    min_token_f1: Fraction | None = None
    """Lowest token F1 against the reference replies."""
    min_intent_accuracy: Fraction | None = None
    """Lowest accuracy of the intent model on held-out questions."""
    min_reply_intent_accuracy: Fraction | None = None
    """Lowest share of replies that are about the question's intent."""


class EvaluationConfig(Section):
    """Judging a model version on the held-out split."""

    replies: Count = 200
    """Held-out questions the model answers."""
    max_reply_tokens: Count = 64
    """Longest generated reply."""
    batch_size: Count = 32
    """Questions answered at once."""
    validation_blocks: Count = 64
    """Held-out blocks that perplexity is measured on."""
    gate: GateConfig = GateConfig()
    """What the model must reach."""


class MonitoringConfig(Section):
    """What is watched, and where it is shown."""

    window_s: Positive = 86_400.0
    """How far back traffic is read."""
    interval_s: Positive = 15.0
    """Seconds between two passes of the deployed monitor."""
    deploy: bool = True
    """Keep watching as a Ray Serve application after the job has ended."""
    grafana_url: str | None = None
    """Where the dashboard is pushed (token in RAYLOOP_GRAFANA_TOKEN); none: nowhere."""


class LifecycleConfig(Section):
    """The path as a whole."""

    stages: tuple[Stage, ...] = STAGES
    """Stages to run, in the order of the path; a stage that is left out is neither run nor waited for."""
    job_timeout_s: Positive = 86_400.0
    """Longest a stage may take."""


class Config(Section):
    """The whole tree."""

    storage: StorageConfig = StorageConfig()
    """Where everything is kept."""
    inputs: InputsConfig = InputsConfig()
    """Versions to start from."""
    registry: RegistryConfig = RegistryConfig()
    """Names in MLflow."""
    ingestion: IngestionConfig = IngestionConfig()
    """Sources to a table version."""
    tuning: TuningConfig = TuningConfig()
    """Search."""
    training: TrainingConfig = TrainingConfig()
    """Table version to model version."""
    compression: CompressionConfig = CompressionConfig()
    """Model version to a smaller one."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Judgement and gate."""
    serving: ServingConfig = ServingConfig()
    """The served application."""
    monitoring: MonitoringConfig = MonitoringConfig()
    """What is watched."""
    lifecycle: LifecycleConfig = LifecycleConfig()
    """The path as a whole."""
    lineage: LineageConfig = LineageConfig()
    """OpenLineage events."""
    versions: VersionsConfig = VersionsConfig()
    """Versions of a table: list, tag, go back, compare."""
    maintenance: MaintenanceConfig = MaintenanceConfig()
    """Small files, old versions and files that no version needs."""
    export: ExportConfig = ExportConfig()
    """A table version, or a model version, as plain files."""
    forget: ForgetConfig = ForgetConfig()
    """Conversations that are to be gone from every version."""

    def digest(self, *sections: str) -> str:
        """SHA-256 of the named sections, or of the whole tree."""
        return digest(self.model_dump(mode="json", include=set(sections) if sections else None))

    def with_overrides(self, overrides: dict[str, Any]) -> "Config":
        """This tree with dotted keys replaced, checked like a file.

        Raises:
            ConfigError: A key does not exist or a value does not fit.
        """
        tree = self.model_dump(mode="json")
        for key, value in overrides.items():
            _put(tree, key, value)
        return _validated(tree, where=lambda key: "override" if key in overrides else "config")


def load(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """The configuration of one YAML file with `section.key=value` overrides applied.

    Raises:
        ConfigError: The file cannot be read, or any key or value is wrong; every error is listed.
    """
    name = str(path)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"cannot read configuration {name!r} ({error})", "give --config an existing YAML file"
        ) from error
    try:
        tree = yaml.load(text, Loader=_Loader) or {}
        lines = _lines(yaml.compose(text, Loader=_Loader))
    except yaml.YAMLError as error:
        raise ConfigError(f"{name} is not valid YAML ({error})") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{name} holds a {type(tree).__name__}", "the top level must be sections such as `training:`")
    given = {}
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator or not key:
            raise ConfigError(f"--set {override!r} has no value", "write it as --set section.key=value")
        given[key] = yaml.load(value, Loader=_Loader)
        _put(tree, key, given[key])

    def where(key: str) -> str:
        if key in given:
            return "--set"
        if key in lines:
            return f"{name}:{lines[key]}"
        return "--set" if any(other.startswith(f"{key}.") for other in given) else name

    return _validated(tree, where)


class _Loader(yaml.SafeLoader):
    """Safe YAML, with YAML 1.2's floats: 1e-3 is a number."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.YAMLError("anchors and aliases are not accepted")
        return super().compose_node(parent, index)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in a tree of dicts. Keys below `tuning.space` are dotted themselves."""
    head = ["tuning", "space"]
    parts = [*head, key.removeprefix("tuning.space.")] if key.startswith("tuning.space.") else key.split(".")
    for part in parts[:-1]:
        if tree.get(part) is None:
            tree[part] = {}
        tree = tree[part]
        if not isinstance(tree, dict):
            raise ConfigError(f"--set {key}: {part!r} is a value or a list", "replace it as a whole")
    tree[parts[-1]] = value


def _validated(tree: dict[str, Any], where: Any) -> Config:
    try:
        # JSON mode: strict about types, yet lists become tuples.
        return Config.model_validate_json(json.dumps(tree, default=str), strict=True)
    except ValidationError as error:
        problems = [_explain(problem, where) for problem in error.errors()]
        raise ConfigError("the configuration is wrong\n  " + "\n  ".join(dict.fromkeys(problems))) from None


def _explain(problem: ErrorDetails, where: Any) -> str:
    """One sentence: file and line, key, what is wrong, what is allowed."""
    # Of a setting that may be one thing or another, pydantic names the alternative as well.
    location = [part for part in problem["loc"] if not str(part).startswith(("constrained-", "tuple["))]
    is_unknown_name = "[key]" in location  # in a mapping from a few names
    if is_unknown_name:
        location = location[: location.index("[key]")]
    key = ".".join(str(part) for part in location)
    place = f"{where(key)}: {key}"
    if problem["type"] == "extra_forbidden" or is_unknown_name:
        allowed = _keys_at(location[:-1])
        near = difflib.get_close_matches(str(location[-1]), allowed, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return f"{place} is not a setting; {hint}allowed here: {', '.join(allowed)}"
    value = (
        json.dumps(problem["input"], default=str, ensure_ascii=False)
        if not isinstance(problem["input"], dict)
        else "a section"
    )
    if problem["type"] == "missing":
        return f"{place} is missing and has no default"
    unit = _unit(str(location[-1]) if location else "")
    message = (
        problem["msg"].removeprefix("Value error, ").replace("Input should", "must").replace("String should", "must")
    )
    if problem["type"] == "value_error" and isinstance(problem["input"], dict):
        return f"{place}: {message}"  # a section's own check says which value it is about
    return f"{place}: {message}{unit}, got {value}"


def _unit(field: str) -> str:
    units = {
        "_s": "seconds, a plain number",
        "_bytes": "bytes, a plain number",
        "_tokens": "tokens",
        "_chars": "characters",
        "_fraction": "a share from 0 to 1",
    }
    return next((f" ({meaning})" for suffix, meaning in units.items() if field.endswith(suffix)), "")


def _keys_at(location: Sequence[str | int]) -> list[str]:
    """The settings allowed in the section at a location."""
    section: Any = Config
    for part in location:
        if isinstance(part, int):
            continue
        fields = getattr(section, "model_fields", {})
        if part not in fields:
            continue
        annotation = fields[part].annotation
        section = None if part == location[-1] and get_origin(annotation) is dict else _section_of(annotation)
        if section is None:
            return [name for alternative in get_args(annotation)[:1] for name in _literals_of(alternative)]
    return list(section.model_fields)


def _literals_of(annotation: Any) -> list[str]:
    """The names in `Literal["a"] | Literal["b"]`."""
    if get_origin(annotation) is Literal:
        return [str(name) for name in get_args(annotation)]
    return [name for part in get_args(annotation) for name in _literals_of(part)]


def _section_of(annotation: Any) -> Any:
    """The Section class in an annotation such as `X`, `X | None`, `tuple[X, ...]` or `dict[str, X]`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((found for part in get_args(annotation) if (found := _section_of(part)) is not None), None)


def _lines(node: Any, prefix: str = "") -> dict[str, int]:
    """Line number of each dotted key of a composed YAML document."""
    found: dict[str, int] = {}
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            key = f"{prefix}{key_node.value}"
            found[key] = key_node.start_mark.line + 1
            found |= _lines(value_node, f"{key}.")
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            found[f"{prefix}{index}"] = item.start_mark.line + 1
            found |= _lines(item, f"{prefix}{index}.")
    return found
