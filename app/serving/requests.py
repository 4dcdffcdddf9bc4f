"""Request bodies: bytes from a stranger to typed messages, or a 400 that names the parameter.

No field is ever ignored in silence. What this service does not support is accepted only with the value that asks
for nothing (`"n": 1`, `"tools": []`), and refused otherwise.
"""

import json
from collections import Counter
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from app.conversation import Message
from app.errors import RequestError
from app.serving.schema import ChatRequest, FeedbackRequest, Sampling
from app.settings.serving import ServingConfig

MAX_COMMENT_CHARS = 4_000
MAX_LOGIT_BIASES = 1_024
MAX_KEYS = 2 * MAX_LOGIT_BIASES
"""In one JSON object; what is wrong with 80,000 of them takes half a second to say."""
MAX_TOLD_CHARS = 200
"""Of a name that is told back."""
_INT64 = 2**63

# Fields of OpenAI's that are not supported, and the values that ask for nothing beyond null.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none",),
    "parallel_tool_calls": (),
    "functions": ([],),
    "function_call": ("none",),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "service_tier": (),
    "store": (False,),
    "web_search_options": (),
    "prompt_cache_key": (),
    "safety_identifier": (),
}


def _text(content: Any) -> Any:
    """Message content as one string; OpenAI also takes a list of text parts."""
    if not isinstance(content, list):
        return content
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError('must be text, or a list of {"type": "text", "text": ...}; only text is supported')
        if unknown := part.keys() - {"type", "text"}:
            raise ValueError(f"has a part with unknown fields {', '.join(sorted(unknown))}")
    return "".join(part["text"] for part in content)


def _nothing(value: Any) -> None:
    """What clients echo from a reply without meaning anything by it."""
    if value not in (None, [], {}):
        raise ValueError("is not supported")


Nothing = Annotated[None, BeforeValidator(_nothing)]


def _up_or_down(rating: int) -> int:
    if rating not in (1, -1):
        raise ValueError("must be 1, -1 or null")
    return rating


def _stop_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else [] if value is None else value


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class _Message(_Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_text)]
    name: Nothing = None
    refusal: Nothing = None
    tool_calls: Nothing = None
    function_call: Nothing = None
    audio: Nothing = None
    annotations: Nothing = None


class _StreamOptions(_Body):
    include_usage: bool | None = None


class _Chat(_Body):
    model: str
    messages: Annotated[list[_Message], Field(min_length=1)]
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-_INT64, lt=_INT64)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: (
        Annotated[
            dict[Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,8})$")], Annotated[float, Field(ge=-100, le=100)]],
            Field(max_length=MAX_LOGIT_BIASES),
        ]
        | None
    ) = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=4), BeforeValidator(_stop_list)] = []
    user: Annotated[str, Field(max_length=512)] | None = None
    metadata: (
        Annotated[
            dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
        ]
        | None
    ) = None


class _Feedback(_Body):
    response_id: str
    rating: Annotated[int, AfterValidator(_up_or_down)] | None = None
    intent: Annotated[str, Field(max_length=128)] | None = None
    comment: Annotated[str, Field(max_length=MAX_COMMENT_CHARS)] | None = None


def parse_chat(body: bytes, config: ServingConfig) -> ChatRequest:
    """The checked request.

    Raises:
        RequestError: 400, naming the parameter.
    """
    fields = parse_json(body)
    for name, harmless in NEUTRAL.items():
        value = fields.pop(name, None)
        if value is not None and not any(type(value) is type(one) and value == one for one in harmless):
            raise RequestError(400, f"{name} is not supported by this service; leave it out", "unsupported_value", name)
    _check_count(fields.get("messages"), config.max_messages)
    chat = _checked(_Chat, fields)
    return ChatRequest(
        model=chat.model,
        messages=_messages(chat.messages),
        sampling=Sampling(
            max_tokens=_max_tokens(chat),
            temperature=config.default_temperature if chat.temperature is None else chat.temperature,
            top_p=1.0 if chat.top_p is None else chat.top_p,
            seed=chat.seed,
            stop=tuple(chat.stop),
            frequency_penalty=chat.frequency_penalty or 0.0,
            presence_penalty=chat.presence_penalty or 0.0,
            logit_bias=tuple((int(token), bias) for token, bias in (chat.logit_bias or {}).items()),
            top_logprobs=_top_logprobs(chat),
        ),
        stream=bool(chat.stream),
        include_usage=_include_usage(chat),
        user=chat.user,
        metadata=chat.metadata or {},
    )


