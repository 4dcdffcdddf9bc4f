"""`serving`: the served application."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from app.settings.ingestion import PrivacyConfig
from app.settings.section import Count, Fraction, Natural, NotNegative, Positive, Section


class ReplicasConfig(Section):
    """Size of one deployment."""

    replicas: Count | tuple[Natural, Count] = 1
    """Copies. Two numbers, the fewest and the most: as many as the load needs; from 0, the first request starts one."""
    cpus: NotNegative = 0.2
    """Logical CPUs each reserves."""
    gpus: NotNegative = 0.0
    """GPUs each reserves."""
    max_ongoing_requests: Count = 64
    """Requests a replica works on at once."""
    max_queued_requests: Count = 256
    """Requests that wait for a replica, counted by each caller; what comes beyond is refused with 429."""
    target_ongoing_requests: Positive | None = None
    """Requests a replica should work on: more on average, and replicas are added. None: half of the most."""
    target_latency_s: Positive | None = None
    """Of language models: longest mean time to first token; above, replicas are added. None: not looked at."""
    upscale_delay_s: NotNegative = 2.0
    """Replicas are added after so long a need for them."""
    downscale_delay_s: NotNegative = 120.0
    """Replicas are taken away after so long without need for them."""

    @property
    def least(self) -> int:
        """Fewest copies."""
        return self.replicas if isinstance(self.replicas, int) else self.replicas[0]

    @property
    def most(self) -> int:
        """Most copies."""
        return self.replicas if isinstance(self.replicas, int) else self.replicas[1]

    @model_validator(mode="after")
    def _consistent(self) -> "ReplicasConfig":
        if self.least > self.most:
            raise ValueError(f"replicas is [fewest, most], got {[self.least, self.most]}")
        return self


class VariantConfig(Section):
    """One model version that is served; where none is named, `jobs.serve` serves the champion."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,63}$")]
    """What `x-rayloop-variant`, the traffic log and the metrics call it."""
    model: str = "support"
    """Its name in the registry."""
    version: str
    """Version in the registry."""
    uri: str = ""
    """Its model folder. Empty: `jobs.serve` looks it up in the registry; where Serve is given its own configuration,
    see cluster/serve.yaml, nobody does."""
    weight: NotNegative = 1.0
    """Share of conversations, relative to the other variants; 0: only those that ask for it by its own name."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """What runs the model: transformers, on CPUs or one GPU, also int8; or vLLM (extra `vllm`), for GPUs, see
    `serving.vllm`."""
    fallback: str | None = None
    """Variant that answers while this one has no replica that accepts a question within `fallback_after_s`: a small
    one while a large one starts. None: questions wait."""
    adapter_of: str | None = None
    """Variant beside whose weights this one's low-rank adapters are served: of `uri`, a version trained with
    `training.method=lora` or what `jobs.export` made of its adapters, only these are loaded, by that variant's
    replicas. None: it is a model of its own."""
    size: ReplicasConfig | None = None
    """Size of its deployment; none: `language_model`."""

    @property
    def deployment(self) -> str:
        """The variant whose replicas write: itself, or the one that it is an adapter of."""
        return self.adapter_of or self.name

    @property
    def adapter(self) -> str:
        """What its model is asked for beside the question: its name where it is an adapter, else nothing."""
        return self.name if self.adapter_of else ""


class VllmConfig(Section):
    """The engine of variants with `engine: vllm`."""

    tensor_parallel_size: Count = 1
    """GPUs that share one copy of the model; `language_model.gpus` reserves as many. Without GPUs, processes."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of each GPU's memory for weights, activations and cached keys and values; on CPUs, of the machine's."""
    kv_cache_bytes: Count | None = None
    """Memory for cached keys and values on each GPU. None: what `gpu_memory_utilization` leaves. On CPUs, set it."""
    enforce_eager: bool = False
    """Start sooner and write more slowly: nothing is compiled, no CUDA graphs are captured."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Number format of weights and activations; auto: the model's own, float32 as bfloat16."""
    quantization: (
        Literal["fp8_per_tensor", "fp8_per_block", "fp8_per_channel", "int8_per_channel_weight_only", "mxfp8"] | None
    ) = None
    """What weights are turned into while they are loaded. None: as they are stored, also where that is quantised."""


class FunctionsConfig(Section):
    """Small functions beside the language model. An answer never waits long for them."""

    intent: ReplicasConfig = ReplicasConfig(cpus=0.1)
    """What a question is about; hand-over by intent needs it."""
    sentiment: ReplicasConfig = ReplicasConfig(replicas=(0, 1), cpus=0.1)
    """How a customer feels; English only."""
    deadline_s: Positive = 1.0
    """So long after the question came in, a complete reply is given without what a function has not said yet."""


