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
from pydantic import Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from app.errors import ConfigError
from app.settings.finetuning import DpoConfig, LoraConfig
from app.settings.ingestion import IngestionConfig
from app.settings.lineage import LineageConfig
from app.settings.section import Count, Fraction, Positive, Section, VersionName
from app.settings.tables import ExportConfig, ForgetConfig, MaintenanceConfig, VersionsConfig
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


HOW_A_RUN_IS_COMPUTED = (
    "num_workers",
    "resize_interval_s",
    "cpus_per_worker",
    "use_gpu",
    "zero_stage",
    "report_every_steps",
    "keep_checkpoints",
    "publish",
    "on_bad_loss",
    "bad_loss_factor",
    "max_bad_losses",
    "max_failures",
    "probe_steps",
    "offload_optimizer",
    "offload_parameters",
    "nvme_path",
    "sequence_parallel_size",
    "activation_checkpointing",
    "loss_chunk_tokens",
    "adam_kernel",
    "compile",
    "attention",
)
"""Settings of `training` that may change between two submissions of a run."""

Offload = Literal["none", "cpu", "nvme"]


class TrainingConfig(Section):
    """From a table version to a model version."""

    base_model: str = "preset:small"
    """Starting point: preset:tiny (0.1M parameters), preset:small (2M), preset:base (7M), all random; a registered
    model, models:/support/3 or models:/support@champion; a folder, local or s3://, gs://, abfs://, hdfs://; or a hub
    id. Safetensors only, no remote code."""
    method: Literal["full", "lora"] = "full"
    """full: every weight is trained. lora: the base model stays as it is and small adapters beside its layers are
    trained; the model version that is registered has them merged in, and holds them in `adapter/` too."""
    lora: LoraConfig = LoraConfig()
    """The adapters of `method` lora."""
    objective: Literal["sft", "dpo"] = "sft"
    """sft: learn to write the table's conversations (supervised fine-tuning). dpo: learn from preference pairs which
    of two replies people liked better; conversations of the table then only measure how well it still writes them."""
    dpo: DpoConfig = DpoConfig()
    """Preference tuning of `objective` dpo."""
    vocab_size: Annotated[int, Field(ge=300, le=200_000)] = 2_048
    """Tokens of the byte-level BPE tokenizer that is trained for a preset; a base model keeps its own."""
    block_tokens: Annotated[int, Field(ge=16)] = 256
    """Conversations are packed into blocks of this many tokens."""
    loss_on: Literal["assistant", "all"] = "assistant"
    """Which turns the model learns to write."""
    num_workers: Count | tuple[Count, Count] = 2
    """Ray Train workers. Two numbers, the fewest and the most: as many as the cluster has room for, and when that
    changes, training goes on from the last checkpoint with more or fewer; what a step learns from stays the same."""
    resize_interval_s: Positive = 60.0
    """Seconds between two looks at whether there is room for more workers."""
    cpus_per_worker: Positive = 1.0
    """Logical CPUs a worker reserves."""
    use_gpu: bool = False
    """One GPU a worker."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO: 0 replicates; 1 shards optimizer state; 2 gradients too; 3 parameters too."""
    offload_optimizer: Offload = "none"
    """Where ZeRO 1-3 keeps optimizer state and updates it: with the model, or in the CPU's memory."""
    offload_parameters: Offload = "none"
    """Where ZeRO 3 keeps parameters that are not being computed with: there, in the CPU's memory, or in `nvme_path`."""
    nvme_path: str | None = None
    """Local folder on a fast disk, for what is offloaded to nvme."""
    tensor_parallel_size: Count = 1
    """Workers that share every matrix of the layers (DeepSpeed AutoTP); divides `num_workers`."""
    sequence_parallel_size: Count = 1
    """Workers that share every block of tokens (DeepSpeed Ulysses); divides `num_workers` and `block_tokens`."""
    activation_checkpointing: bool = False
    """Compute a layer's activations again in the backward pass instead of keeping them."""
    adam_kernel: Literal["torch", "fused", "deepspeed"] = "torch"
    """AdamW's step: torch's loop over tensors; torch's fused one; DeepSpeed's FusedAdam or, offloaded to the CPU,
    DeepSpeedCPUAdam, which are compiled once and need nvcc or g++."""
    compile: bool = False
    """Whether torch.compile makes kernels of the model: half a minute at the start of each worker, and more."""
    attention: Literal["auto", "varlen", "sdpa", "flex", "flash"] = "auto"
    """How attention within packed conversations is computed. varlen: each at its own length, in Llama, Mistral and Qwen
    models without sliding windows. sdpa: with a mask. flex: by FlexAttention, compiled for their borders (GPU). flash:
    by FlashAttention over their lengths (GPU, package flash-attn). auto: varlen where it can be had, else sdpa."""
    loss_chunk_tokens: Count | None = None
    """Tokens whose logits are in memory at a time; none: 256 on a CPU, whose caches they then fit, 2,048 on a GPU."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Number format of the forward and backward pass."""
    micro_batch_size: Count = 8
    """Blocks a worker computes at once."""
    gradient_accumulation_steps: Count = 1
    """Micro batches added up before a step."""
    global_batch_size: Count | None = None
    """Blocks that a step learns from; none: (most) workers x micro batch x accumulation, as the run began. On another
    number of workers the accumulation changes instead; where they do not divide, some micro batches are smaller."""
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
    """Largest gradient norm; with muon nothing is clipped, see app/training/deepspeed_config.py."""
    report_every_steps: Count = 100
    """Steps between validations; each leaves a checkpoint with a usable model in it."""
    validation_blocks: Count = 64
    """Blocks of held-out conversations a validation reads."""
    keep_checkpoints: Count = 2
    """Checkpoints kept: those with the lowest validation loss, and the newest besides."""
    publish: Literal["best", "last"] = "best"
    """Whether the model of the kept checkpoint with the lowest validation loss is registered, or the last step's."""
    on_bad_loss: Literal["skip", "roll_back", "stop"] = "skip"
    """What is done about a step whose loss is not finite or jumps. skip: its gradient is thrown away. roll_back: to
    the last checkpoint, and on without that step's blocks. stop: the stage fails."""
    bad_loss_factor: Annotated[float, Field(gt=1)] = 5.0
    """A loss this many times the median of the last 50 steps, and at least 1 above it, has jumped."""
    max_bad_losses: Annotated[int, Field(ge=0)] = 10
    """After more bad losses than these the stage fails, whatever `on_bad_loss` says."""
    max_failures: Annotated[int, Field(ge=-1)] = 3
    """Worker failures survived by going back to the last checkpoint; -1: any number."""
    probe_steps: Annotated[int, Field(ge=0)] = 8
    """Steps on made-up tokens that `--dry-run` measures, to tell how long training will take; 0: none."""
    seed: int = 17
    """Of initial weights and data order."""

    def identity(self) -> dict[str, Any]:
        """The settings that decide what a run learns: submitted again with others of the rest, it goes on."""
        return self.model_dump(mode="json", exclude=set(HOW_A_RUN_IS_COMPUTED))

    @property
    def min_workers(self) -> int:
        """The fewest that training goes on with."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        """The most that it uses."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @property
    def blocks_per_step(self) -> int:
        """Blocks that a step of a new run learns from."""
        return self.global_batch_size or self.max_workers * self.micro_batch_size * self.gradient_accumulation_steps

    @model_validator(mode="after")
    def _consistent(self) -> "TrainingConfig":
        if self.min_workers > self.max_workers:
            raise ValueError(f"num_workers is [fewest, most], got {list(self.num_workers)}")  # type: ignore[arg-type]
        if self.blocks_per_step * self.workers_per_batch < self.max_workers:
            raise ValueError(
                f"global_batch_size={self.global_batch_size} has no block for each of num_workers={self.num_workers}: "
                f"raise it to {self.max_workers // self.workers_per_batch} at least, or use fewer workers"
            )
        return self

    @model_validator(mode="after")
    def _method_fits(self) -> "TrainingConfig":
        if self.objective == "dpo" and self.base_model.startswith("preset:"):
            raise ValueError(
                f"objective=dpo prefers among what a trained model says, and base_model={self.base_model} is random: "
                "name a registered model, a folder or a hub id"
            )
        if self.workers_per_batch > 1 and (self.method == "lora" or self.objective == "dpo"):
            raise ValueError(
                f"method={self.method} with objective={self.objective} is computed by one worker a batch: set "
                "tensor_parallel_size=1 and sequence_parallel_size=1"
            )
        if self.method == "full":
            if self.lora.load_in_8bit:
                raise ValueError("lora.load_in_8bit=true needs method=lora: int8 weights cannot be trained themselves")
            return self
        if self.base_model.startswith("preset:"):
            raise ValueError(
                f"method=lora adapts a trained model, and base_model={self.base_model} is random: "
                "name a registered model, a folder or a hub id, or use method=full"
            )
        if self.optimizer == "muon":
            raise ValueError("optimizer=muon orthogonalises whole weight matrices, method=lora has none: use adamw")
        if self.lora.load_in_8bit and self.zero_stage == 3:
            raise ValueError(
                "lora.load_in_8bit=true with zero_stage=3: bitsandbytes keeps int8 weights where DeepSpeed cannot "
                "shard them; use zero_stage 0 to 2, or load_in_8bit=false"
            )
        return self

    @property
    def logits_tokens(self) -> int:
        """Tokens whose logits are in memory at a time."""
        return self.loss_chunk_tokens or (2_048 if self.use_gpu else 256)

    @property
    def workers_per_batch(self) -> int:
        """Workers that compute one batch together."""
        return self.tensor_parallel_size * self.sequence_parallel_size

    @model_validator(mode="after")
    def _go_together(self) -> "TrainingConfig":
        tensor, sequence = self.tensor_parallel_size, self.sequence_parallel_size
        if tensor > 1 and sequence > 1:
            raise ValueError(
                f"tensor_parallel_size={tensor} and sequence_parallel_size={sequence} exclude each other: DeepSpeed "
                "0.19's Ulysses takes all heads of a layer, of which tensor parallel leaves a worker some; set one to 1"
            )
        for name, size in (("tensor_parallel_size", tensor), ("sequence_parallel_size", sequence)):
            if size > 1 and self.min_workers != self.max_workers:
                raise ValueError(
                    f"{name}={size} needs a fixed num_workers, got {self.min_workers} to {self.max_workers}"
                )
            if self.max_workers % size:
                raise ValueError(f"num_workers={self.num_workers} cannot be shared out to groups of {name}={size}")
        if self.block_tokens % sequence:
            raise ValueError(
                f"block_tokens={self.block_tokens} cannot be cut into sequence_parallel_size={sequence} parts"
            )
        if tensor > 1 and self.optimizer == "muon":
            raise ValueError(
                f"optimizer=muon needs whole matrices, tensor_parallel_size={tensor} leaves a worker a part of each: "
                "set optimizer=adamw, or tensor_parallel_size=1"
            )
        if self.attention in ("flex", "flash") and not self.use_gpu:
            raise ValueError(
                f"attention={self.attention} has no backward pass on a CPU (torch 2.13): set auto, or use_gpu=true"
            )
        if self.attention not in ("auto", "sdpa") and sequence > 1:
            raise ValueError(
                f"attention={self.attention} and sequence_parallel_size={sequence} exclude each other: DeepSpeed 0.19 "
                "would make a mask that forgets where conversations end; set attention=auto"
            )
        if (self.adam_kernel, self.precision, self.zero_stage) == ("deepspeed", "bf16", 0):
            raise ValueError(
                "adam_kernel=deepspeed with precision=bf16 and zero_stage=0 has no checkpoints: DeepSpeed 0.19 keeps "
                "its weights flat there; use zero_stage 1 to 3, or adam_kernel=fused"
            )
        if self.attention == "flash" and self.micro_batch_size > 1:
            raise ValueError(
                f"attention=flash needs micro_batch_size=1, got {self.micro_batch_size}: transformers 5 tells packed "
                "conversations apart in a single block only; raise block_tokens instead"
            )
        if self.adam_kernel != "torch" and self.optimizer == "muon":
            raise ValueError(f"adam_kernel={self.adam_kernel} is for optimizer=adamw; DeepSpeed's Muon has its own")
        self._check_offload()
        return self

    def _check_offload(self) -> None:
        if self.offload_optimizer != "none" and self.zero_stage == 0:
            raise ValueError(f"offload_optimizer={self.offload_optimizer} needs zero_stage 1, 2 or 3, not 0")
        if self.offload_parameters != "none" and self.zero_stage != 3:
            raise ValueError(f"offload_parameters={self.offload_parameters} needs zero_stage=3, not {self.zero_stage}")
        if self.offload_optimizer == "nvme":
            raise ValueError(
                "offload_optimizer=nvme has no checkpoints: DeepSpeed 0.19 swaps the state out of reach; use cpu"
            )
        if self.offload_parameters == "nvme" and self.nvme_path is None:
            raise ValueError("offload_parameters=nvme needs nvme_path, a local folder on a fast disk")


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
