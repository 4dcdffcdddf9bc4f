"""`serving`: the served application."""

from typing import Annotated

from pydantic import Field

from app.settings.section import Count, Fraction, Positive, Section


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
    body_timeout_s: Positive = 30.0
    """How long a request body may take to arrive; a slower sender is told so and its connection closed."""
    max_messages: Count = 100
    """More messages in a request are refused."""
    requests_per_minute: Count | None = None
    """Requests that a key without a limit of its own may send in any minute; null: as many as it likes."""
    tokens_per_minute: Count | None = None
    """Tokens of prompts and replies that such a key may spend in any minute; null: as many as it likes."""
    handover: HandoverConfig = HandoverConfig()
    """When a person takes over."""
    deploy_timeout_s: Positive = 180.0
    """How long a deployment may take to become healthy."""
