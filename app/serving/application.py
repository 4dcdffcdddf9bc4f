"""The served application: who calls whom, and how many of each.

    client -> InputHandling -> LanguageModel (one deployment a variant, which serves the variants that are its adapters)
                            -> Intent, Sentiment (small functions, beside the reply)
                            -> ResponseManagement
                            -> RateLimits (one replica, asked for keys that have limits)

Deployed by jobs/serve.py from the configuration; `import_path: app.serving.application:build_app`.
"""

from typing import Any

from ray import serve
from ray.serve.config import RequestRouterConfig

from app.errors import ConfigError
from app.serving.autoscaling import autoscaling
from app.serving.functions import IntentFunction, SentimentFunction
from app.serving.input import InputHandling
from app.serving.language_model import LanguageModel
from app.serving.limits import RateLimits
from app.serving.response import ResponseManagement
from app.settings.serving import ReplicasConfig, ServingConfig, VariantConfig

HEALTH_CHECK_PERIOD_S = 3.0
PREFIX_ROUTER = "ray.serve.experimental.consistent_hash_router:ConsistentHashRouter"
"""By `Answer.session`; two others are tried where the first is full."""
LEDGER = ReplicasConfig(cpus=0.0, max_ongoing_requests=1_000)
"""The ledger of rate limits: two would each let the whole limit in."""


def build_app(args: ServingConfig) -> serve.Application:
    """The application with its deployments bound to each other.

    Raises:
        ConfigError: No variant is named, two have one name, or one has no folder.
    """
    names = [variant.name for variant in args.variants]
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"serving.variants names {names or 'nothing'}", "name each model version once")
    if nowhere := [variant.name for variant in args.variants if not variant.uri]:
        raise ConfigError(
            f"serving.variants {nowhere} have no uri", "name their model folders, or deploy with jobs.serve"
        )
    # By place, not by name: Serve takes a deployment that is not named any more away at once, while one that goes on
    # under its name gives way only once its successor is healthy.
    bases = [variant for variant in args.variants if variant.adapter_of is None]
    deployed = {
        variant.name: _language_model(args, variant, place).bind(args, variant)
        for place, variant in enumerate(bases, start=1)
    }
    models = {variant.name: deployed[variant.deployment] for variant in args.variants}
    functions = {
        "intent": _deployment(args, IntentFunction, "Intent", args.functions.intent).bind(args),
        "sentiment": _deployment(args, SentimentFunction, "Sentiment", args.functions.sentiment).bind(),
    }
    response = _deployment(args, ResponseManagement, "ResponseManagement", args.response).bind(args)
    ledger = _deployment(args, RateLimits, "RateLimits", LEDGER).bind()
    ingress = _deployment(args, InputHandling, "InputHandling", args.input)
    return ingress.bind(args, models, functions, response, ledger)


def _language_model(config: ServingConfig, variant: VariantConfig, place: int) -> serve.Deployment:
    size, shared = config.size(variant), config.vllm.tensor_parallel_size
    deployment = _deployment(config, LanguageModel, f"LanguageModel-{place}", size)
    if config.routing == "prefix":
        router: Any = PREFIX_ROUTER
        deployment = deployment.options(request_router_config=RequestRouterConfig(request_router_class=router))
    if variant.engine == "transformers" or shared == 1 or not size.gpus:
        return deployment
    # The replica itself needs no GPU; vLLM's workers each take that of a bundle. On one node: the folder is there.
    spread: serve.Deployment = deployment.options(
        ray_actor_options={"num_cpus": size.cpus},
        placement_group_bundles=[{"CPU": size.cpus, "GPU": 1.0}, *[{"GPU": 1.0}] * (shared - 1)],
        placement_group_strategy="STRICT_PACK",
    )
    return spread


def _deployment(config: ServingConfig, kind: type, name: str, size: ReplicasConfig) -> serve.Deployment:
    resources: dict[str, Any] = {"num_cpus": size.cpus, **({"num_gpus": size.gpus} if size.gpus else {})}
    number: dict[str, Any] = (
        {"num_replicas": size.most} if size.least == size.most else {"autoscaling_config": autoscaling(size)}
    )
    deployment: serve.Deployment = serve.deployment(
        name=name,
        max_ongoing_requests=size.max_ongoing_requests,
        max_queued_requests=size.max_queued_requests,
        backpressure_config={"status_code": 429, "retry_after_s": 1},
        ray_actor_options=resources,
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=config.drain_timeout_s,
        # New replicas take over once they are healthy: a version that does not start displaces nothing.
        max_surge_percent=100,
        **number,
    )(kind)
    return deployment
