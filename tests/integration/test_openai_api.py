"""OpenAI's interface, row by row, through the official client, to which only the address and the key are told."""

import asyncio
import json
from typing import Annotated, Any, Literal

import httpx
import openai
import pytest
from pydantic import BaseModel, Field

from app import traffic
from app.storage import Storage
from tests.answering_model import (
    ANSWERS,
    CANCEL,
    CANCEL_ORDER,
    CANCELLED,
    CONFIRMED,
    CONTEXT_TOKENS,
    ENDLESS,
    UNSURE,
)
from tests.conftest import Service

QUESTION = "how do i reset my password?"


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def named(name: str) -> dict[str, Any]:
    """A choice of one function."""
    return {"type": "function", "function": {"name": name}}


def called(arguments: str) -> dict[str, Any]:
    """A reply that called a function."""
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"role": "assistant", "tool_calls": [call]}


def chat(client: openai.OpenAI, *messages: Any, **options: Any) -> Any:
    return client.chat.completions.create(model="support", messages=list(messages), **options)


# n and seed


def test_several_choices_are_those_of_their_seeds_and_the_first_is_the_one_alone(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"temperature": 1.5, "seed": 11, "max_tokens": 20}
    three = chat(client, user(UNSURE), n=3, **options)
    texts = [choice.message.content for choice in three.choices]
    assert [choice.index for choice in three.choices] == [0, 1, 2]
    assert len(set(texts)) > 1
    alone = chat(client, user(UNSURE), **options)
    assert alone.choices[0].message.content == texts[0]
    assert three.usage.prompt_tokens == alone.usage.prompt_tokens
    assert three.usage.completion_tokens > alone.usage.completion_tokens
    streamed, ends = ["", "", ""], []
    for chunk in chat(client, user(UNSURE), n=3, stream=True, **options):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
            ends += [choice.index] if choice.finish_reason else []
    assert (streamed, sorted(ends)) == (texts, [0, 1, 2])


def test_a_seeded_reply_is_the_same_under_concurrent_load(service: Service) -> None:
    async def ask() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key=service.api_key, timeout=60) as client:

            async def one(seed: int | None) -> str | None:
                answer = await client.chat.completions.create(
                    model="support", messages=[{"role": "user", "content": UNSURE}], temperature=1.5, seed=seed,
                    max_tokens=16,
                )  # fmt: skip
                return answer.choices[0].message.content

            alone = await one(5)
            together = await asyncio.gather(*(one(5 if place % 3 == 0 else None) for place in range(18)))
            return [alone, *together[::3]]

    assert len(set(asyncio.run(ask()))) == 1


def test_every_choice_is_logged_with_the_answer(client: openai.OpenAI, service: Service) -> None:
    answer = chat(client, user(UNSURE), n=2, temperature=1.5, seed=3, max_tokens=8)
    exchange, _ = traffic.find(Storage(service.store), answer.id)
    assert exchange
    assert [exchange.reply, *exchange.other_replies] == [choice.message.content for choice in answer.choices]


# tools


def test_the_model_calls_a_function_and_goes_on_with_its_result(client: openai.OpenAI, service: Service) -> None:
    first = chat(client, user(CANCEL), tools=[CANCEL_ORDER])
    (choice,) = first.choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    (call,) = choice.message.tool_calls
    assert (call.type, call.function.name) == ("function", "cancel_order")
    assert json.loads(call.function.arguments) == {"order": "4512"}
    result = {"role": "tool", "tool_call_id": call.id, "content": CANCELLED}
    second = chat(client, user(CANCEL), choice.message.model_dump(exclude_none=True), result, tools=[CANCEL_ORDER])
    assert (second.choices[0].message.content, second.choices[0].finish_reason) == (CONFIRMED, "stop")
    exchange, _ = traffic.find(Storage(service.store), second.id)
    assert exchange
    assert (exchange.tools, exchange.is_conversation) == (["cancel_order"], False)


def test_a_call_is_streamed_as_deltas_of_its_arguments(client: openai.OpenAI) -> None:
    chunks = list(chat(client, user(CANCEL), tools=[CANCEL_ORDER], stream=True))
    deltas = [call for chunk in chunks for choice in chunk.choices for call in choice.delta.tool_calls or ()]
    begun, *rest = deltas
    assert begun.id
    assert (begun.index, begun.function.name) == (0, "cancel_order")
    assert all(call.id is None and call.index == 0 for call in rest)
    assert json.loads("".join(call.function.arguments or "" for call in deltas)) == {"order": "4512"}
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    assert not any(choice.delta.content for chunk in chunks for choice in chunk.choices)


