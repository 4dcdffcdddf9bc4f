"""What a reply must look like: `response_format` and `tools` as one grammar, checked before any work is done."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from llguidance import LLMatcher

from app.errors import RequestError
from app.serving import tools


class GrammarFailed(Exception):
    """A grammar that replies cannot be held to."""


MAX_SCHEMA_BYTES, MAX_SCHEMAS_BYTES = 16_384, 65_536
"""Of one, and of all that a request has: one of the largest may take half a second to be read."""
ANY_OBJECT = {"type": "object"}


@dataclass(frozen=True)
class Function:
    """A function that the model may call."""

    name: str
    schema: Mapping[str, Any]
    """JSON schema of its arguments, an object."""
    param: str = "tools"
    """Where the request has it."""


@dataclass(frozen=True)
class ToolChoice:
    """Whether, and which, functions are called."""

    kind: Literal["none", "auto", "required", "named"] = "none"
    functions: tuple[Function, ...] = ()
    """Those that may be called."""
    parallel: bool = True
    """Whether one reply may have several calls."""


def grammar(schema: Mapping[str, Any] | None, choice: ToolChoice) -> str:
    """The grammar of a reply; empty where anything goes.

    Args:
        schema: That the reply must validate against as JSON; none: it is text.

    Raises:
        RequestError: 400, a schema is broken or uses what llguidance does not hold replies to.
    """
    if schema is not None:
        _check_schema(schema, "response_format.json_schema.schema")
    if (size := sum(len(json.dumps(function.schema)) for function in choice.functions)) > MAX_SCHEMAS_BYTES:
        what = f"the schemas of tools have {size} bytes: together they may have {MAX_SCHEMAS_BYTES}"
        raise RequestError(400, what, "invalid_json_schema", "tools")
    for function in choice.functions:
        _check_schema(function.schema, function.param)
    if choice.kind == "none":
        return "" if schema is None else _lark(f"start: %json {_json(schema)}")
    more = f"(WS call){{0,{tools.MAX_CALLS - 1}}}" if choice.parallel and choice.kind != "named" else ""
    rules = tools.call_rules([(function.name, _tight(function.schema)) for function in choice.functions])
    if choice.kind != "auto":
        return _lark(f"start: call {more}\n{rules}")
    if schema is not None:
        return _lark(f"start: json | call {more}\njson: %json {_json(schema)}\n{rules}")
    # A reply is text without a call in it, or text up to the first call and then calls only.
    marker = tools.OPEN
    text = f"TEXT: /(.|\\n)*/ & ~/(.|\\n)*{marker}(.|\\n)*/"
    return _lark(f"start: TEXT | before first_call {more}\nbefore[lazy]: /(.|\\n)*{marker}/\n{text}\n{rules}")


def _lark(rules: str) -> str:
    return f"%llguidance {{}}\n{rules}\n"


def _tight(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A schema whose JSON has no white space but after commas and colons: small models would go on with it for ever."""
    layout = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    return {**schema, "x-guidance": layout}


def _json(schema: Mapping[str, Any]) -> str:
    return json.dumps(_tight(schema))


def _check_schema(schema: Mapping[str, Any], param: str) -> None:
    if (size := len(json.dumps(schema))) > MAX_SCHEMA_BYTES:
        what = f"{param} has {size} bytes: a schema may have {MAX_SCHEMA_BYTES}"
        raise RequestError(400, what, "invalid_json_schema", param)
    is_wrong, messages = LLMatcher.validate_grammar_with_warnings(_lark(f"start: %json {_json(schema)}"))
    if is_wrong or messages:
        what = (messages[0] if messages else "it is no JSON schema").strip().splitlines()[0]
        raise RequestError(400, f"{param} cannot be followed: {what[:300]}", "invalid_json_schema", param)
