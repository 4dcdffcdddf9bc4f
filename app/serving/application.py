"""The served application: who calls whom, and how many of each.

    client -> InputHandling -> LanguageModel (one deployment a variant)
                            -> ResponseManagement
                            -> RateLimits (one replica, asked for keys that have limits)

Deployed by jobs/serve.py from the configuration; `import_path: app.serving.application:build_app`.
"""

from ray import serve

from app.errors import ConfigError
from app.serving.input import InputHandling
from app.serving.language_model import LanguageModel
from app.serving.limits import RateLimits
from app.serving.response import ResponseManagement
from app.settings.serving import ReplicasConfig, ServingConfig

HEALTH_CHECK_PERIOD_S = 3.0
LEDGER = ReplicasConfig(cpus=0.0, max_ongoing_requests=1_000)
"""The ledger of rate limits: two would each let the whole limit in."""


def build_app(args: ServingConfig) -> serve.Application:
    """The application with its deployments bound to each other.

    Raises:
        ConfigError: No variant is named, or two have one name.
    """
    names = [variant.name for variant in args.variants]
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"serving.variants names {names or 'nothing'}", "name each model version once")
    models = {
        variant.name: _deployment(LanguageModel, f"LanguageModel-{variant.name}", args.language_model).bind(
            args, variant
        )
        for variant in args.variants
    }
    response = _deployment(ResponseManagement, "ResponseManagement", args.response).bind(args)
    limits = _deployment(RateLimits, "RateLimits", LEDGER).bind()
    return _deployment(InputHandling, "InputHandling", args.input).bind(args, models, response, limits)


def _deployment(kind: type, name: str, size: ReplicasConfig) -> serve.Deployment:
    deployment: serve.Deployment = serve.deployment(
        name=name,
        num_replicas=size.replicas,
        max_ongoing_requests=size.max_ongoing_requests,
        ray_actor_options={"num_cpus": size.cpus},
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=10,
    )(kind)
    return deployment
