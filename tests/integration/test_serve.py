"""The application as users meet it: over HTTP, through the official client, with replicas being killed."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from ray import serve

from app import deployment, traffic
from app.errors import StageFailed
from app.storage import Storage
from tests.answering_model import ADAPTED_ANSWERS, ANSWERS, CONTEXT_TOKENS, ENDLESS, SNAPSHOT_ID, UNSURE
from tests.conftest import ROOT, RunningCluster, Service

CANARY = "my card is 4111-canary-0001"
V1 = [
    ("POST", "/v1/chat/completions"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/support"),
    ("POST", "/v1/feedback"),
    ("GET", "/v1/why/chatcmpl-1"),
    ("GET", "/v1/unknown"),
    ("GET", "/docs"),
    ("GET", "/openapi.json"),
]


def asked(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def eventually(holds: Callable[[], Any], within_s: float = 120) -> Any:
    deadline_s = time.monotonic() + within_s
    while not (value := holds()):
        assert time.monotonic() < deadline_s, "it never came true"
        time.sleep(0.1)
    return value


def streamed(client: openai.OpenAI, question: str, **options: Any) -> tuple[str, list[Any]]:
    chunks = list(client.chat.completions.create(model="support", messages=asked(question), stream=True, **options))
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices), chunks


def rayloop(answer: Any) -> dict[str, Any]:
    """What we tell beyond OpenAI's fields."""
    return dict(answer.model_extra["rayloop"])


def test_the_job_says_where_it_answers(service: Service) -> None:
    line = service.last_line
    assert (line["stage"], line["status"], line["outputs"]["url"]) == ("serve", "done", service.url)
    assert [variant["name"] for variant in line["outputs"]["variants"]] == ["champion", "polite"]
    assert line["figures"]["replicas"] == 6


def test_the_official_client_gets_whole_answers(client: openai.OpenAI) -> None:
    for question, answer in ANSWERS.items():
        completion = client.chat.completions.create(model="support", messages=asked(question))
        assert completion.choices[0].message.content == answer
        assert completion.choices[0].finish_reason == "stop"
        assert completion.model == "support/3"
        assert completion.usage
        assert completion.usage.total_tokens == completion.usage.prompt_tokens + completion.usage.completion_tokens


def test_a_streamed_answer_has_the_same_text_and_ends_with_its_reason_and_usage(client: openai.OpenAI) -> None:
    question = "how do i reset my password?"
    text, chunks = streamed(client, question, stream_options={"include_usage": True})
    assert text == ANSWERS[question]
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-2].rayloop == {
        "handover": False, "reason": None, "intent": "password_reset", "sentiment": 0.0, "variant": "champion",
    }  # fmt: skip
    assert chunks[-1].choices == []
    whole = client.chat.completions.create(model="support", messages=asked(question))
    assert chunks[-1].usage == whole.usage


def test_a_stream_is_server_sent_events_that_end_with_done(http: httpx.Client) -> None:
    body = {"model": "support", "messages": asked("thank you"), "stream": True}
    response = http.post("/v1/chat/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-rayloop-variant"] == "champion"
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(json.loads(event.removeprefix("data: ")) for event in events[:-2])


def test_many_users_at_once_each_get_their_own_answer(service: Service) -> None:
    async def ask_all() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key=service.api_key, timeout=60) as client:
            completions = await asyncio.gather(
                *(
                    client.chat.completions.create(model="support", messages=asked(question))
                    for _ in range(3)
                    for question in ANSWERS
                )
            )
        return [completion.choices[0].message.content for completion in completions]

    assert asyncio.run(ask_all()) == [answer for _ in range(3) for answer in ANSWERS.values()]