def parse_feedback(body: bytes) -> FeedbackRequest:
    """The checked feedback.

    Raises:
        RequestError: 400, naming the parameter.
    """
    feedback = _checked(_Feedback, parse_json(body))
    return FeedbackRequest(feedback.response_id, feedback.rating, feedback.intent, feedback.comment)


def parse_json(body: bytes) -> dict[str, Any]:
    """A strict reading of one JSON object: no NaN, no duplicate key, no lone surrogate.

    Raises:
        RequestError: 400.
    """
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_no_constant, object_pairs_hook=_no_duplicates)
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise RequestError(
            400, "the body has half of a surrogate pair, which is no character", "invalid_json"
        ) from None
    except (ValueError, RecursionError) as error:
        what = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise RequestError(400, f"the body is not valid JSON: {what}", "invalid_json") from None
    if not isinstance(value, dict):
        raise RequestError(400, f"the body must be a JSON object, not a {type(value).__name__}", "invalid_json")
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > MAX_KEYS:
        raise ValueError(f"an object has {len(pairs)} keys, at most {MAX_KEYS} are taken")
    found = dict(pairs)
    if len(found) < len(pairs):
        ((name, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the key {name[:MAX_TOLD_CHARS]!r} stands twice in an object")
    return found


def _check_count(messages: Any, most: int) -> None:
    """Before they are looked at: what is wrong with 300,000 of them takes seconds to say."""
    if isinstance(messages, list) and len(messages) > most:
        raise RequestError(
            400, f"{len(messages)} messages are too many: at most {most} are taken", "too_many_messages", "messages"
        )


def _messages(messages: list[_Message]) -> tuple[Message, ...]:
    for place, message in enumerate(messages):
        if message.role in ("system", "developer") and place > 0:
            raise RequestError(
                400, "a system message must be the first message", "invalid_value", f"messages[{place}].role"
            )
    if messages[-1].role == "assistant":
        raise RequestError(
            400,
            "the last message is the assistant's own: going on with a begun reply is not supported",
            "invalid_value",
            f"messages[{len(messages) - 1}].role",
        )
    return tuple(
        {"role": "system" if message.role == "developer" else message.role, "content": message.content}
        for message in messages
    )


def _max_tokens(chat: _Chat) -> int | None:
    old, new = chat.max_tokens, chat.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise RequestError(
            400, f"max_tokens={old} and max_completion_tokens={new} differ: give one", "invalid_value", "max_tokens"
        )
    return old if new is None else new


def _top_logprobs(chat: _Chat) -> int | None:
    if chat.top_logprobs and not chat.logprobs:
        raise RequestError(
            400, f"top_logprobs={chat.top_logprobs} needs logprobs=true", "invalid_value", "top_logprobs"
        )
    return chat.top_logprobs or 0 if chat.logprobs else None


def _include_usage(chat: _Chat) -> bool:
    if chat.stream_options is None:
        return False
    if not chat.stream:
        raise RequestError(400, "stream_options needs stream=true", "invalid_value", "stream_options")
    return bool(chat.stream_options.include_usage)


BodyType = TypeVar("BodyType", bound=_Body)


def _checked(kind: type[BodyType], fields: dict[str, Any]) -> BodyType:
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise _refusal(error.errors(include_url=False, include_context=False, include_input=False)[0]) from None


def _refusal(problem: ErrorDetails) -> RequestError:
    """The first problem in OpenAI's terms, such as `messages[0].content` is missing."""
    param = ""
    for part in problem["loc"]:
        param += f"[{part}]" if isinstance(part, int) else f".{part}" if param else part
    param = param[:MAX_TOLD_CHARS]
    if problem["type"] == "extra_forbidden":
        return RequestError(400, f"{param} is not a known field", "unknown_parameter", param)
    if problem["type"] == "missing":
        return RequestError(400, f"{param} is missing", "missing_required_parameter", param)
    message = problem["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    return RequestError(400, f"{param}: {message}", "invalid_value", param)
