"""The parts of `benchmarks.serving` that need a Ray head of their own: the application, and Ray Serve itself."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import serving_servers as serving
from benchmarks.serving_servers import FOLDER, HOME, Figures, Server

MODEL = "bench"
"""What the served model is called."""
LOW_RATE = 2.0
"""Arrivals a second at which requests hardly meet."""
RAYS_DEFAULTS = {
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "0", "RAY_SERVE_ENABLE_HA_PROXY": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "1", "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "1",
}  # fmt: skip
OPTIMIZED = {
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1", "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0", "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
}  # fmt: skip
SETTINGS: dict[str, tuple[dict[str, str], dict[str, Any], str]] = {
    "defaults": ({}, {}, ""),
    "no access log": ({}, {"access_log": False}, "safe: what is lost is a line a request in Serve's own log"),
    "no copies of logs to stderr, log buffer of 1,000 lines": (
        {"RAY_SERVE_LOG_TO_STDERR": "0", "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1000"}, {},
        "safe: a crash loses the last lines",
    ),
    "router on the caller's loop": (
        {"RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0"}, {}, "safe where the caller never blocks its loop"
    ),
    "user code on the replica's loop": (
        {"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0"}, {},
        "a blocking call of the user's freezes health checks",
    ),
    "gRPC between proxy and replica": (
        {"RAY_SERVE_USE_GRPC_BY_DEFAULT": "1"}, {}, "safe: Ray's token is asked for, on ports that replicas open anyway"
    ),
    "gRPC and HAProxy": (
        {"RAY_SERVE_USE_GRPC_BY_DEFAULT": "1", "RAY_SERVE_ENABLE_HA_PROXY": "1"}, {},
        "cluster/haproxy.py keeps its metrics and statistics to the loopback address",
    ),
    "throughput optimised, through the proxy": (
        {**OPTIMIZED, "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0"}, {"access_log": False},
        "all of the above, and what their safety costs",
    ),
    "direct ingress": (
        {"RAY_SERVE_ENABLE_DIRECT_INGRESS": "1"}, {"access_log": False},
        "a port a replica: somebody must balance and follow them",
    ),
    "throughput optimised, direct ingress": (OPTIMIZED, {"access_log": False}, "as the two above"),
}  # fmt: skip
"""Environment of the head, options of the deployment, and how safe that is."""
CONCURRENT = 32


@contextmanager
def head(name: str, environment: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """A Ray head with a state folder of its own, with its environment."""
    state = FOLDER / f"state-{name}"
    given = {**os.environ, **environment, "RAYLOOP_STATE": str(state)}
    script = str(HOME / "cluster" / "local.sh")
    for attempt in range(4):  # a busy machine is too slow for Ray's time limits now and then
        done = subprocess.run([script, "start"], check=False, env=given, capture_output=True)
        if not done.returncode:
            break
        subprocess.run([script, "stop"], check=True, env=given, capture_output=True)
        print(f"the head did not start at attempt {attempt + 1}", flush=True)
    try:
        lines = (state / "cluster.env").read_text().splitlines()
        found = dict(line.removeprefix("export ").split("=", 1) for line in lines)
        yield {**given, **found}
    finally:
        subprocess.run([script, "stop"], check=True, env=given, capture_output=True)


def processes_of(environment: Mapping[str, str]) -> tuple[int, ...]:
    """Of a head: those whose command line names its folder, and Serve's, which do not but descend from them."""
    marked = []
    for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if environment["RAY_ADDRESS"].encode() in command:
            marked.append(pid)
    return tuple(marked)


def variant_of(folder: Path, name: str = MODEL, **settings: Any) -> dict[str, Any]:
    """A model folder as `serving.variants` names it."""
    return {"name": name, "model": MODEL, "version": "1", "uri": str(folder), **settings}


def deployed(environment: Mapping[str, str], settings: Mapping[str, Any], requests: Path) -> Server:
    """The application on a head as `jobs.serve` deploys it, with these settings of `serving`."""
    port = int(environment["RAYLOOP_HTTP_PORT"])
    common = {
        "port": port, "context_tokens": serving.CONTEXT_TOKENS, "max_batch_slots": serving.SLOTS,
        "handover": {"min_reply_confidence": 0.0},
    }  # fmt: skip
    config = FOLDER / "application.json"
    config.write_text(json.dumps({"storage": {"uri": str(FOLDER / "store")}, "serving": {**common, **settings}}))
    key = Path(environment["RAYLOOP_API_KEY_FILE"]).read_text().strip()
    command = [sys.executable, "-W", "ignore", "-m", "jobs.serve", "--config", str(config)]
    given_key = {**environment, "RAYLOOP_API_KEY": key}
    done = subprocess.run(command, env=given_key, cwd=HOME, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"jobs.serve ended with {done.returncode}: {(done.stdout + done.stderr)[-3_000:]}")
    url, others = f"http://127.0.0.1:{port}/v1/chat/completions", processes_of(environment)
    return Server("application", others[0], url, {"Authorization": f"Bearer {key}"}, requests, others)


