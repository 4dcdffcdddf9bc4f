"""The OpenAPI document: made of the types that requests are checked with, and of OpenAI's own answers."""

from functools import cache
from typing import Any

from pydantic import BaseModel, ConfigDict
from pydantic.json_schema import models_json_schema

from app.serving import bodies
from app.serving.parsing import NEUTRAL

VERSION = "1"
_REF = "#/components/schemas/"
_ERRORS = {
    400: "The request is wrong; `param` names the field.",
    401: "The API key is missing or not known.",
    403: "The API key does not allow this.",
    404: "There is no such thing.",
    405: "This path does not take the method.",
    408: "The body came too slowly.",
    409: "Somebody else was faster.",
    413: "The body is too large.",
    429: "Too many requests; `Retry-After` says when to try again.",
    500: "Something went wrong here.",
    503: "A part of the service is not there at the moment; try again.",
}


class Error(BaseModel):
    """What went wrong."""

    model_config = ConfigDict(extra="forbid")

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every answer that is not a success."""

    model_config = ConfigDict(extra="forbid")

    error: Error


class Vector(BaseModel):
    """One text's vector: numbers, or with encoding_format=base64 their little-endian float32 bytes."""

    object: str
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    """Token counts."""

    prompt_tokens: int
    total_tokens: int


class Embeddings(BaseModel):
    """The vectors in the order of the texts."""

    object: str
    data: list[Vector]
    model: str
    usage: EmbeddingUsage


class Tokenized(BaseModel):
    """A text as the model reads it."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str]


class Detokenized(BaseModel):
    """Tokens as text."""

    prompt: str


class FeedbackTaken(BaseModel):
    """The feedback is on disk."""

    object: str
    response_id: str
    received_at: str


class ModelCard(BaseModel):
    """A name that `model` may be."""

    id: str
    object: str
    created: int
    owned_by: str


class ModelList(BaseModel):
    """All of them."""

    object: str
    data: list[ModelCard]


@cache
def document(models: tuple[str, ...]) -> dict[str, Any]:
    """The document, as JSON has it.

    Args:
        models: Names that `model` may be.
    """
    from openai.types import Completion  # half a second, and only who asks for the document waits for it
    from openai.types.chat import ChatCompletion

    taken: list[type[BaseModel]] = [
        bodies.ChatCompletionBody, bodies.CompletionBody, bodies.EmbeddingBody, bodies.TokenizeBody,
        bodies.DetokenizeBody, bodies.FeedbackBody, bodies.TakeBody,
    ]  # fmt: skip
    given: list[type[BaseModel]] = [
        ErrorBody, Embeddings, Tokenized, Detokenized, FeedbackTaken, ModelCard, ModelList,
    ]  # fmt: skip
    _, schemas = models_json_schema([(kind, "validation") for kind in (*taken, *given)], ref_template=_REF + "{model}")
    for body in taken:
        for name, harmless in NEUTRAL.items():
            if name not in body.model_fields:
                described = {"enum": [None, *harmless], "description": "Not supported; may ask for nothing."}
                schemas["$defs"][body.__name__]["properties"][name] = described
        if "model" in body.model_fields:
            schemas["$defs"][body.__name__]["properties"]["model"] = {"enum": [*models]}
    answers: dict[str, Any] = {}
    for kind in (ChatCompletion, Completion):
        schema = kind.model_json_schema(ref_template=_REF + kind.__name__ + "_{model}")
        for name, part in schema.pop("$defs", {}).items():
            answers[f"{kind.__name__}_{name}"] = part
        answers[kind.__name__] = schema
    return {
        "openapi": "3.1.0",
        "info": {"title": "Rayloop", "version": VERSION, "description": "A chatbot behind OpenAI's interface."},
        "security": [{"key": []}],
        "paths": {
            "/v1/chat/completions": {
                "post": _operation("The next message of a conversation", "ChatCompletion", "ChatCompletionBody", True)
            },
            "/v1/completions": {"post": _operation("A text gone on with", "Completion", "CompletionBody", True)},
            "/v1/embeddings": {"post": _operation("Texts as vectors", "Embeddings", "EmbeddingBody")},
            "/v1/models": {"get": _operation("The names that `model` may be", "ModelList")},
            "/v1/models/{model}": {"get": _operation("One of them", "ModelCard", path="model")},
            "/v1/feedback": {"post": _operation("Judge an answer", "FeedbackTaken", "FeedbackBody")},
            "/v1/handovers": {"get": _operation("Answers that wait for a person", None, query="limit")},
            "/v1/handovers/{response_id}/take": {
                "post": _operation("Take one over", None, "TakeBody", path="response_id")
            },
            "/v1/why/{response_id}": {"get": _operation("The chain behind an answer", None, path="response_id")},
            "/tokenize": {"post": _operation("A text's or conversation's tokens", "Tokenized", "TokenizeBody")},
            "/detokenize": {"post": _operation("The text of tokens", "Detokenized", "DetokenizeBody")},
            "/health": {"get": _operation("200 while a replica lives", None, public=True)},
            "/ready": {"get": _operation("200 once every model is loaded, 503 before", None, public=True)},
        },
        "components": {
            "schemas": {**schemas.get("$defs", {}), **answers},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(
    summary: str,
    answer: str | None,
    body: str | None = None,
    streams: bool = False,
    path: str = "",
    public: bool = False,
    query: str = "",
) -> dict[str, Any]:
    schema = {"$ref": _REF + answer} if answer else {"type": "object"}
    content: dict[str, Any] = {"application/json": {"schema": schema}}
    if streams:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    refused = {"content": {"application/json": {"schema": {"$ref": _REF + "ErrorBody"}}}}
    operation: dict[str, Any] = {
        "summary": summary,
        "responses": {
            "200": {"description": "It is done.", "content": content},
            **{str(status): {"description": what, **refused} for status, what in _ERRORS.items()},
        },
    }
    if body:
        required = {"required": True, "content": {"application/json": {"schema": {"$ref": _REF + body}}}}
        operation["requestBody"] = required
    if path:
        operation["parameters"] = [{"name": path, "in": "path", "required": True, "schema": {"type": "string"}}]
    if query:
        number = {"type": "integer", "minimum": 1, "maximum": 100}
        operation["parameters"] = [{"name": query, "in": "query", "schema": number}]
    if public:
        operation["security"] = []
    return operation
