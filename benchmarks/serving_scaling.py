"""The part `scaling` of `benchmarks.serving`: what several replicas are good for, and how soon they are there."""

import argparse
import asyncio
import json
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from unittest.mock import patch

import httpx

from app import deployment
from benchmarks import serving_client
from benchmarks import serving_servers as serving
from benchmarks.serving_application import MODEL, deployed, head, variant_of
from benchmarks.serving_client import Client, Sent, closed
from benchmarks.serving_servers import FOLDER, Figures, Server

PREFIX_USERS, PREFIX_S, MIN_TURNS = 8, 10.0, 3
CALM_USERS, BURST_USERS, CALM_S, BURST_S = 2, 16, 10.0, 40.0
CPUS = 0.4
"""Logical CPUs that a replica of the language model reserves, so that three of them fit."""
POLL_S, DEADLINE_S = 0.25, 120.0


def scaling_part(given: argparse.Namespace) -> Iterator[tuple[str, list[str]]]:
    """Routing, a burst and zero replicas, on one head."""
    variables = dict(variable.split("=", 1) for variable in given.variable)
    for size in given.model:
        with head("scaling", variables) as environment, patch.dict(os.environ, environment):
            yield f"Routing by prefix, {size}", _routing(environment, size, given.repetitions)
            yield f"A burst, {size}", _burst(environment, size, given.repetitions)
            yield f"From zero, {size}", _zero(environment, size, given.repetitions)