class HandoverConfig(Section):
    """When a person takes over."""

    intents: tuple[str, ...] = ("human_handover",)
    """Intents that always go to a person."""
    min_intent_confidence: Fraction = 0.0
    """Below this confidence of the intent model the customer is handed over; 0: never."""
    min_reply_confidence: Fraction = 0.3
    """Below this mean token probability of the reply the customer is handed over; 0: never."""
    min_sentiment: Annotated[float, Field(ge=-1, le=1)] = -1.0
    """Below this, from -1 (furious) to 1 (delighted), the customer is handed over; -1: never."""
    message: str = "I am not sure about this one, so I am handing you over to a colleague who can help."
    """What the customer then reads."""


class RuleConfig(Section):
    """Questions that the model is not asked, and what the customer reads instead. One hit is enough."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")]
    """What the log and the answer's `rayloop.rule` call it."""
    message: Annotated[str, Field(min_length=1)]
    """The polite refusal."""
    patterns: tuple[str, ...] = ()
    """Regular expressions, whatever the case, that the question has in it."""
    intents: tuple[str, ...] = ()
    """Intents that are off topic; the question waits for the intent function, and where that is late, see
    `functions.deadline_s`, the model answers."""

    @model_validator(mode="after")
    def _consistent(self) -> "RuleConfig":
        if not self.patterns and not self.intents:
            raise ValueError(f"rule {self.name} has neither patterns nor intents, so it refuses nothing")
        for pattern in self.patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"rule {self.name}: {pattern!r} is no regular expression ({error})") from None
        return self


