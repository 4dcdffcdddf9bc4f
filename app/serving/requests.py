"""Checked bodies to the messages that the deployments hand each other, or a 400 that names the parameter."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from app.errors import RequestError
from app.serving import bodies, tools
from app.serving.output_format import ANY_OBJECT, Function, ToolChoice, grammar
from app.serving.parsing import MAX_TOLD_CHARS, parsed
from app.serving.schema import AnswerRequest, FeedbackRequest, Prompt, Sampling, TextRequest
from app.serving.turns import question, turns
from app.settings.serving import ServingConfig

COMPLETION_MAX_TOKENS = 16
"""OpenAI's own default for /v1/completions."""


def parse_chat(body: bytes, config: ServingConfig) -> bodies.ChatCompletionBody:
    """The checked body of a request for chat completions.

    Raises:
        RequestError: 400, naming the parameter.
    """
    return parsed(bodies.ChatCompletionBody, body, config)


def chat_request(
    chat: bodies.ChatCompletionBody, config: ServingConfig, said: Sequence[Mapping[str, Any]] = ()
) -> AnswerRequest:
    """A checked request for chat completions.

    Args:
        said: The messages that its conversation had before, in OpenAI's form.

    Raises:
        RequestError: 400, naming the parameter.
    """
    choice = _tool_choice(chat)
    schema, description = _schema(chat.response_format)
    offered = _as_json(chat.tools) if choice.kind != "none" else ()
    if chat.conversation_id is not None and (chat.n or 1) > 1:
        raise RequestError(
            400, f"n={chat.n} with conversation_id: only one reply goes on with it", "invalid_value", "n"
        )
    if config.system_prompt:  # it may have been set since
        said = [message for message in said if message["role"] not in ("system", "developer")]
    whole = [*(bodies.Message.model_validate(message) for message in said), *chat.messages]
    messages = turns(whole, description, len(said), config.system_prompt)
    return AnswerRequest(
        endpoint="chat",
        model=chat.model,
        prompts=(messages,),
        messages=messages,
        question=question(whole),
        sampling=_sampling(
            chat,
            config,
            max_tokens=_max_tokens(chat),
            top_logprobs=_top_logprobs(chat),
            grammar=grammar(schema, choice),
        ),
        n=_n(chat.n, config),
        stream=bool(chat.stream),
        include_usage=_include_usage(chat),
        user=chat.user,
        metadata=chat.metadata or {},
        tools=offered,
        tool_choice=choice.kind,
        is_json=schema is not None,
        trims=chat.conversation_id is not None,
    )


def parse_completion(body: bytes, config: ServingConfig) -> AnswerRequest:
    """A checked request for plain completions.

    Raises:
        RequestError: 400, naming the parameter.
    """
    completion = parsed(bodies.CompletionBody, body)
    prompts, n = _prompts(completion.prompt, "prompt", config), _n(completion.n, config)
    if completion.best_of not in (None, n):
        raise RequestError(
            400, f"best_of={completion.best_of} is supported only where it is n={n}", "unsupported_value", "best_of"
        )
    if completion.echo and completion.logprobs is not None:
        raise RequestError(
            400, "echo=true with logprobs is not supported: leave one of them out", "unsupported_value", "echo"
        )
    return AnswerRequest(
        endpoint="completions",
        model=completion.model,
        prompts=prompts,
        messages=tuple({"role": "user", "content": prompt} for prompt in prompts if isinstance(prompt, str)),
        question="",
        sampling=_sampling(
            completion,
            config,
            max_tokens=completion.max_tokens or COMPLETION_MAX_TOKENS,
            top_logprobs=completion.logprobs,
        ),
        n=n,
        stream=bool(completion.stream),
        include_usage=_include_usage(completion),
        user=completion.user,
        echo=bool(completion.echo),
    )


def parse_embedding(body: bytes, config: ServingConfig) -> tuple[TextRequest, bodies.EmbeddingBody]:
    """A checked request for embeddings.

    Raises:
        RequestError: 400, naming the parameter.
    """
    embedding = parsed(bodies.EmbeddingBody, body)
    return TextRequest(embedding.model, _prompts(embedding.input, "input", config)), embedding


def parse_tokenize(body: bytes, config: ServingConfig) -> TextRequest:
    """A checked request for the tokens of a text or a conversation.

    Raises:
        RequestError: 400, naming the parameter.
    """
    asked = parsed(bodies.TokenizeBody, body, config)
    if (asked.prompt is None) == (asked.messages is None):
        raise RequestError(400, "give either prompt or messages", "invalid_value", "prompt")
    if asked.messages is None:
        if asked.tools:
            raise RequestError(400, "tools need messages", "invalid_value", "tools")
        return TextRequest(asked.model, (asked.prompt or "",))
    _functions(asked.tools or [])
    return TextRequest(asked.model, (turns(asked.messages, system=config.system_prompt),), _as_json(asked.tools))


def parse_detokenize(body: bytes) -> TextRequest:
    """A checked request for the text of tokens.

    Raises:
        RequestError: 400, naming the parameter.
    """
    asked = parsed(bodies.DetokenizeBody, body)
    return TextRequest(asked.model, (tuple(asked.tokens),))


def parse_take(body: bytes) -> str:
    """Who takes an answer over.

    Raises:
        RequestError: 400, naming the parameter.
    """
    return parsed(bodies.TakeBody, body).agent


def parse_feedback(body: bytes) -> FeedbackRequest:
    """The checked feedback.

    Raises:
        RequestError: 400, naming the parameter.
    """
    feedback = parsed(bodies.FeedbackBody, body)
    return FeedbackRequest(feedback.response_id, feedback.rating, feedback.intent, feedback.comment)


