"""An application on Ray Serve that answers with a constant; deployed on the cluster of the environment.

python -m benchmarks.peers.constant PORT '{"access_log": true, "max_ongoing_requests": 5}'
"""

import json
import sys
from typing import Any

import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import Response

ANSWER = b'{"answer":"ok"}'


class Constant:
    """The ingress."""

    async def __call__(self, _: Request) -> Response:
        return Response(ANSWER, media_type="application/json")


def deploy(port: int, settings: dict[str, Any]) -> None:
    """Deploy it on 127.0.0.1."""
    ray.init(address="auto", log_to_driver=False, logging_level="ERROR", namespace="serve")
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    access_log = settings.pop("access_log", True)
    made = serve.deployment(ray_actor_options={"num_cpus": 0.2}, **settings)(Constant)
    serve.run(
        made.options(logging_config={"enable_access_log": access_log}).bind(),
        logging_config={"enable_access_log": access_log},
    )


if __name__ == "__main__":
    deploy(int(sys.argv[1]), json.loads(sys.argv[2]))