class ServingPrivacyConfig(Section):
    """What happens to personal data in what customers write."""

    mask_log: bool = True
    """Mask it in the traffic log and in the hand-over queue."""
    mask_model: bool = False
    """Mask it before the model reads it. Replies then have placeholders such as [EMAIL_1] in them."""
    detector: PrivacyConfig = PrivacyConfig()
    """What is looked for, as in `ingestion.privacy`."""


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
    input: ReplicasConfig = ReplicasConfig(max_ongoing_requests=1_000)
    """Input handling: access, validation. It takes more than its models do, so that it refuses what is too much
    itself, and `/health` and `/ready` do not wait behind questions."""
    language_model: ReplicasConfig = ReplicasConfig(cpus=0.5)
    """The model."""
    vllm: VllmConfig = VllmConfig()
    """vLLM, where a variant's engine is that."""
    response: ReplicasConfig = ReplicasConfig()
    """Response management: post-processing, hand-over, logging."""
    functions: FunctionsConfig = FunctionsConfig()
    """What else is found out about a question."""
    fallback_after_s: Positive = 2.0
    """How long a question waits for a variant that has a fallback."""
    drain_timeout_s: Positive = 60.0
    """A replica that is taken away gets so long to complete its answers."""
    max_batch_slots: Count = 16
    """Sequences that one language model replica generates at once."""
    routing: Literal["load", "prefix"] = "load"
    """load: a question goes to the less busy of two replicas of its model. prefix: a conversation stays with the
    replica that has read its beginning, unless that is full."""
    prefix_cache_bytes: Natural = 128_000_000
    """Of a replica's memory, or its GPU's, for what it has read of prompts' beginnings; the same beginning is not read
    again."""
    context_tokens: Annotated[int, Field(ge=32)] = 512
    """Prompt and reply together; a longer prompt is refused."""
    default_max_tokens: Count = 96
    """Reply length when the request names none."""
    default_temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    """Temperature when the request names none. 0 gives the most probable reply; OpenAI's own default is 1."""
    max_body_bytes: Count = 1_000_000
    """A larger request body is refused."""
    body_timeout_s: Positive = 30.0
    """How long a request body may take to arrive; a slower sender is told so and its connection closed."""
    max_messages: Count = 100
    """More messages in a request are refused."""
    max_tools: Count = 128
    """More tools in a request are refused."""
    max_choices: Annotated[int, Field(ge=1, le=128)] = 8
    """Replies to one prompt at most: `n`."""
    max_prompts: Annotated[int, Field(ge=1, le=2_048)] = 64
    """Prompts of one completion request, and texts of one embedding request, at most."""
    requests_per_minute: Count | None = None
    """Requests that a key without a limit of its own may send in any minute; null: as many as it likes."""
    tokens_per_minute: Count | None = None
    """Tokens of prompts and replies that such a key may spend in any minute; null: as many as it likes."""
    handover: HandoverConfig = HandoverConfig()
    """When a person takes over."""
    system_prompt: str = ""
    """The system text of every conversation; a request that brings one of its own is refused. Empty: requests may."""
    rules: tuple[RuleConfig, ...] = ()
    """Off-topic and unsafe questions."""
    privacy: ServingPrivacyConfig = ServingPrivacyConfig()
    """Personal data."""
    conversation_ttl_s: Positive = 86_400.0
    """A conversation with a `conversation_id` is forgotten when nothing was said for so long."""
    deploy_timeout_s: Positive = 180.0
    """How long a deployment may take to become healthy."""

    @model_validator(mode="after")
    def _consistent(self) -> "ServingConfig":
        names = [variant.name for variant in self.variants]
        for variant in self.variants:
            if variant.fallback is not None and (variant.fallback not in names or variant.fallback == variant.name):
                raise ValueError(f"variant {variant.name} falls back on {variant.fallback}; the others are {names}")
        deployments = {variant.name: variant.deployment for variant in self.variants}
        for variant in self.variants:
            if variant.fallback is not None and deployments[variant.fallback] == variant.deployment:
                raise ValueError(
                    f"variant {variant.name} falls back on {variant.fallback}, which the same replicas write: name a "
                    "variant of another model"
                )
        for name, size in (
            ("input", self.input), ("response", self.response), ("functions.intent", self.functions.intent),
            ("functions.sentiment", self.functions.sentiment),
        ):  # fmt: skip
            if size.target_latency_s is not None:
                raise ValueError(f"{name}.target_latency_s has no effect: only language models tell how long they wait")
        models = {variant.name: variant for variant in self.variants if variant.adapter_of is None}
        for variant in self.variants:
            if variant.adapter_of is None:
                continue
            if variant.adapter_of not in models:
                raise ValueError(
                    f"variant {variant.name} is an adapter of {variant.adapter_of}; the models are {list(models)}"
                )
            if variant.size is not None or variant.engine != models[variant.adapter_of].engine:
                raise ValueError(
                    f"variant {variant.name} is served by the replicas of {variant.adapter_of}: leave out size, and "
                    f"set engine: {models[variant.adapter_of].engine}"
                )
        for variant in self.variants:
            if variant.engine == "transformers" and self.size(variant).gpus > 1:
                raise ValueError(
                    f"variant {variant.name} reserves {self.size(variant).gpus:g} GPUs, and engine transformers runs "
                    "on one: set gpus: 1, or engine: vllm"
                )
        shared = self.vllm.tensor_parallel_size
        for variant in self.variants:
            gpus = self.size(variant).gpus
            if variant.engine == "vllm" and shared > 1 and gpus not in (0, shared):
                raise ValueError(
                    f"vllm.tensor_parallel_size={shared} GPUs share variant {variant.name}, for which {gpus:g} are "
                    f"reserved: reserve {shared}, or 0 where there are none"
                )
        return self

    def size(self, variant: VariantConfig) -> ReplicasConfig:
        """Of the deployment that serves a variant."""
        base = next((each for each in self.variants if each.name == variant.adapter_of), variant)
        return base.size or self.language_model

    def adapters(self, base: VariantConfig) -> tuple[VariantConfig, ...]:
        """The variants that are served beside another's weights."""
        return tuple(variant for variant in self.variants if variant.adapter_of == base.name)

    def at_start(self) -> "ServingConfig":
        """Without what may change while replicas run: two of these that are equal need no new replicas."""
        plain = type(self)()
        variants = tuple(variant.model_copy(update={"weight": 1.0}) for variant in self.variants)
        return self.model_copy(update={**{name: getattr(plain, name) for name in LIVE}, "variants": variants})

    def live(self) -> dict[str, Any]:
        """What may change while replicas run, as JSON has it."""
        weights = {variant.name: variant.weight for variant in self.variants}
        return {**self.model_dump(mode="json", include=set(LIVE)), "weights": weights}

    def with_live(self, live: Mapping[str, Any]) -> "ServingConfig":
        """With settings that may change while replicas run, as `live` gives them; those that are missing stay.

        Raises:
            ValueError: A setting may not change so, or has a value that it cannot have.
        """
        if unknown := sorted(live.keys() - {*LIVE, "weights"}):
            raise ValueError(f"{', '.join(unknown)} cannot change without new replicas; {', '.join(LIVE)} can")
        weights = live.get("weights", {})
        if unknown := sorted(weights.keys() - {variant.name for variant in self.variants}):
            raise ValueError(f"weights names {', '.join(unknown)}, which is no variant")
        fields = self.model_dump()
        fields |= {name: live[name] for name in LIVE if name in live}
        fields["variants"] = [
            {**variant, "weight": weights.get(variant["name"], variant["weight"])} for variant in fields["variants"]
        ]
        return type(self).model_validate(fields)


LIVE = (
    "default_temperature",
    "max_messages",
    "max_tools",
    "max_choices",
    "max_prompts",
    "requests_per_minute",
    "tokens_per_minute",
    "handover",
    "system_prompt",
    "rules",
    "privacy",
)
"""Settings that take effect without new replicas, beside the variants' weights."""
LIVE_DEPLOYMENTS = ("InputHandling", "ResponseManagement")
"""Those that take `ServingConfig.live()` as their user_config."""