def _sampling(
    body: bodies.SamplingBody,
    config: ServingConfig,
    max_tokens: int | None,
    top_logprobs: int | None,
    grammar: str = "",
) -> Sampling:
    return Sampling(
        max_tokens=max_tokens,
        temperature=config.default_temperature if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        seed=body.seed,
        stop=tuple(body.stop),
        frequency_penalty=body.frequency_penalty or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        logit_bias=tuple((int(token), bias) for token, bias in (body.logit_bias or {}).items()),
        grammar=grammar,
        top_logprobs=top_logprobs,
    )


def _max_tokens(chat: bodies.ChatCompletionBody) -> int | None:
    old, new = chat.max_tokens, chat.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise RequestError(
            400, f"max_tokens={old} and max_completion_tokens={new} differ: give one", "invalid_value", "max_tokens"
        )
    return old if new is None else new


def _top_logprobs(chat: bodies.ChatCompletionBody) -> int | None:
    if chat.top_logprobs and not chat.logprobs:
        raise RequestError(
            400, f"top_logprobs={chat.top_logprobs} needs logprobs=true", "invalid_value", "top_logprobs"
        )
    return chat.top_logprobs or 0 if chat.logprobs else None


def _include_usage(body: bodies.SamplingBody) -> bool:
    if body.stream_options is None:
        return False
    if not body.stream:
        raise RequestError(400, "stream_options needs stream=true", "invalid_value", "stream_options")
    return bool(body.stream_options.include_usage)


def _n(n: int | None, config: ServingConfig) -> int:
    if n is not None and n > config.max_choices:
        raise RequestError(400, f"n={n} is too many: at most {config.max_choices} are given", "invalid_value", "n")
    return n or 1


def _prompts(given: str | Sequence[Any], field: str, config: ServingConfig) -> tuple[Prompt, ...]:
    """One prompt for each text or token list."""
    if isinstance(given, str):
        return (given,)
    if not given:
        raise RequestError(400, f"{field} is empty", "invalid_value", field)
    if isinstance(given[0], int):
        return (tuple(given),)
    if len(given) > config.max_prompts:
        raise RequestError(
            400, f"{field} has {len(given)} texts: at most {config.max_prompts} are taken", "invalid_value", field
        )
    return tuple(one if isinstance(one, str) else tuple(one) for one in given)


def _schema(asked: bodies.ResponseFormat | None) -> tuple[dict[str, Any] | None, str]:
    """What the answer must validate against, if anything, and how the request describes it."""
    if asked is None or asked.type == "text":
        if asked and asked.json_schema:
            raise RequestError(
                400, "json_schema needs type=json_schema", "invalid_value", "response_format.json_schema"
            )
        return None, ""
    if asked.type == "json_object":
        if asked.json_schema:
            raise RequestError(
                400, "json_schema needs type=json_schema", "invalid_value", "response_format.json_schema"
            )
        return ANY_OBJECT, ""
    if asked.json_schema is None:
        raise RequestError(
            400, "response_format.json_schema is missing", "missing_required_parameter", "response_format.json_schema"
        )
    return asked.json_schema.schema_ or ANY_OBJECT, asked.json_schema.description or ""


def _tool_choice(chat: bodies.ChatCompletionBody) -> ToolChoice:
    functions = _functions(chat.tools or [])
    asked = chat.tool_choice
    if not functions:
        if asked not in (None, "none", "auto"):
            raise RequestError(400, "tool_choice needs tools", "invalid_value", "tool_choice")
        if chat.parallel_tool_calls is not None:
            raise RequestError(400, "parallel_tool_calls needs tools", "invalid_value", "parallel_tool_calls")
        return ToolChoice()
    parallel = chat.parallel_tool_calls is not False
    if not isinstance(asked, bodies.NamedTool):
        return ToolChoice(asked or "auto", functions, parallel) if asked != "none" else ToolChoice()
    chosen = tuple(function for function in functions if function.name == asked.function.name)
    if not chosen:
        names = ", ".join(function.name for function in functions)
        what = f"tool_choice names {asked.function.name}, the tools are {names}"
        raise RequestError(400, what, "invalid_value", "tool_choice")
    return ToolChoice("named", chosen, parallel)


def _functions(given: Sequence[bodies.Tool]) -> tuple[Function, ...]:
    names = [tool.function.name for tool in given]
    for place, name in enumerate(names):
        if name in names[:place]:
            param = f"tools[{place}].function.name"
            raise RequestError(400, f"{param}: there is another function {name}", "invalid_value", param)
    nothing = {"type": "object", "properties": {}, "additionalProperties": False}
    functions = []
    for place, tool in enumerate(given):
        param, schema = f"tools[{place}].function.parameters", tool.function.parameters or nothing
        if schema.get("type", "object") != "object":
            what = f"{param}.type must be object, got {str(schema['type'])[:MAX_TOLD_CHARS]!r}"
            raise RequestError(400, what, "invalid_value", param)
        functions.append(Function(tool.function.name, {"type": "object", **schema}, param))
    return tuple(functions)


def _as_json(given: Sequence[bodies.Tool] | None) -> tuple[str, ...]:
    """The tools as the model reads them, without what is not said."""
    return tuple(
        tools.plain(
            json.dumps(tool.model_dump(exclude_none=True, exclude={"function": {"strict"}}), ensure_ascii=False)
        )
        for tool in given or ()
    )
