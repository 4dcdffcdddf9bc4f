"""Work on the Ray cluster whose errors reach the caller as they were raised."""

import itertools
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from app.errors import ClusterError, RayloopError, StageFailed

logger = logging.getLogger(__name__)

T = TypeVar("T")

NAMESPACE = "rayloop"
"""Of actors that another job is to find."""
CLAIM_S = 30.0
"""For so long Ray may take a process, or its node, for alive that is not."""
FEW = 4
"""Refusals that mean nothing yet."""


def submit(work: Callable[..., Any], *arguments: Any, cpus: float = 1, gpus: float = 0, memory_bytes: int = 0) -> Any:
    """Start a function as a Ray task with the resources it needs; `collect` waits for it.

    Raises:
        ClusterError: No node of the cluster can ever hold it, so it would wait for ever.
    """
    import ray

    needed = {"CPU": cpus, "GPU": gpus, "memory": float(memory_bytes)}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(all(node.get(name, 0) >= amount for name, amount in needed.items()) for node in nodes):
        wanted = ", ".join(f"{amount:,.0f} {name}" for name, amount in needed.items() if amount)
        raise ClusterError(f"no node of the cluster has {wanted}", "add a larger node, or use a smaller model")
    # A task that fails by itself would fail again; one whose node is lost is tried elsewhere.
    task: Any = ray.remote(num_cpus=cpus, num_gpus=gpus, memory=memory_bytes, max_retries=2)(work)
    return task.remote(*arguments)


def collect(tasks: Sequence[Any]) -> list[Any]:
    """The results of tasks, in order.

    After an error the others are left to end with this process: in Ray 2.60 `ray.cancel` of a task that is ending
    at that moment ends the caller ("Tried to complete task that was not pending").

    Raises:
        RayloopError: As the task raised it.
        StageFailed: A task ended in another way, for example killed for its memory.
    """
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        results: list[Any] = ray.get(list(tasks))
    except RayTaskError as error:
        cause = error.cause
        while isinstance(cause, RayTaskError):  # of a task that waited for another's result
            cause = cause.cause
        if isinstance(cause, RayloopError):
            raise cause from error
        raise StageFailed(f"a task failed ({type(cause).__name__}: {cause})", "see the job's log") from error
    except RayError as error:
        raise StageFailed(f"a task was lost ({type(error).__name__}: {error})", "submit the job again") from error
    return results


class Holder:
    """An actor whose name is what a job works on; it ends with the job's driver."""

    def __init__(self, job: str) -> None:
        self._job = job

    def job(self) -> str:
        """Who holds it."""
        return self._job


@contextmanager
def claimed(what: str, job: str, kind: type[Holder] = Holder) -> Iterator[Any]:
    """Hold something that one job works on at a time, until the way out or the end of this process; gives the actor,
    of the `kind`, that holds it beside this process.

    Raises:
        ClusterError: Another job of this cluster holds it, and still does after CLAIM_S.
    """
    import ray
    from ray.exceptions import ActorAlreadyExistsError, RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    until_s = time.monotonic() + CLAIM_S
    actor: Any = ray.remote(kind).options(name=what, namespace=NAMESPACE, num_cpus=0, scheduling_strategy=here)
    for refusals in itertools.count(1):
        try:
            holder = actor.remote(job)
            break
        except ActorAlreadyExistsError as error:
            if refusals == FEW:  # Ray lets go of a name only some time after its actor's end
                logger.warning("%s: job %s works on it; waiting for its end", what, _holder_of(what))
            if time.monotonic() > until_s:
                raise ClusterError(
                    f"job {_holder_of(what)} works on {what}", "wait for its end or stop it, then submit this one again"
                ) from error
            time.sleep(0.5)
    try:
        yield holder
    finally:
        with suppress(RayError):  # the cluster may be gone
            ray.kill(holder)


def _holder_of(what: str) -> str:
    import ray
    from ray.exceptions import RayError

    try:
        holder: Any = ray.get_actor(what, namespace=NAMESPACE)
        return str(ray.get(holder.job.remote(), timeout=5))
    except (ValueError, RayError):
        return "(another)"


def cpus() -> float:
    """CPUs to work on: no more than there are.

    A local head advertises more than it has, so that Serve's replicas fit; each one used starts a process of
    2 s. Staging 20,000 records on a machine of two CPUs took 22 s with six, 15 s with two.
    """
    import ray

    advertised = float(ray.cluster_resources().get("CPU", 1))
    alone = sum(node["Alive"] for node in ray.nodes()) == 1
    return min(advertised, os.cpu_count() or 1) if alone else advertised
