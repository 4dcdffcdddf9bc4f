"""Functions that a model may call, in the words it reads and writes them in.

The format is that of Hermes and Qwen: the model writes

    <tool_call>
    {"name": "order_status", "arguments": {"order": "4512"}}
    </tool_call>

and reads results between <tool_response> and </tool_response> in the user's turn.
Source: Nous Research, Hermes Function Calling.
"""

import json
import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from app.conversation import Message

OPEN, CLOSE = "<tool_call>", "</tool_call>"
RESULT_OPEN, RESULT_CLOSE = "<tool_response>", "</tool_response>"
MAX_CALLS = 16
"""In one reply."""
_MARKER = re.compile(r"<(?=/?tool_(?:call|response)>)")
_HEAD = re.compile(r'\s*\{"name": "([^"]+)", "arguments": ')


@dataclass(frozen=True)
class CallBegun:
    """The model calls a function."""

    index: int
    """Among the reply's calls."""
    call_id: str
    name: str


@dataclass(frozen=True)
class CallArguments:
    """More of a call's arguments, which together are one JSON object."""

    index: int
    text: str


Piece = str | CallBegun | CallArguments
"""A part of a reply; a string is text for the customer."""


def plain(text: str) -> str:
    """Text that somebody else wrote: what looks like a call or a result in it is spelled apart."""
    return _MARKER.sub("< ", text)


def call_text(name: str, arguments: Any) -> str:
    """A call as the model writes it."""
    told = _MARKER.sub(r"\\u003c", json.dumps(arguments, ensure_ascii=False))
    return f"{OPEN}\n{_call_head(name)}{told}}}\n{CLOSE}"


def result_text(content: str) -> str:
    """A result as the model reads it."""
    return f"{RESULT_OPEN}\n{plain(content)}\n{RESULT_CLOSE}"


def shown(messages: Sequence[Message], tools: Sequence[str]) -> list[Message]:
    """The messages with a system text that tells of the tools, for a model whose chat template does not.

    Args:
        tools: Each as JSON in OpenAI's form.
    """
    told = " ".join(
        [
            "You may call these functions:",
            *tools,
            f'To call one, write {OPEN} {{"name": <its name>, "arguments": <JSON object>}} {CLOSE}',
        ]
    )
    if messages and messages[0]["role"] == "system":
        return [{"role": "system", "content": f"{messages[0]['content']} {told}"}, *messages[1:]]
    return [{"role": "system", "content": told}, *messages]


def call_rules(functions: Sequence[tuple[str, Any]]) -> str:
    """The rules `first_call` and `call` of a grammar, and the terminal WS.

    `first_call` is what follows the opening marker of a call.

    Args:
        functions: Name and JSON schema of the arguments of each.
    """
    heads = [json.dumps(_call_head(name)) for name, _ in functions]
    return "\n".join(
        [
            f'call: "{OPEN}" first_call',
            "first_call: WS (" + " | ".join(f"f{place}" for place in range(len(functions))) + f') WS "{CLOSE}"',
            *(f'f{place}: {head} a{place} "}}"' for place, head in enumerate(heads)),
            *(f"a{place}: %json {json.dumps(schema)}" for place, (_, schema) in enumerate(functions)),
            r"WS: /[ \n]?/",
        ]
    )


def _call_head(name: str) -> str:
    return f'{{"name": {json.dumps(name)}, "arguments": '


class CallReader:
    """Takes a reply apart while it is written. It must follow a grammar with `call_rules`."""

    def __init__(self) -> None:
        self.calls = 0
        self._state: Literal["text", "head", "arguments", "tail"] = "text"
        self._held = ""
        self._depth, self._in_string, self._escaped = 0, False, False

    @property
    def is_open(self) -> bool:
        """Whether a call has begun and is not complete."""
        return self._state != "text"

    def push(self, text: str) -> list[Piece]:
        """The parts that are certain now."""
        self._held += text
        return [piece for piece in self._pieces() if piece not in ("", CallArguments(self.calls - 1, ""))]

    def finish(self) -> list[Piece]:
        """What was held back when the reply ended."""
        held, self._held = self._held, ""
        return [held] if held and self._state == "text" else []

    def _pieces(self) -> Iterator[Piece]:
        while True:
            if self._state == "text":
                before, marker, after = self._held.partition(OPEN)
                if not marker:
                    yield self._certain_text()
                    return
                yield before.rstrip()
                self._state, self._held = "head", after
            elif self._state == "head":
                head = _HEAD.match(self._held)
                if not head:
                    return
                self.calls += 1
                yield CallBegun(self.calls - 1, f"call_{secrets.token_hex(12)}", json.loads(f'"{head[1]}"'))
                self._state, self._held = "arguments", self._held[head.end() :]
            elif self._state == "arguments":
                end = self._arguments_end()
                yield CallArguments(self.calls - 1, self._held[:end])
                if end is None:
                    self._held = ""
                    return
                self._state, self._held = "tail", self._held[end:]
            else:
                _, marker, after = self._held.partition(CLOSE)
                if not marker:
                    return
                self._state, self._held = "text", after.lstrip()

    def _certain_text(self) -> str:
        """Without what may yet turn out to begin a call, and the white space before it."""
        end = len(self._held)
        for length in range(min(end, len(OPEN) - 1), 0, -1):
            if self._held.endswith(OPEN[:length]):
                end -= length
                break
        certain = self._held[:end].rstrip()
        if self.calls and not certain:  # between two calls
            return ""
        self._held = self._held[len(certain) :]
        return certain

    def _arguments_end(self) -> int | None:
        """Where in what is held the arguments end, if they do."""
        for place, character in enumerate(self._held):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif character == "\\":
                    self._escaped = True
                elif character == '"':
                    self._in_string = False
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if not self._depth:
                    return place + 1
        return None
