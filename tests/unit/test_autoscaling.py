"""How many replicas: by ongoing requests, and by how long they wait."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve.config import AutoscalingContext

from app.serving.autoscaling import LATENCY, LoadAndLatency, autoscaling
from app.settings.serving import ReplicasConfig

HERE = DeploymentID("LanguageModel", "support")


def context(replicas: int, requests: float, waits_s: tuple[float, ...] = ()) -> AutoscalingContext:
    told = {LATENCY: {ReplicaID(str(place), HERE): wait_s for place, wait_s in enumerate(waits_s)}}
    return AutoscalingContext(
        deployment_id=HERE, deployment_name=HERE.name, app_name=HERE.app_name, current_num_replicas=replicas,
        target_num_replicas=replicas, running_replicas=[], total_num_requests=requests, total_queued_requests=0.0,
        aggregated_metrics=told, raw_metrics=None, capacity_adjusted_min_replicas=1, capacity_adjusted_max_replicas=8,
        policy_state={}, last_scale_up_time=None, last_scale_down_time=None, current_time=None, config=None,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("target_latency_s", "replicas", "requests", "waits_s", "wanted"),
    [
        (None, 1, 10, (9.0,), 1.0),  # latency is not looked at
        (None, 2, 60, (), 6.0),
        (1.0, 2, 10, (0.5, 0.9), 1.0),  # fast enough: requests alone count
        (1.0, 2, 10, (0.5, 1.5), 3.0),  # the slowest replica is 1.5 times too slow
        (1.0, 2, 10, (0.5, 30.0), 4.0),  # doubled at most
        (1.0, 2, 90, (0.5, 1.5), 9.0),  # requests need more still
        (1.0, 0, 0, (), 0.0),
    ],
)
def test_replicas_follow_requests_and_waits(
    target_latency_s: float | None, replicas: int, requests: float, waits_s: tuple[float, ...], wanted: float
) -> None:
    assert LoadAndLatency(10.0, target_latency_s)(context(replicas, requests, waits_s))[0] == wanted


def test_the_policy_runs_where_none_of_our_code_is(tmp_path: Path) -> None:
    settings = autoscaling(ReplicasConfig(replicas=(0, 3), target_latency_s=0.5, max_ongoing_requests=8))
    assert (settings.min_replicas, settings.max_replicas, settings.target_ongoing_requests) == (0, 3, 4.0)
    (tmp_path / "policy").write_bytes(settings.policy.get_serialized_policy_def())
    program = "import sys; from ray import cloudpickle; print(cloudpickle.load(open(sys.argv[1], 'rb')).__name__)"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", program, str(tmp_path / "policy")]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert run.stdout.strip() == "LoadAndLatency", run.stderr