def test_the_clients_own_helper_accumulates_a_streamed_call(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model="support", messages=[{"role": "user", "content": CANCEL}], tools=[CANCEL_ORDER]
    ) as stream:
        final = stream.get_final_completion()
    (call,) = final.choices[0].message.tool_calls or []
    assert json.loads(call.function.arguments) == {"order": "4512"}


def test_tool_choice_says_whether_and_which(client: openai.OpenAI) -> None:
    look = {"type": "function", "function": {"name": "look"}}
    polite = chat(client, user("thank you"), tools=[CANCEL_ORDER]).choices[0]
    assert (polite.message.content, polite.finish_reason) == (ANSWERS["thank you"], "stop")
    assert polite.message.tool_calls is None
    none = chat(client, user("thank you"), tools=[CANCEL_ORDER], tool_choice="none").choices[0]
    assert none.message.content == ANSWERS["thank you"]
    required = chat(
        client, user("thank you"), tools=[CANCEL_ORDER, look], tool_choice="required", parallel_tool_calls=False
    ).choices[0]
    assert required.message.tool_calls[0].function.name in ("cancel_order", "look")
    forced = chat(client, user(CANCEL), tools=[CANCEL_ORDER, look], tool_choice=named("look")).choices[0]
    assert [(call.function.name, call.function.arguments) for call in forced.message.tool_calls] == [("look", "{}")]
    assert forced.finish_reason == "stop", "as OpenAI has it where the function was named"


def test_parallel_calls_are_several_or_one(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {
        "tools": [CANCEL_ORDER], "tool_choice": "required", "temperature": 1.9, "max_tokens": 150, "seed": 4,
    }  # fmt: skip
    several = [chat(client, user(CANCEL), n=8, **options).choices for options in [options, {**options, "seed": 40}]]
    counts = [len(choice.message.tool_calls or ()) for choices in several for choice in choices]
    assert max(counts) > 1, "some reply has several"
    for choice in chat(client, user(CANCEL), n=8, parallel_tool_calls=False, **options).choices:
        assert len(choice.message.tool_calls or ()) <= 1


@pytest.mark.parametrize(
    ("messages", "options", "param"),
    [
        ([user("hi")], {"tool_choice": "required"}, "tool_choice"),
        ([user("hi")], {"parallel_tool_calls": True}, "parallel_tool_calls"),
        ([user("hi")], {"tools": [CANCEL_ORDER] * 2}, "tools[1].function.name"),
        ([user("hi")], {"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"),
        ([user("hi")], {"tools": [CANCEL_ORDER], "tool_choice": named("no")}, "tool_choice"),
        ([user("hi"), {"role": "tool", "tool_call_id": "call_1", "content": "x"}], {}, "messages[1].tool_call_id"),
        ([user("hi"), called("{")], {}, "messages[1].tool_calls[0].function.arguments"),
        ([user("hi"), called("{}"), user("x")], {}, "messages[2]"),
    ],
)  # fmt: skip
def test_calls_that_make_no_sense_are_refused_by_name(
    client: openai.OpenAI, messages: list[Any], options: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, *messages, **options)
    assert caught.value.param == param


# response_format


class Ticket(BaseModel):
    """What the answer is parsed into."""

    kind: Literal["refund", "order"]
    urgent: bool
    tags: Annotated[list[Literal["a", "b"]], Field(max_length=2)]


def test_an_answer_follows_its_json_schema(client: openai.OpenAI) -> None:
    parsed = client.chat.completions.parse(
        model="support", messages=[{"role": "user", "content": UNSURE}], response_format=Ticket, max_tokens=200
    )
    assert isinstance(parsed.choices[0].message.parsed, Ticket)
    closed = {
        "type": "object", "properties": {"rating": {"enum": ["good", "bad"]}, "sure": {"type": "boolean"}},
        "required": ["rating", "sure"], "additionalProperties": False,
    }  # fmt: skip
    format = {"type": "json_schema", "json_schema": {"name": "rating", "strict": True, "schema": closed}}
    for options in ({}, {"temperature": 1.9, "seed": 3}):
        whole = chat(client, user(QUESTION), response_format=format, **options)
        told = json.loads(whole.choices[0].message.content)
        assert told["rating"] in ("good", "bad")
        assert isinstance(told["sure"], bool)
        streamed = chat(client, user(QUESTION), response_format=format, stream=True, **options)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in streamed)
        assert text == whole.choices[0].message.content


def test_json_object_is_an_object_and_no_words_follow_it(client: openai.OpenAI) -> None:
    answer = chat(
        client, user(UNSURE), response_format={"type": "json_object"}, logit_bias={"0": 0}, temperature=0, max_tokens=60
    )
    text = answer.choices[0].message.content
    assert text.startswith("{")
    assert "handing you over" not in text
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text), dict)


