"""The configuration: one frozen tree, a section a stage, one YAML file, one way to override it.

    config = load("jobs/configs/demo.yaml", ["training.learning_rate=1e-3"])

Everything is checked at once and every error names the file, the key, what is allowed and the nearest
spelling. A field is documented by the string under it. Units are in the names: `_s` seconds, `_bytes`,
`_tokens`, `_chars`, `_fraction` (0 to 1). Environment variables carry only addresses and secrets:
RAYLOOP_HOME, RAYLOOP_API_KEY, RAYLOOP_GRAFANA_TOKEN, and what the object stores' own clients read.
"""

import difflib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from app.errors import ConfigError
from app.versions import digest

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
VersionName = Annotated[str, BeforeValidator(lambda value: str(value) if type(value) is int else value)]
"""MLflow's versions are numbers, which YAML reads as such."""

Stage = Literal["ingest", "tune", "train", "compress", "evaluate", "serve", "monitor"]
STAGES: tuple[Stage, ...] = get_args(Stage)


class Section(BaseModel):
    """A part of the tree: frozen, and closed to keys it does not know."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, validate_default=True
    )


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

    snapshot_id: int | None = None
    """Snapshot of `ingestion.table` to read."""
    model_version: VersionName | None = None
    """Version of `registry.model` to compress, evaluate or serve."""


class RegistryConfig(Section):
    """Names in MLflow."""

    model: str = "support"
    """Registered model that versions are made of."""
    experiment: str = "rayloop"
    """MLflow experiment that runs appear in."""


class ColumnsConfig(Section):
    """How a source's columns become a conversation record. Columns a source lacks are taken as empty."""

    conversation_id: str = "conversation_id"
    """Column with the conversation's id; where a source has none, one is made from source and position."""
    messages: str = "messages"
    """Column with the list of {role, content, intent?}; not read when `user` is given."""
    user: str | None = None
    """For one-turn tables: column with the customer's text."""
    assistant: str | None = None
    """For one-turn tables: the reply, as a column name or a template such as 'This is about {category}.'"""
    intent: str = "intent"
    """Column with the label of a one-turn table."""
    channel: str = "channel"
    """Column with the channel the conversation came through."""
    language: str = "language"
    """Column with the language."""
    started_at: str = "started_at"
    """Column with the time of the first message, ISO 8601."""


class SourceConfig(Section):
    """One place conversations come from."""

    uri: str
    """A file, a folder or a glob, local (relative to RAYLOOP_HOME) or on any object store; `sample:shop`."""
    format: Literal["jsonl", "parquet", "csv", "sample"]
    """How it is written. jsonl and csv may be compressed (.gz, .zst); sample is the embedded shop."""
    columns: ColumnsConfig = ColumnsConfig()
    """Mapping from its columns to the conversation record."""


class SampleConfig(Section):
    """The embedded shop: an endless, deterministic generator of conversations with planted defects."""

    conversations: Count = 20_000
    """How many to generate."""
    seed: int = 7
    """Same seed, same bytes."""
    defect_fraction: Fraction = 0.05
    """Share of records with a planted defect."""


class IngestionConfig(Section):
    """From sources to a table version."""

    sources: tuple[SourceConfig, ...] = (SourceConfig(uri="sample:shop", format="sample"),)
    """Everything to read, in order."""
    sample: SampleConfig = SampleConfig()
    """Settings of sources whose format is `sample`."""
    table: str = "support.conversations"
    """Iceberg table of accepted conversations, as namespace.name."""
    quarantine_table: str = "support.quarantine"
    """Iceberg table of refused records, with reason and source position."""
    validation_fraction: Fraction = 0.1
    """Share of conversations held out, chosen by content hash so that a conversation never changes side."""
    max_refused_fraction: Fraction = 0.1
    """A larger share of refused records stops the stage; nothing becomes a version."""
    max_message_chars: Count = 4_000
    """A longer message is refused."""
    max_messages: Count = 200
    """A longer conversation is refused."""
    channels: tuple[str, ...] = ("web", "app", "email", "phone", "social", "unknown")
    """Channels that exist; another one is refused. A record without one gets `unknown`."""
    batch_rows: Count = 2_048
    """Records a task works on at a time."""


