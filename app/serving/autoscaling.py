"""How many replicas a deployment needs."""

from typing import Any

from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from app.settings.serving import ReplicasConfig

LATENCY = "latency_s"
"""Under this name replicas tell how long requests waited lately; see `record_autoscaling_stats` of the deployments."""
METRICS_INTERVAL_S = 1.0
LOOK_BACK_S = 5.0
MOST_GROWTH = 2.0
"""However late answers are, replicas are at most doubled at a time: those that start now will help as well."""


def autoscaling(size: ReplicasConfig) -> AutoscalingConfig:
    """Serve's settings for a deployment whose number of replicas follows its load."""
    target = size.target_ongoing_requests or max(1.0, size.max_ongoing_requests / 2)
    return AutoscalingConfig(
        min_replicas=size.least,
        max_replicas=size.most,
        initial_replicas=max(size.least, 1),
        target_ongoing_requests=target,
        metrics_interval_s=METRICS_INTERVAL_S,
        look_back_period_s=LOOK_BACK_S,
        upscale_delay_s=size.upscale_delay_s,
        downscale_delay_s=size.downscale_delay_s,
        policy=AutoscalingPolicy(
            policy_function=LoadAndLatency,
            policy_kwargs={"target_ongoing_requests": target, "target_latency_s": size.target_latency_s},
        ),
    )


class LoadAndLatency:
    """As many replicas as the ongoing requests need, and more while requests wait for longer than they should.

    Serve's controller calls it, which has none of our code: the class goes there by value and uses only this module.
    """

    def __init__(self, target_ongoing_requests: float, target_latency_s: float | None) -> None:
        self._target_ongoing_requests, self._target_latency_s = target_ongoing_requests, target_latency_s

    def __call__(self, context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        """The number of replicas wanted, before Serve's delays and bounds, and no state to be kept."""
        now = context.current_num_replicas
        if not now:
            return context.target_num_replicas, {}
        wanted = context.total_num_requests / self._target_ongoing_requests
        waits = (context.aggregated_metrics or {}).get(LATENCY, {}).values()
        if self._target_latency_s and waits and (slowness := max(waits) / self._target_latency_s) > 1:
            wanted = max(wanted, now * min(slowness, MOST_GROWTH))
        return wanted, {}