def test_a_format_that_cannot_be_followed_is_refused(client: openai.OpenAI) -> None:
    broken = {"name": "x", "schema": {"type": "colour"}}
    for format, param in (
        ({"type": "json_schema"}, "response_format.json_schema"),
        ({"type": "json_schema", "json_schema": broken}, "response_format.json_schema.schema"),
        ({"type": "xml"}, "response_format.type"),
    ):  # fmt: skip
        with pytest.raises(openai.BadRequestError) as caught:
            chat(client, user("hi"), response_format=format)
        assert caught.value.param == param


# stream_options


def test_a_stream_tells_its_usage_once_where_that_is_asked_for(client: openai.OpenAI) -> None:
    chunks = list(chat(client, user("thank you"), stream=True, stream_options={"include_usage": True}))
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].usage.total_tokens == chunks[-1].usage.prompt_tokens + chunks[-1].usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens >= 0
    assert all(chunk.usage is None for chunk in chat(client, user("thank you"), stream=True))


# completions, embeddings, tokens


def test_plain_completions_go_on_from_texts_and_tokens(client: openai.OpenAI, service: Service) -> None:
    options: dict[str, Any] = {"model": "support", "max_tokens": 12, "temperature": 0}
    text = client.completions.create(prompt="Order 4512 is on its", **options)
    assert text.object == "text_completion"
    assert text.id.startswith("cmpl-")
    assert text.choices[0].finish_reason in ("stop", "length")
    several = client.completions.create(prompt=["Order 4512 is on its", "You are"], n=2, **options)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert [several.choices[0].text, several.choices[1].text] == [text.choices[0].text] * 2
    streamed = client.completions.create(prompt="Order 4512 is on its", stream=True, **options)
    assert "".join(chunk.choices[0].text for chunk in streamed) == text.choices[0].text
    echoed = client.completions.create(prompt="Order 4512 is on its", echo=True, **options)
    assert echoed.choices[0].text == "Order 4512 is on its" + text.choices[0].text
    told = client.completions.create(prompt="Order 4512 is on its", logprobs=2, **options).choices[0]
    assert told.logprobs
    assert "".join(told.logprobs.tokens or []) == told.text
    assert told.logprobs.text_offset == [
        len("".join((told.logprobs.tokens or [])[:place])) for place in range(len(told.logprobs.tokens or []))
    ]
    exchange, _ = traffic.find(Storage(service.store), text.id)
    assert exchange
    assert (exchange.endpoint, exchange.handover, exchange.is_conversation) == ("completions", None, False)


def test_tokens_are_told_and_put_together_again(client: openai.OpenAI, http: httpx.Client) -> None:
    text = "You are welcome! 👍"
    told = http.post("/tokenize", json={"model": "support", "prompt": text}).json()
    assert (told["count"], told["max_model_len"]) == (len(told["tokens"]), CONTEXT_TOKENS)
    assert http.post("/detokenize", json={"model": "support", "tokens": told["tokens"]}).json() == {"prompt": text}
    by_text = client.completions.create(model="support", prompt=text, max_tokens=5, temperature=0)
    by_tokens = client.completions.create(model="support", prompt=told["tokens"], max_tokens=5, temperature=0)
    assert by_tokens.choices[0].text == by_text.choices[0].text
    talk = http.post("/tokenize", json={"model": "support", "messages": [user(text)]}).json()
    answer = chat(client, user(text), max_tokens=1)
    assert talk["count"] == answer.usage.prompt_tokens
    assert talk["token_strs"][0] == "<|user|>"
    marked = http.post("/tokenize", json={"model": "support", "prompt": "<|user|>"}).json()
    assert marked["count"] > 3, "a marker in a text is text"
    for body, param in (({}, "prompt"), ({"prompt": "a", "messages": [user("a")]}, "prompt")):
        refused = http.post("/tokenize", json={"model": "support", **body})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
    refused = http.post("/detokenize", json={"model": "support", "tokens": [99_999]})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tokens")


def test_embeddings_are_refused_where_the_engine_only_writes(client: openai.OpenAI, service: Service) -> None:
    if service.engine == "transformers":
        pytest.skip("this engine makes vectors")
    with pytest.raises(openai.BadRequestError, match="/v1/embeddings") as caught:
        client.embeddings.create(model="support", input="where is my order?")
    assert caught.value.code == "unsupported"


