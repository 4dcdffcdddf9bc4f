"""The messages of a request as the turns that a model reads, with calls and their results as text."""

import json
from collections.abc import Sequence

from app.conversation import Message
from app.errors import RequestError
from app.serving import bodies, tools


def turns(
    messages: Sequence[bodies.Message], wanted: str = "", before: int = 0, system: str = ""
) -> tuple[Message, ...]:
    """The turns, checked for an order that makes sense.

    Args:
        before: How many of the messages stand before those of the request.
        system: The service's own system text; then a request's is refused.
        wanted: How the request describes the JSON it asks for; the last turn ends with it.

    Raises:
        RequestError: 400, naming the message.
    """
    made: list[Message] = []
    open_calls: dict[str, str] = {}
    for place, message in enumerate(messages):
        at = f"messages[{place - before}]"
        if message.role != "tool" and open_calls:
            raise _wrong(at, f"call {next(iter(open_calls))} has no tool message with its result before it")
        _check_fields(message, at)
        if message.role == "tool":
            name = open_calls.pop(message.tool_call_id or "", None)
            if name is None:
                what = f"no reply before it makes a call {message.tool_call_id!r}"
                raise _wrong(f"{at}.tool_call_id", what)
            if message.name not in (None, name):
                raise _wrong(f"{at}.name", f"is {message.name!r}, the call was for {name!r}")
            result = tools.result_text(message.content or "")
            if place and messages[place - 1].role == "tool":
                made[-1] = {"role": "user", "content": f"{made[-1]['content']}\n{result}"}
            else:
                made.append({"role": "user", "content": result})
        elif message.role in ("system", "developer"):
            if place:
                raise RequestError(400, "a system message must be the first message", "invalid_value", f"{at}.role")
            if system:
                raise _wrong(f"{at}.role", "this service has a system text of its own, which stands")
            made.append({"role": "system", "content": tools.plain(message.content or "")})
        else:
            called = message.tool_calls or []
            calls = [_call_text(call, f"{at}.tool_calls[{index}]") for index, call in enumerate(called)]
            open_calls = {call.id: call.function.name for call in called}
            if len(open_calls) < len(calls):
                raise _wrong(f"{at}.tool_calls", "two calls have one id")
            said = [tools.plain(message.content)] if message.content else []
            made.append({"role": message.role, "content": "\n".join([*said, *calls])})
    if open_calls:
        raise _wrong("messages", f"end without the result of call {next(iter(open_calls))}")
    if messages[-1].role == "assistant":
        what = "the last message is the assistant's own: going on with a begun reply is not supported"
        raise RequestError(400, what, "invalid_value", f"messages[{len(messages) - before - 1}].role")
    if system:
        made.insert(0, {"role": "system", "content": tools.plain(system)})
    if wanted:  # not into the system text, which a request must not change
        text = f"The answer is a JSON object: {tools.plain(wanted)}"
        made[-1] = {**made[-1], "content": f"{made[-1]['content']}\n{text}"}
    return tuple(made)


def question(messages: Sequence[bodies.Message]) -> str:
    """What the customer wrote last."""
    return next((message.content or "" for message in reversed(messages) if message.role == "user"), "")


def _check_fields(message: bodies.Message, at: str) -> None:
    if message.content is None and not (message.role == "assistant" and message.tool_calls):
        raise RequestError(400, f"{at}.content is missing", "missing_required_parameter", f"{at}.content")
    if message.tool_calls and message.role != "assistant":
        raise _wrong(f"{at}.tool_calls", "only an assistant's message calls tools")
    if message.role == "tool" and message.tool_call_id is None:
        raise RequestError(400, f"{at}.tool_call_id is missing", "missing_required_parameter", f"{at}.tool_call_id")
    if message.role != "tool":
        if message.tool_call_id is not None:
            raise _wrong(f"{at}.tool_call_id", "only a tool message answers a call")
        if message.name is not None:
            raise _wrong(f"{at}.name", "is not supported for this role")


def _call_text(call: bodies.ToolCall, at: str) -> str:
    try:
        return tools.call_text(call.function.name, json.loads(call.function.arguments))
    except (ValueError, RecursionError):
        raise _wrong(f"{at}.function.arguments", "is not valid JSON") from None


def _wrong(param: str, what: str) -> RequestError:
    return RequestError(400, f"{param}: {what}", "invalid_value", param)