def _routing(environment: Mapping[str, str], size: str, repetitions: int) -> list[str]:
    """Conversations of several turns on two replicas, routed by load and by how they begin."""
    folder, talks = serving.model_folder(size), _talks(size)
    found: dict[str, list[Figures]] = {"load": [], "prefix": []}
    for _ in range(repetitions):
        for routing, runs in found.items():
            # Deployed anew each time: what the replicas have read is forgotten.
            two = {"replicas": 2, "cpus": CPUS}
            settings = {"variants": [variant_of(folder)], "routing": routing, "language_model": two}
            served = deployed(environment, settings, talks)
            served.ask({"users": PREFIX_USERS, "seconds": serving.WARM_S, "begin": 500})
            runs.append(served.ask({"users": PREFIX_USERS, "seconds": PREFIX_S}))
            print(routing, json.dumps(runs[-1]), flush=True)
            _remove()
    lines = [
        f"Two replicas, {PREFIX_USERS} users who send the turns of real conversations ({MIN_TURNS} answers or more), "
        f"each with all that was said before; runs of {PREFIX_S:.0f} s, replicas new at each.", "",
        "| routing | prompt tokens not read again | TTFT ms, p50 / p99 | output tokens/s | request/s | failures |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for routing, runs in found.items():
        lines.append(
            f"| {routing} | {serving.spread(runs, 'cached', 100)} % | {serving.pair(runs, 'ttft_s')} | "
            f"{serving.spread(runs, 'tokens_per_s')} | {serving.spread(runs, 'requests_per_s', digits=1)} | "
            f"{sum(run['failures'] for run in runs)} |"
        )
    return lines


def _talks(size: str) -> Path:
    """Conversations as the requests of their turns."""
    from app import model
    from app.conversation import prompt_ids

    tokenizer = model.load_tokenizer(serving.model_folder(size))
    talks = []
    for messages in serving.conversations(3_000):
        turns = []
        for place, message in enumerate(messages):
            if message["role"] != "assistant" or not place:
                continue
            tokens = len(tokenizer.encode(message["content"], add_special_tokens=False)) + 1
            prompt = prompt_ids(tokenizer, messages[:place])  # type: ignore[arg-type]
            if len(prompt) + tokens > serving.CONTEXT_TOKENS:
                break
            body = {
                "model": MODEL, "messages": messages[:place], "max_tokens": tokens, "temperature": 0.0, "stream": True,
                "stream_options": {"include_usage": True},
            }  # fmt: skip
            turns.append({"body": body, "tokens": tokens})
        if len(turns) >= MIN_TURNS:
            talks.append(turns)
    if len(talks) < 2 * PREFIX_USERS:
        raise RuntimeError(f"only {len(talks)} conversations have {MIN_TURNS} answers that fit")
    file = FOLDER / f"{size}-talks.json"
    file.write_text(json.dumps(talks))
    return file


class Crowd(threading.Thread):
    """Users of the application who ask until they are told to stop."""

    def __init__(self, served: Server, users: int) -> None:
        super().__init__(daemon=True)
        self._client = Client(served.url, dict(served.headers))
        self._requests = json.loads(served.requests.read_text())
        self._users, self._stopping = users, threading.Event()
        self.sent: list[Sent] = []
        self.failure: BaseException | None = None

    def __enter__(self) -> "Crowd":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self.join(DEADLINE_S)
        if self.is_alive() or self.failure:
            raise RuntimeError(f"the users did not come to an end: {self.failure}")

    def run(self) -> None:
        try:
            self.sent = asyncio.run(closed(self._client, self._requests, self._users, self._stopping.is_set))
        except BaseException as error:
            self.failure = error


def _running() -> int:
    """Replicas of the language model that answer."""
    return sum(
        replica["deployment"] == "LanguageModel-1" and replica["state"] == "RUNNING"
        for replica in deployment.replicas("support")
    )


def _remove() -> None:
    """Take the application away and wait until it is gone."""
    deployment.remove("support")
    while deployment.replicas("support"):
        time.sleep(POLL_S)


def _until(replicas: int, since_s: float) -> float:
    """Wait for so many replicas of the language model; returns the seconds since then.

    Raises:
        TimeoutError: They are not there.
    """
    while (count := _running()) != replicas:
        if time.monotonic() - since_s > DEADLINE_S:
            raise TimeoutError(f"{count} replicas instead of {replicas} after {DEADLINE_S:.0f} s")
        time.sleep(POLL_S)
    return time.monotonic() - since_s


def _burst(environment: Mapping[str, str], size: str, repetitions: int) -> list[str]:
    """Eight times the users at once: how soon replicas are there, what users notice, how soon they are gone."""
    delays = {"upscale_delay_s": 1.0, "downscale_delay_s": 5.0}
    scaled = {"replicas": (1, 3), "cpus": CPUS, "target_ongoing_requests": 4, **delays}
    requests = FOLDER / f"{size}-burst.json"
    bodies = json.loads(serving.requests_files(size)["messages"].read_text())
    for each in bodies:
        each["body"]["model"] = MODEL
    requests.write_text(json.dumps(bodies))
    variants = [variant_of(serving.model_folder(size))]
    served = deployed(environment, {"variants": variants, "language_model": scaled}, requests)
    reaction: dict[str, list[float]] = {"second": [], "third": [], "back": []}
    phases: dict[str, list[Sent]] = {
        f"{CALM_USERS} users": [], f"{BURST_USERS} users, until all replicas are there": [],
        f"{BURST_USERS} users, with all replicas": [], f"{CALM_USERS} users again": [],
    }  # fmt: skip
    for _ in range(repetitions):
        _until(1, time.monotonic())
        with Crowd(served, CALM_USERS) as before:
            time.sleep(CALM_S)
        begun_s = time.monotonic()
        with Crowd(served, BURST_USERS) as crowd:
            reaction["second"].append(_until(2, begun_s))
            reaction["third"].append(_until(3, begun_s))
            all_s = time.monotonic()
            time.sleep(max(CALM_S, BURST_S - (all_s - begun_s)))
        ended_s = time.monotonic()
        with Crowd(served, CALM_USERS) as after:
            reaction["back"].append(_until(1, ended_s))
            time.sleep(CALM_S)
        early = [sent for sent in crowd.sent if sent.begun_s < all_s]
        late = [sent for sent in crowd.sent if sent.begun_s >= all_s]
        for phase, sent in zip(phases.values(), (before.sent, early, late, after.sent), strict=True):
            phase += sent
    _remove()
    second, third, back = (_seconds(values) for values in reaction.values())
    lines = [
        f"One to three replicas of the language model, 4 requests each, on two cores; a need counts after "
        f"{delays['upscale_delay_s']:.0f} s, no need after {delays['downscale_delay_s']:.0f} s.", "",
        f"Second replica after {second} s, third after {third} s; one again {back} s after the burst.",
        "", "| load | requests | errors | TTFT ms, p50 / p99 |", "|---|---|---|---|",
    ]  # fmt: skip
    return [*lines, *(_phase(name, sent) for name, sent in phases.items())]


def _phase(name: str, sent: Sequence[Sent]) -> str:
    waits = serving_client.percentiles("ttft_s", [each.ttft_s for each in sent if not each.failure])
    failures = sum(bool(each.failure) for each in sent)
    times = f"{waits['ttft_s_p50'] * 1e3:,.0f} / {waits['ttft_s_p99'] * 1e3:,.0f}"
    return f"| {name} | {len(sent)} | {failures} | {times} |"


def _zero(environment: Mapping[str, str], size: str, repetitions: int) -> list[str]:
    """The first answer where no replica of the language model runs, alone and with a small model that steps in."""
    folder = serving.model_folder(size)
    asleep = {"replicas": (0, 1), "cpus": CPUS, "downscale_delay_s": 2.0}
    small = variant_of(serving.model_folder("7m"), "student", version="2", weight=0.0, size={"cpus": CPUS})
    ways = {
        "the question waits": [variant_of(folder)],
        "a 7m model answers meanwhile": [variant_of(folder, fallback="student"), small],
    }
    lines = [
        "Asked while there is no replica of the language model: one starts, and loads torch and the model.",
        "", "| | first answer, s | by | the language model's own, after s | warm, s | gone again after idle s |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for way, variants in ways.items():
        settings = {"variants": variants, "language_model": asleep, "fallback_after_s": 0.2}
        served = deployed(environment, settings, Path(os.devnull))
        with httpx.Client(headers=dict(served.headers), timeout=DEADLINE_S) as http:
            first, own, warm, gone, by = [], [], [], [], ""
            _until(0, time.monotonic())
            for _ in range(repetitions):
                begun_s = time.monotonic()
                by = _answered(http, served.url)
                first.append(time.monotonic() - begun_s)
                while _answered(http, served.url) != MODEL:
                    time.sleep(POLL_S)
                own.append(time.monotonic() - begun_s)
                asked_s = time.monotonic()
                _answered(http, served.url)
                warm.append(time.monotonic() - asked_s)
                gone.append(_until(0, time.monotonic()))
        _remove()
        cells = [_seconds(first), by, _seconds(own if by != MODEL else first), _seconds(warm, 3), _seconds(gone)]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return lines


def _answered(http: httpx.Client, url: str) -> str:
    """Ask for a short reply; the variant that gave it."""
    messages = [{"role": "user", "content": "Where is my order?"}]
    response = http.post(url, json={"model": MODEL, "messages": messages, "max_tokens": 8})
    response.raise_for_status()
    return response.headers["x-rayloop-variant"]


def _seconds(values: Sequence[float], digits: int = 1) -> str:
    return f"{median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"