def test_the_async_client_streams(service: Service) -> None:
    async def ask() -> str:
        async with openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key=service.api_key, timeout=60) as client:
            stream = await client.chat.completions.create(model="support", messages=asked("thank you"), stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert asyncio.run(ask()) == ANSWERS["thank you"]


def test_sampling_fields_have_their_effect(client: openai.OpenAI) -> None:
    def answer(**options: Any) -> Any:
        return client.chat.completions.create(model="support", messages=asked(UNSURE), **options).choices[0]

    def sampled(seed: int) -> str:
        return answer(temperature=1.5, top_p=0.9, seed=seed, max_tokens=20).message.content

    assert sampled(1) == sampled(1)
    assert len({sampled(seed) for seed in range(6)}) > 1
    assert answer(temperature=1.9, top_p=1e-6, max_tokens=8).message.content == answer(max_tokens=8).message.content
    song = client.chat.completions.create(model="support", messages=asked(ENDLESS), max_completion_tokens=7)
    assert (song.choices[0].finish_reason, song.usage and song.usage.completion_tokens) == ("length", 7)


def test_log_probabilities_are_told_streamed_or_not(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"temperature": 0, "logprobs": True, "top_logprobs": 2}
    question: list[Any] = [{"role": "user", "content": "how do i reset my password?"}]
    whole = client.chat.completions.create(model="support", messages=question, **asked).choices[0]
    assert whole.logprobs is not None
    content = whole.logprobs.content
    assert content
    assert b"".join(bytes(one.bytes or []) for one in content).decode() == whole.message.content
    for one in content:
        assert one.logprob <= 0.0
        assert [other.logprob for other in one.top_logprobs] == sorted(
            (other.logprob for other in one.top_logprobs), reverse=True
        )
        assert (one.top_logprobs[0].token, one.top_logprobs[0].logprob) == (one.token, one.logprob), "it is greedy"
    streamed = []
    for chunk in client.chat.completions.create(model="support", messages=question, stream=True, **asked):
        if chunk.choices and chunk.choices[0].logprobs:
            streamed += chunk.choices[0].logprobs.content or []
    assert streamed == content
    plain = client.chat.completions.create(model="support", messages=question).choices[0]
    assert plain.logprobs is None


def test_penalties_and_biases_have_their_effect(client: openai.OpenAI) -> None:
    question: list[Any] = [{"role": "user", "content": ENDLESS}]
    asked: dict[str, Any] = {"model": "support", "messages": question, "temperature": 0, "max_tokens": 30}
    plain = client.chat.completions.create(**asked).choices[0].message.content
    for changed in (
        {"frequency_penalty": 2, "presence_penalty": 2},
        {"logit_bias": {str(token): -100 for token in range(300)}},
    ):
        assert client.chat.completions.create(**asked, **changed).choices[0].message.content != plain
    with pytest.raises(openai.BadRequestError, match="logit_bias names token 99999999, the model has") as caught:
        client.chat.completions.create(**asked, logit_bias={"99999999": 1})
    assert caught.value.param == "logit_bias"


def test_a_stop_string_is_not_part_of_the_answer_streamed_or_not(client: openai.OpenAI) -> None:
    question, options = "where is my order 4512?", {"stop": ["will arrive", "never"]}
    whole = client.chat.completions.create(model="support", messages=asked(question), **options)
    assert whole.choices[0].message.content == "Order 4512 is on its way and "
    assert streamed(client, question, **options)[0] == "Order 4512 is on its way and "


def test_models_are_listed_by_every_name_they_answer_to(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["support", "support/3", "champion", "support/4", "polite"]
    for name in ("support", "support/3", "champion"):
        assert client.models.retrieve(name).id == name
        completion = client.chat.completions.create(model=name, messages=asked("thank you"))
        assert completion.choices[0].message.content == ANSWERS["thank you"]
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-5", messages=asked("hi"))
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


@pytest.mark.parametrize("key", [None, "Bearer sk-wrong", "Basic {key}", "Bearer {key}x", "{key}"])
def test_every_route_but_the_page_and_health_wants_a_known_key(service: Service, key: str | None) -> None:
    headers = {"Authorization": key.format(key=service.api_key)} if key else {}
    for method, path in V1:
        body = {} if method == "POST" else None
        response = httpx.request(method, service.url + path, headers=headers, json=body, timeout=60)
        assert response.status_code == 401, path
        assert response.json()["error"]["type"] == "authentication_error"
        assert response.headers["x-request-id"]


@pytest.mark.parametrize(
    ("method", "path", "options", "status", "code", "param"),
    [
        ("GET", "/v1/unknown", {}, 404, "not_found", None),
        ("GET", "/v1/models/", {}, 404, "model_not_found", "model"),
        ("GET", "/v1/chat/completions", {}, 405, "method_not_allowed", None),
        ("DELETE", "/v1/models", {}, 405, "method_not_allowed", None),
        ("GET", "/v1/why/chatcmpl-none", {}, 404, "response_not_found", None),
        ("POST", "/v1/chat/completions", {"content": b"{"}, 400, "invalid_json", None),
        ("POST", "/v1/chat/completions", {"content": b'{"temperature": NaN}'}, 400, "invalid_json", None),
        ("POST", "/v1/chat/completions", {"content": b"[" * 90_000}, 400, "invalid_json", None),
        ("POST", "/v1/chat/completions", {"content": b" " * 1_000_001}, 413, "body_too_large", None),
        ("POST", "/v1/chat/completions", {"content": (b" " * 90_000 for _ in range(20))}, 413, "body_too_large", None),
        ("POST", "/v1/chat/completions", {"json": {}}, 400, "missing_required_parameter", "model"),
        ("POST", "/v1/feedback", {"json": {"response_id": "no"}}, 404, "response_not_found", "response_id"),
        ("POST", "/v1/feedback", {"json": {"response_id": "no", "rating": 3}}, 400, "invalid_value", "rating"),
    ],
)  # fmt: skip
def test_every_refusal_has_openais_shape(
    http: httpx.Client, method: str, path: str, options: dict[str, Any], status: int, code: str, param: str | None
) -> None:
    response = http.request(method, path, **options)
    assert response.status_code == status
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param)
    assert error["message"]
    assert response.headers["x-content-type-options"] == "nosniff"


def test_a_forgotten_v1_is_told(http: httpx.Client) -> None:
    told = {path: http.post(path, json={}).json()["error"]["message"] for path in ("/chat/completions", "/chat")}
    assert told == {
        "/chat/completions": "there is no /chat/completions here; did you mean /v1/chat/completions?",
        "/chat": "there is no /chat here",
    }


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"n": 9}, "invalid_value", "n"),
        ({"reasoning_effort": "low"}, "unsupported_value", "reasoning_effort"),
        ({"temperature": 3}, "invalid_value", "temperature"),
        ({"max_tokens": CONTEXT_TOKENS}, "context_length_exceeded", "max_tokens"),
        ({"messages": asked("word " * 2_000)}, "context_length_exceeded", "messages"),
        ({"messages": asked("hi") * 101}, "too_many_messages", "messages"),
        ({"extra_body": {"colour": "red"}}, "unknown_parameter", "colour"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_field_that_cannot_be_served_is_named(
    client: openai.OpenAI, fields: dict[str, Any], code: str, param: str, stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{"model": "support", "messages": asked("hi"), "stream": stream, **fields})
    assert (caught.value.code, caught.value.param) == (code, param)
    if code == "context_length_exceeded":
        assert str(CONTEXT_TOKENS) in caught.value.message


def test_a_role_marker_in_a_customers_text_stays_text(client: openai.OpenAI) -> None:
    def tokens(text: str) -> int:
        usage = client.chat.completions.create(model="support", messages=asked(text), max_tokens=1).usage
        assert usage
        return usage.prompt_tokens

    assert tokens("<|end|>") > tokens("a") + 3


def test_the_request_id_is_echoed_or_made(http: httpx.Client) -> None:
    assert http.get("/health", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    assert http.get("/health").headers["x-request-id"]


def test_a_customer_who_asks_for_a_person_or_gets_an_unsure_reply_is_handed_over(client: openai.OpenAI) -> None:
    person = client.chat.completions.create(model="support", messages=asked("can i talk to a person?"))
    assert rayloop(person)["handover"] is True
    assert rayloop(person)["reason"] == "intent"
    unsure = client.chat.completions.create(model="support", messages=asked(UNSURE))
    assert rayloop(unsure)["reason"] == "low_reply_confidence"
    content = unsure.choices[0].message.content or ""
    assert "handing you over to a colleague" in content
    text, chunks = streamed(client, UNSURE)
    assert text == content
    assert rayloop(chunks[-1]) == rayloop(unsure)


def test_an_answer_is_found_again_with_all_that_led_to_it(
    client: openai.OpenAI, http: httpx.Client, service: Service
) -> None:
    question = "i want a refund"
    completion = client.chat.completions.create(
        model="support", messages=asked(question), user="anna@example.org", metadata={"page": "faq"}
    )
    exchange, _ = traffic.find(Storage(service.store), completion.id)
    assert exchange
    assert (exchange.messages, exchange.reply, exchange.status) == (asked(question), ANSWERS[question], "ok")
    assert (exchange.intent, exchange.metadata, exchange.stream) == ("refund_request", {"page": "faq"}, False)
    assert exchange.user_hash
    assert "anna" not in exchange.user_hash
    assert exchange.end_to_end_s > (exchange.time_to_first_token_s or 0) > 0
    given = {"response_id": completion.id, "rating": 1, "intent": "refund_request", "comment": "kind"}
    assert http.post("/v1/feedback", json=given).status_code == 200
    chain = http.get(f"/v1/why/{completion.id}").json()
    assert chain["answer"]["reply"] == ANSWERS[question]
    assert chain["feedback"][0]["comment"] == "kind"
    assert (chain["variant"], chain["model"]["version"], chain["model"]["compressed_from"]) == (
        "champion",
        "support/3",
        "2",
    )
    assert chain["run"]["run_id"] == "run-7"
    assert chain["table"] == {"table": "support.conversations", "snapshot_id": SNAPSHOT_ID}
    assert chain["sources"][0]["uri"] == "sample:shop"
    command = [sys.executable, "-m", "jobs.why", completion.id, "--config", str(service.config)]
    told = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert told.returncode == 0, told.stderr
    assert json.loads(told.stdout.splitlines()[-1]) == chain
    assert f"snapshot_id  {SNAPSHOT_ID}" in told.stdout
    command[3] = "chatcmpl-" + "0" * 31
    lost = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (lost.returncode, "there is no response" in lost.stderr) == (1, True)


def test_a_client_that_leaves_frees_its_slot_and_is_logged_as_cancelled(service: Service, http: httpx.Client) -> None:
    body = {"model": "support", "messages": asked(ENDLESS), "stream": True, "max_tokens": 480}
    with http.stream("POST", "/v1/chat/completions", json=body) as response:
        lines = (line for line in response.iter_lines() if line)
        first = [json.loads(next(lines).removeprefix("data: ")) for _ in range(3)]
    response_id = first[0]["id"]
    exchange = eventually(lambda: traffic.find(Storage(service.store), response_id)[0])
    assert exchange.status == "cancelled"
    assert exchange.reply.startswith("la la")
    assert len(exchange.reply.split()) < 470, "the reply was not written to its end"
    eventually(lambda: http.get("/ready").json()["slots_in_use"] == {"champion": 0})


def test_an_answer_whose_client_leaves_before_the_functions_have_spoken_is_logged_whole(
    service: Service, http: httpx.Client
) -> None:
    (pid,) = pids("Intent")
    os.kill(pid, signal.SIGSTOP)
    try:
        body = {"model": "support", "messages": asked("thank you"), "stream": True}
        text = ""
        with http.stream("POST", "/v1/chat/completions", json=body) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    chunk = json.loads(line.removeprefix("data: "))
                    assert chunk["choices"][0]["finish_reason"] is None, "the end waits for what the functions say"
                    text += chunk["choices"][0]["delta"]["content"]
                if text == ANSWERS["thank you"]:
                    time.sleep(0.3)  # the end of the reply is a token that is no text, and comes after it
                    break
    finally:
        os.kill(pid, signal.SIGCONT)
    exchange = eventually(lambda: traffic.find(Storage(service.store), chunk["id"])[0])
    assert (exchange.status, exchange.reply) == ("ok", ANSWERS["thank you"])


def test_health_and_readiness_are_public(service: Service) -> None:
    assert httpx.get(f"{service.url}/health", timeout=60).json() == {"status": "ok"}
    ready = httpx.get(f"{service.url}/ready", timeout=60).json()
    assert (ready["status"], ready["variants"]) == ("ready", {"champion": "support/3", "polite": "support/4"})
    assert set(ready["slots_in_use"]) == {"champion"}


def test_the_page_and_its_parts_are_served_with_a_strict_policy(service: Service) -> None:
    for path, kind in (("/", "text/html"), ("/page/page.css", "text/css"), ("/page/page.js", "text/javascript")):
        response = httpx.get(service.url + path, timeout=60)
        assert response.status_code == 200
        assert response.headers["content-type"].startswith(kind)
        assert "default-src 'none'; script-src 'self'" in response.headers["content-security-policy"]
        assert response.headers["x-content-type-options"] == "nosniff"
        assert len(response.content) > 1_000


def test_deployed_as_it_is_there_is_nothing_to_do(service: Service) -> None:
    command = [sys.executable, "-m", "jobs.serve", "--config", str(service.config)]
    again = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    line = json.loads(again.stdout.splitlines()[-1])
    assert (again.returncode, line["status"]) == (0, "up_to_date"), again.stderr
    assert line["outputs"] == service.last_line["outputs"]


def pids(kind: str) -> set[int]:
    return {
        replica["pid"]
        for replica in deployment.replicas("support")
        if replica["deployment"].startswith(kind) and replica["state"] == "RUNNING" and replica.get("pid")
    }


def kill(kind: str) -> int:
    (pid,) = pids(kind)
    os.kill(pid, signal.SIGKILL)
    return pid


def test_feedback_that_was_acknowledged_is_there_after_a_kill_and_the_replica_comes_back(
    client: openai.OpenAI, http: httpx.Client, service: Service
) -> None:
    completion = client.chat.completions.create(model="support", messages=asked("thank you"))
    (pid,) = pids("ResponseManagement")
    response = http.post("/v1/feedback", json={"response_id": completion.id, "rating": -1, "comment": "bad"})
    os.kill(pid, signal.SIGKILL)
    assert response.status_code == 200
    _, feedback = traffic.find(Storage(service.store), completion.id)
    assert [(given.rating, given.comment) for given in feedback] == [(-1, "bad")]
    eventually(lambda: pids("ResponseManagement") - {pid})

    def rated() -> bool:
        return http.post("/v1/feedback", json={"response_id": completion.id, "rating": 1}).status_code == 200

    eventually(rated)
    assert [given.rating for given in traffic.find(Storage(service.store), completion.id)[1]] == [-1, 1]


def test_a_replica_comes_back_when_the_job_that_deployed_it_and_its_code_are_gone(
    client: openai.OpenAI, cluster: RunningCluster, service: Service
) -> None:
    from ray._private.runtime_env.packaging import get_local_dir_from_uri
    from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_list
    from ray.job_submission import JobSubmissionClient

    assert JobSubmissionClient(cluster.dashboard_url).get_job_status(service.job_id).is_terminal()
    for package in _internal_kv_list(b"gcs://_ray_pkg"):
        _internal_kv_del(package)
    assert not _internal_kv_list(b"gcs://_ray_pkg")
    before = kill("LanguageModel")
    with pytest.raises(ProcessLookupError):
        eventually(lambda: os.kill(before, 0))
    (after,) = eventually(lambda: pids("LanguageModel") - {before}, within_s=180)
    running = deployment.deployed("support")
    assert running
    code = running["runtime_env"]["working_dir"]
    assert code.startswith(f"file://{service.store}/code/")
    where = Path(os.readlink(f"/proc/{after}/cwd"))
    assert where == get_local_dir_from_uri(code, str(where.parent))
    assert Path(where, "app", "serving", "engine.py").is_file()
    model = serve.get_deployment_handle("LanguageModel-1", "support")
    assert model.ready.remote().result(timeout_s=60).code == str(where / "app")

    def answers() -> bool:
        with contextlib.suppress(openai.APIStatusError):
            completion = client.chat.completions.create(model="support", messages=asked("thank you"))
            return completion.choices[0].message.content == ANSWERS["thank you"]
        return False

    eventually(answers)


def test_a_deployment_that_fails_says_why_and_leaves_what_ran(client: openai.OpenAI, service: Service) -> None:
    running = deployment.deployed("support")
    assert running
    before = pids("ResponseManagement"), pids("LanguageModel")
    with pytest.raises(StageFailed, match=r"serving\.variants names nothing.*What ran before is serving again"):
        deployment.deploy({**running, "args": {**running["args"], "variants": []}})
    assert deployment.deployed("support") == running
    assert (pids("ResponseManagement"), pids("LanguageModel")) == before
    completion = client.chat.completions.create(model="support", messages=asked("thank you"))
    assert completion.choices[0].message.content == ANSWERS["thank you"]


def test_another_application_is_deployed_beside_it_and_removed_again(service: Service) -> None:
    running = deployment.deployed("support")
    assert running
    before = pids("")
    monitor = {
        "name": "monitor", "route_prefix": None, "import_path": "app.monitoring.application:build_app",
        "runtime_env": running["runtime_env"],
        "args": {"storage_uri": service.store, "window_s": 60.0, "interval_s": 60.0},
    }  # fmt: skip
    deployment.deploy(monitor)
    assert deployment.status("monitor") == "RUNNING"
    deployment.remove("monitor")
    eventually(lambda: deployment.status("monitor") == "NOT_STARTED")
    assert deployment.deployed("support") == running
    assert pids("") == before


def test_neither_keys_nor_what_customers_write_are_in_any_log_or_on_the_dashboard(
    client: openai.OpenAI, http: httpx.Client, service: Service, cluster: RunningCluster
) -> None:
    import ray
    from ray.job_submission import JobSubmissionClient

    client.chat.completions.create(model="support", messages=asked(CANARY), user="canary-user")
    http.post("/v1/chat/completions", content=f'{{"model": "{CANARY}", NaN}}')
    http.post("/v1/chat/completions", json={"model": "support", "messages": asked(CANARY), "seed": CANARY})
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    logs = b"".join(file.read_bytes() for file in session.joinpath("logs").rglob("*") if file.is_file())
    assert b'"request"' in logs, "our own request lines are there"
    shown = json.dumps(deployment._details()) + str(JobSubmissionClient(cluster.dashboard_url).list_jobs())
    shown += httpx.get(cluster.metrics_url, timeout=60).text
    for secret in (service.api_key, "canary-0001", "canary-user"):
        assert secret.encode() not in logs
        assert secret not in shown


def test_metrics_are_exported(cluster: RunningCluster, service: Service) -> None:
    def exported() -> bool:
        text = httpx.get(cluster.metrics_url, timeout=60).text
        wanted = (
            'rayloop_requests_total{', "rayloop_time_to_first_token_seconds_bucket", "rayloop_completion_tokens_total",
            'reason="low_reply_confidence"', "rayloop_feedback_total", 'route="/v1/chat/completions"',
        )  # fmt: skip
        return all(name in text for name in wanted)

    eventually(exported)


def test_an_adapter_beside_the_model_answers_by_its_name_and_by_its_version(client: openai.OpenAI) -> None:
    for model in ("polite", "support/4"):
        for question, answer in ADAPTED_ANSWERS.items():
            raw = client.chat.completions.with_raw_response.create(model=model, messages=asked(question))
            completion = raw.parse()
            assert completion.choices[0].message.content == answer
            assert (completion.model, raw.headers["x-rayloop-variant"]) == ("support/4", "polite")
            assert rayloop(completion)["variant"] == "polite"
    cards = {card.id: card.model_extra["rayloop"] for card in client.models.list() if card.model_extra}
    assert cards["polite"] == {"variant": "polite", "version": "support/4", "adapter_of": "champion"}
    assert cards["champion"]["adapter_of"] is None


def test_replies_with_and_without_an_adapter_are_written_side_by_side(service: Service) -> None:
    async def ask_all() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key=service.api_key, timeout=60) as client:
            completions = await asyncio.gather(
                *(
                    client.chat.completions.create(model=model, messages=asked(question))
                    for question in ANSWERS
                    for model in ("support", "polite")
                )
            )
        return [completion.choices[0].message.content for completion in completions]

    expected = [answers[question] for question in ANSWERS for answers in (ANSWERS, ADAPTED_ANSWERS)]
    assert asyncio.run(ask_all()) == expected