class TrainingConfig(Section):
    """From a table version to a model version."""

    base_model: str = "preset:small"
    """Starting point: preset:tiny (0.1M parameters), preset:small (2M), preset:base (7M), all random; a local
    folder; or a hub id. Safetensors only, no remote code."""
    vocab_size: Annotated[int, Field(ge=300, le=200_000)] = 2_048
    """Tokens of the byte-level BPE tokenizer that is trained for a preset; a base model keeps its own."""
    block_tokens: Annotated[int, Field(ge=16)] = 256
    """Conversations are packed into blocks of this many tokens."""
    loss_on: Literal["assistant", "all"] = "assistant"
    """Which turns the model learns to write."""
    num_workers: Count = 2
    """Ray Train workers."""
    cpus_per_worker: Positive = 1.0
    """Logical CPUs a worker reserves."""
    use_gpu: bool = False
    """One GPU a worker."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO: 0 replicates; 1 shards optimizer state; 2 gradients too; 3 parameters too."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Number format of the forward and backward pass."""
    micro_batch_size: Count = 8
    """Blocks a worker computes at once."""
    gradient_accumulation_steps: Count = 1
    """Micro batches added up before a step."""
    max_steps: Count = 300
    """Optimizer steps in all."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: the matrices of the layers learn by Muon, embeddings, norms and biases by AdamW; for training from
    random weights, where it takes far fewer steps. adamw: everything by AdamW; for going on from a base model."""
    learning_rate: Positive = 2e-3
    """AdamW's peak of the cosine schedule."""
    muon_learning_rate: Positive = 2e-2
    """Muon's peak of the same schedule."""
    warmup_fraction: Fraction = 0.05
    """Share of the steps in which the learning rate rises from zero."""
    min_learning_rate_fraction: Fraction = 0.1
    """Where the cosine ends, as a share of the peak."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decoupled weight decay of matrices and embeddings."""
    gradient_clipping: Positive = 1.0
    """Largest gradient norm."""
    report_every_steps: Count = 100
    """Steps between validations; each leaves a checkpoint with a usable model in it."""
    validation_blocks: Count = 64
    """Blocks of held-out conversations a validation reads."""
    keep_checkpoints: Count = 2
    """Newest checkpoints kept."""
    max_failures: Annotated[int, Field(ge=-1)] = 3
    """Worker failures survived by going back to the last checkpoint; -1: any number."""
    seed: int = 17
    """Of initial weights and data order."""


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


class TuningConfig(Section):
    """Search over configuration keys before training."""

    trials: Count = 4
    """Trials in all."""
    concurrent_trials: Count = 2
    """Trials at a time."""
    max_steps: Count = 40
    """Steps of a trial that is not stopped early; replaces `training.max_steps` within the search."""
    grace_steps: Count = 10
    """Steps before ASHA may stop a trial; also the steps between a trial's reports."""
    reduction_factor: Annotated[int, Field(ge=2)] = 2
    """ASHA keeps one trial in this many at each rung."""
    num_workers: Count = 1
    """Ray Train workers a trial."""
    random_trials: Count = 2
    """Trials drawn at random before the Gaussian process has anything to fit."""
    space: dict[str, DimensionConfig] = {
        "training.learning_rate": DimensionConfig(kind="log_float", low=5e-4, high=1e-2),
    }
    """Dotted configuration keys and the values they may take."""
    seed: int = 17
    """Of the searcher."""


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


class VariantConfig(Section):
    """One model version that is served; `jobs.serve` fills these in from the registry."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,63}$")]
    """What `x-rayloop-variant`, the traffic log and the metrics call it."""
    model: str = "support"
    """Its name in the registry."""
    version: str
    """Version in the registry."""
    uri: str
    """Its model folder."""
    weight: Positive = 1.0
    """Share of conversations, relative to the other variants."""


class ReplicasConfig(Section):
    """Size of one deployment."""

    replicas: Count = 1
    """Copies."""
    cpus: Annotated[float, Field(ge=0)] = 0.2
    """Logical CPUs each reserves."""
    max_ongoing_requests: Count = 64
    """Requests a replica works on at once."""


class HandoverConfig(Section):
    """When a person takes over."""

    intents: tuple[str, ...] = ("human_handover",)
    """Intents that always go to a person."""
    min_intent_confidence: Fraction = 0.0
    """Below this confidence of the intent model the customer is handed over; 0: never."""
    min_reply_confidence: Fraction = 0.3
    """Below this mean token probability of the reply the customer is handed over; 0: never."""
    message: str = "I am not sure about this one, so I am handing you over to a colleague who can help."
    """What the customer then reads."""


class ServingConfig(Section):
    """The served application."""

    application: str = "support"
    """Name of the Ray Serve application."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: Annotated[int, Field(ge=1, le=65_535)] = 8_000
    """HTTP port."""
    variants: tuple[VariantConfig, ...] = ()
    """Served model versions; empty: the champion."""
    storage_uri: str = ""
    """Where traffic is logged; empty: `storage.uri`."""
    input: ReplicasConfig = ReplicasConfig()
    """Input handling: access, validation, intent."""
    language_model: ReplicasConfig = ReplicasConfig(cpus=0.5)
    """The model."""
    response: ReplicasConfig = ReplicasConfig()
    """Response management: post-processing, hand-over, logging."""
    max_batch_slots: Count = 16
    """Sequences that one language model replica generates at once."""
    context_tokens: Annotated[int, Field(ge=32)] = 512
    """Prompt and reply together; a longer prompt is refused."""
    default_max_tokens: Count = 96
    """Reply length when the request names none."""
    default_temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    """Temperature when the request names none. 0 gives the most probable reply; OpenAI's own default is 1."""
    max_body_bytes: Count = 1_000_000
    """A larger request body is refused."""
    max_messages: Count = 100
    """More messages in a request are refused."""
    handover: HandoverConfig = HandoverConfig()
    """When a person takes over."""
    deploy_timeout_s: Positive = 180.0
    """How long a deployment may take to become healthy."""


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
        return f"{name}:{lines[key]}" if key in lines else name

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
    location = list(problem["loc"])
    key = ".".join(str(part) for part in location)
    place = f"{where(key)}: {key}"
    if problem["type"] == "extra_forbidden":
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
        section = _section_of(fields[part].annotation)
    return list(section.model_fields) if section is not None else []


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
