"""Bytes from a stranger to a checked body, or a 400 that names the parameter.

No field is ever ignored in silence. What this service does not support is accepted only with the value that asks
for nothing (`"store": false`, `"functions": []`), and refused otherwise.
"""

import difflib
import json
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from app.errors import RequestError
from app.serving import bodies
from app.settings.serving import ServingConfig

MAX_KEYS = 2 * bodies.MAX_LOGIT_BIASES
"""In one JSON object; what is wrong with 80,000 of them takes half a second to say."""
MAX_TOLD_CHARS = 200
"""Of a name that is told back."""
MAX_ITEMS = 65_536
"""In a list, where no other limit holds: tokens of a prompt."""

# Fields of OpenAI's that are not supported, and the values that ask for nothing beyond null.
NEUTRAL: dict[str, tuple[Any, ...]] = {
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
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
    "safety_identifier": (),
    "moderation": (),
    "suffix": (),
}
_TOO_FEW = re.compile(r"\w+ should have (at (?:least|most) \d+) items? after validation, not (\d+)")


def _check_counts(fields: dict[str, Any], config: ServingConfig | None) -> None:
    """Before they are looked at: what is wrong with 300,000 of them takes seconds to say."""
    most = {"messages": config.max_messages, "tools": config.max_tools} if config else {}
    for name, value in fields.items():
        allowed = most.get(name, MAX_ITEMS)
        if isinstance(value, list) and len(value) > allowed:
            code = "too_many_messages" if name == "messages" else "invalid_value"
            raise RequestError(400, f"{len(value)} {name} are too many: at most {allowed} are taken", code, name)


BodyType = TypeVar("BodyType", bound=bodies.Body)


def parsed(kind: type[BodyType], body: bytes, config: ServingConfig | None = None) -> BodyType:
    """The checked body.

    Args:
        config: Whose limits hold for messages and tools, where it may have some.

    Raises:
        RequestError: 400, naming the parameter.
    """
    fields = parse_json(body)
    _check_counts(fields, config)
    for name, harmless in NEUTRAL.items():
        if name not in kind.model_fields:
            value = fields.pop(name, None)
            if value is not None and not any(type(value) is type(one) and value == one for one in harmless):
                raise RequestError(
                    400, f"{name} is not supported by this service; leave it out", "unsupported_value", name
                )
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        raise _refusal(first, list(kind.model_fields)) from None


def _refusal(problem: ErrorDetails, known: Sequence[str]) -> RequestError:
    """The first problem in OpenAI's terms, such as `messages[0].content` is missing."""
    param = ""
    for part in problem["loc"]:
        if isinstance(part, int):
            param += f"[{part}]"
        elif part.isidentifier() or not param:
            param += f".{part}" if param else part
        elif param == "logit_bias":
            param += f".{part}"
        else:
            break  # the rest tells apart the types that a field may have
    param = param[:MAX_TOLD_CHARS]
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(param, known, n=1, cutoff=0.7)
        hint = f"; did you mean {near[0]}?" if near else ""
        return RequestError(400, f"{param} is not a known field{hint}", "unknown_parameter", param)
    if problem["type"] == "missing":
        return RequestError(400, f"{param} is missing", "missing_required_parameter", param)
    message = problem["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    message = _TOO_FEW.sub(r"must have \1, has \2", message)
    return RequestError(400, f"{param}: {message}", "invalid_value", param)


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