def application_part(given: argparse.Namespace) -> Iterator[tuple[str, list[str]]]:
    """The application against the engine behind uvicorn, one thread each, on the same requests."""
    for size in given.model:
        folder, requests = serving.model_folder(size), serving.requests_files(size)["messages"]
        variables = dict(variable.split("=", 1) for variable in given.variable)
        bodies = json.loads(requests.read_text())
        for each in bodies:
            each["body"]["model"] = MODEL
        ours = FOLDER / f"{size}-application.json"
        ours.write_text(json.dumps(bodies))
        with head("application", variables) as environment, serving.server("ours_1", size) as bare:
            served = deployed(environment, {"variants": [variant_of(folder)]}, ours)
            bare = Server("ours_1", bare.pid, bare.url, {}, requests)
            loads: list[dict[str, Any]] = [{"users": users} for users in given.users] + [{"rate": LOW_RATE}]
            found = serving.compare([bare, served], loads, given.repetitions)
        yield ", ".join(["Application", size, *given.variable]), [*serving.table(found), "", *price(found)]


def price(found: list[tuple[Any, ...]]) -> list[str]:
    """What the application costs over the bare engine, a line a load."""
    lines = []
    for load, _, runs in found[::2]:
        (ours,) = [other for other_load, each, other in found if other_load == load and each.name == "application"]
        rate = median(run["tokens_per_s"] for run in ours) / median(run["tokens_per_s"] for run in runs)
        per_token = median(run["tpot_s_p50"] for run in ours) / median(run["tpot_s_p50"] for run in runs)
        added = median(run["ttft_s_p50"] for run in ours) - median(run["ttft_s_p50"] for run in runs)
        lines.append(
            f"- {load}: the application has {rate:.2f}x the bare engine's tokens/s (target 0.95), {per_token:.2f}x its "
            f"time a token (target 1.05), and {added * 1e3:+.1f} ms to the first token (target 5 at low load)."
        )
    return lines


def serve_part(given: argparse.Namespace) -> Iterator[tuple[str, list[str]]]:
    """Ray Serve around a constant with each setting, a head each."""
    found: dict[str, list[Figures]] = {}
    for _ in range(given.repetitions):
        for name, (variables, options, _safety) in SETTINGS.items():
            if name not in (given.setting or SETTINGS):
                continue
            direct = serving.free_port()
            # The local head's own defaults are not Ray's.
            variables = (
                RAYS_DEFAULTS
                | variables
                | {
                    "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(direct),
                    "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(direct + 50),
                }
            )
            with head("serve", variables) as environment:
                port = int(environment["RAYLOOP_HTTP_PORT"])
                command = [sys.executable, "-W", "ignore", "-m", "benchmarks.peers.constant", str(port)]
                options = {"max_ongoing_requests": 100, **options}
                done = subprocess.run(
                    [*command, json.dumps(options)],
                    env=environment,
                    cwd=HOME,
                    capture_output=True,
                    text=True,
                    check=False,
                )
                if done.returncode:
                    print(f"{name} is left out: {done.stderr[-1_500:]}", flush=True)
                    continue
                url = f"http://127.0.0.1:{direct if name.endswith('direct ingress') else port}/"
                requests = FOLDER / "constant.json"
                requests.write_text("[]")
                others = processes_of(environment)
                served = Server(name, others[0], url, {}, requests, others)
                for seconds in (serving.WARM_S, serving.ROUND_S):
                    figures = served.ask({"plain": CONCURRENT, "seconds": seconds})
                found.setdefault(name, []).append(figures)
                print(name, json.dumps(figures), flush=True)
    yield "Ray Serve, a constant", _settings_table(found)


def _settings_table(found: dict[str, list[Figures]]) -> list[str]:
    lines = [
        f"{CONCURRENT} connections, kept open; one replica; max_ongoing_requests 100.", "",
        "| setting | requests/s | of the defaults' | p50 ms | p99 ms | CPU ms a request | others' CPU | costs |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    base = median(run["requests_per_s"] for run in found["defaults"])
    for name, runs in found.items():
        ratio = median(run["requests_per_s"] for run in runs) / base
        cpu = median(run["cpu_s"] / run["requests"] for run in runs) * 1e3
        lines.append(
            f"| {name} | {serving.spread(runs, 'requests_per_s')} | {ratio:.2f}x | "
            f"{serving.spread(runs, 'latency_s_p50', 1e3, 1)} | {serving.spread(runs, 'latency_s_p99', 1e3, 1)} | "
            f"{cpu:.2f} | {serving.spread(runs, 'others', 100)} % | {SETTINGS[name][2]} |"
        )
    return lines
