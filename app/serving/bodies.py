"""The bodies of requests: every field that is taken, its type and its bounds. The OpenAPI document is made of these."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

INT64 = 2**63
MAX_LOGIT_BIASES = 1_024
MAX_COMMENT_CHARS = 4_000
TOKEN_PATTERN = r"^(0|[1-9][0-9]{0,8})$"
NAME_PATTERN = r"^[A-Za-z0-9_-]{1,64}$"
CONVERSATION_PATTERN = r"^[A-Za-z0-9._-]{1,128}$"
_TEXT_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
    "additionalProperties": False,
}
_STRING_OR_PARTS = {"anyOf": [{"type": "string"}, {"type": "array", "items": _TEXT_PART}]}
_NOTHING = {"anyOf": [{"type": "null"}, {"type": "array", "maxItems": 0}, {"type": "object", "maxProperties": 0}]}


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


def _up_or_down(rating: int) -> int:
    if rating not in (1, -1):
        raise ValueError("must be 1, -1 or null")
    return rating


def _several(value: Any) -> Any:
    return [value] if isinstance(value, str) else [] if value is None else value


Content = Annotated[str, BeforeValidator(_text), WithJsonSchema(_STRING_OR_PARTS)]
Nothing = Annotated[None, BeforeValidator(_nothing), WithJsonSchema(_NOTHING)]
Token = Annotated[int, Field(ge=0, lt=2**31)]
Tokens = Annotated[list[Token], Field(min_length=1, fail_fast=True)]
Texts = Annotated[list[Annotated[str, Field(min_length=1)]], Field(fail_fast=True)]
TokenLists = Annotated[list[Tokens], Field(fail_fast=True)]
StopString = Annotated[str, Field(min_length=1)]
Stop = Annotated[
    list[StopString],
    Field(max_length=4, fail_fast=True),
    BeforeValidator(_several),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "null"},
                {"type": "string", "minLength": 1},
                {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": 4},
            ]
        }
    ),
]


class Body(BaseModel):
    """A JSON object, closed to fields it does not know; numbers are numbers and not strings."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class CalledFunction(Body):
    """What the model called."""

    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    arguments: str


class ToolCall(Body):
    """A call that an earlier reply made."""

    id: Annotated[str, Field(min_length=1, max_length=128)]
    type: Literal["function"]
    function: CalledFunction


class Message(Body):
    """One message of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: Annotated[str, Field(pattern=NAME_PATTERN)] | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = None
    refusal: Nothing = None
    function_call: Nothing = None
    audio: Nothing = None
    annotations: Nothing = None


class StreamOptions(Body):
    """How an answer is streamed."""

    include_usage: bool | None = None


class FunctionDefinition(Body):
    """A function that the model may call."""

    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """Something that the model may use."""

    type: Literal["function"]
    function: FunctionDefinition


class FunctionName(Body):
    """Which function."""

    name: Annotated[str, Field(pattern=NAME_PATTERN)]


class NamedTool(Body):
    """That the model has to call this one."""

    type: Literal["function"]
    function: FunctionName


class JsonSchema(Body):
    """What an answer must validate against."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Body):
    """What an answer must look like."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class SamplingBody(Body):
    """What chat and plain completions have in common."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=INT64)] | None = None
    n: Annotated[int, Field(ge=1, lt=INT64)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-INT64, lt=INT64)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: (
        Annotated[
            dict[Annotated[str, Field(pattern=TOKEN_PATTERN)], Annotated[float, Field(ge=-100, le=100)]],
            Field(max_length=MAX_LOGIT_BIASES),
        ]
        | None
    ) = None
    stop: Stop = []
    user: Annotated[str, Field(max_length=512)] | None = None


class ChatCompletionBody(SamplingBody):
    """POST /v1/chat/completions"""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=INT64)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    conversation_id: Annotated[str, Field(pattern=CONVERSATION_PATTERN)] | None = None
    metadata: (
        Annotated[
            dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
        ]
        | None
    ) = None


class CompletionBody(SamplingBody):
    """POST /v1/completions"""

    prompt: Annotated[str, Field(min_length=1)] | Tokens | Texts | TokenLists
    best_of: Annotated[int, Field(ge=1, lt=INT64)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None


class EmbeddingBody(Body):
    """POST /v1/embeddings"""

    model: str
    input: Annotated[str, Field(min_length=1)] | Tokens | Texts | TokenLists
    dimensions: Annotated[int, Field(ge=1, lt=INT64)] | None = None
    encoding_format: Literal["float", "base64"] | None = None
    user: Annotated[str, Field(max_length=512)] | None = None


class TokenizeBody(Body):
    """POST /tokenize: either a prompt or messages."""

    model: str
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)] | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True)] | None = None


class DetokenizeBody(Body):
    """POST /detokenize"""

    model: str
    tokens: Tokens


class TakeBody(Body):
    """POST /v1/handovers/{response_id}/take"""

    agent: Annotated[str, Field(pattern=r"^[A-Za-z0-9._@-]{1,64}$")]


class FeedbackBody(Body):
    """POST /v1/feedback"""

    response_id: str
    rating: Annotated[int, AfterValidator(_up_or_down), WithJsonSchema({"enum": [1, -1]})] | None = None
    intent: Annotated[str, Field(max_length=128)] | None = None
    comment: Annotated[str, Field(max_length=MAX_COMMENT_CHARS)] | None = None