def test_embeddings_are_unit_vectors_in_both_encodings(client: openai.OpenAI, service: Service) -> None:
    if service.engine == "vllm":
        pytest.skip("this engine only writes")
    texts = ["where is my order?", "where is my order 4512?", "i want a refund"]
    plain = client.embeddings.create(model="support", input=texts, encoding_format="float")
    coded = client.embeddings.create(model="support", input=texts)
    for one, other in zip(plain.data, coded.data, strict=True):
        assert one.embedding == pytest.approx(other.embedding, abs=1e-6)
        assert sum(value * value for value in one.embedding) == pytest.approx(1, abs=1e-4)
    one, two, three = (each.embedding for each in plain.data)

    def likeness(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True))

    assert likeness(one, two) > likeness(one, three)
    assert plain.usage.total_tokens == plain.usage.prompt_tokens > 0
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model="support", input="a", dimensions=3)
    assert caught.value.param == "dimensions"


# every field


def test_no_field_of_the_official_client_is_ignored(http: httpx.Client) -> None:
    import inspect

    from openai.resources.chat.completions import Completions

    asks: dict[str, Any] = {
        "audio": {"voice": "a", "format": "wav"}, "frequency_penalty": 0.5, "function_call": "auto",
        "functions": [{"name": "f"}],
        "logit_bias": {"5": 1}, "logprobs": True, "max_completion_tokens": 5, "max_tokens": 5, "metadata": {"a": "b"},
        "modalities": ["text", "audio"], "moderation": {}, "n": 2, "parallel_tool_calls": True,
        "prediction": {"type": "content", "content": "a"},
        "presence_penalty": 0.5, "prompt_cache_key": "a", "prompt_cache_options": {}, "prompt_cache_retention": "24h",
        "reasoning_effort": "low", "response_format": {"type": "json_object"}, "safety_identifier": "a", "seed": 1,
        "service_tier": "flex", "stop": ["x"], "store": True, "stream": True, "stream_options": {"include_usage": True},
        "temperature": 1, "tool_choice": "auto", "tools": [CANCEL_ORDER], "top_logprobs": 1, "top_p": 0.5, "user": "a",
        "verbosity": "low", "web_search_options": {},
    }  # fmt: skip
    theirs = set(inspect.signature(Completions.create).parameters) - {
        "self", "messages", "model", "extra_headers", "extra_query", "extra_body", "timeout",
    }  # fmt: skip
    assert theirs <= set(asks), "the client has new fields: support them, or refuse them by name"
    needed = {"parallel_tool_calls": "tools", "stream_options": "stream", "top_logprobs": "logprobs"}
    refused = set()
    for name in theirs:
        fields = {name: asks[name], **({needed[name]: asks[needed[name]]} if name in needed else {})}
        body = {"model": "support", "messages": [user("thank you")], "max_tokens": 5, **fields}
        response = http.post("/v1/chat/completions", json=body)
        if response.status_code == 400:
            assert (response.json()["error"]["param"], response.json()["error"]["code"]) == (name, "unsupported_value")
            refused.add(name)
        else:
            assert response.status_code == 200, (name, response.text)
    assert refused == {
        "audio", "function_call", "functions", "modalities", "moderation", "prediction", "prompt_cache_key",
        "prompt_cache_options", "prompt_cache_retention", "reasoning_effort", "safety_identifier", "service_tier",
        "store", "verbosity", "web_search_options",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 10**9}, "n"), ({"n": 9}, "n"), ({"n": 0}, "n"), ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 10**12}, "max_tokens"), ({"top_p": 0}, "top_p"), ({"stop": [""]}, "stop[0]"),
        ({"stop": ["a"] * 10_000}, "stop"), ({"logit_bias": {"99999999": 1}}, "logit_bias"), ({"seed": 2**63}, "seed"),
        ({"seed": 10**400}, "seed"), ({"temperature": -1}, "temperature"), ({"top_logprobs": 10**9}, "top_logprobs"),
        ({"messages": [user("x")] * 100_000}, "messages"), ({"tools": [CANCEL_ORDER] * 129}, "tools"),
    ],
)  # fmt: skip
def test_absurd_values_are_refused_by_name(http: httpx.Client, fields: dict[str, Any], param: str) -> None:
    response = http.post("/v1/chat/completions", json={"model": "support", "messages": [user("hi")], **fields})
    assert response.status_code in (400, 413), response.text
    if response.status_code == 400:
        assert response.json()["error"]["param"] == param


def test_a_song_can_be_cut_by_either_name(client: openai.OpenAI) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        answer = chat(client, user(ENDLESS), **{name: 7})
        assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 7)
