"""Answers in OpenAI's shapes: completions, chunks, usage, errors. Plain dicts, checked in tests by its client."""

import base64
import json
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from app.serving.schema import Embedded, TokenLogprob
from app.serving.tools import CallArguments, CallBegun, Piece

ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
LEAST_LOGPROB = -9_999.0
"""What OpenAI writes for a token that is as good as impossible; JSON has no infinity."""
DONE = b"data: [DONE]\n\n"
UNEXPECTED = "something went wrong here; the request id finds it in our log"


@dataclass
class Choice:
    """One of an answer's replies, as the client reads it."""

    text: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str = ""

    @property
    def message(self) -> dict[str, Any]:
        """The reply as a message of a conversation."""
        content = self.text or None if self.calls else self.text
        return {"role": "assistant", "content": content, **({"tool_calls": self.calls} if self.calls else {})}

    def add(self, piece: Piece) -> None:
        """Take the next part of the reply."""
        if isinstance(piece, str):
            self.text += piece
        elif isinstance(piece, CallBegun):
            self.calls.append(_call(piece))
        else:
            self.calls[piece.index]["function"]["arguments"] += piece.text


@dataclass(frozen=True)
class Frame:
    """What every part of one answer carries."""

    response_id: str
    created: int
    model: str
    variant: str
    tells_logprobs: bool
    tells_usage: bool
    """Whether a stream ends with the usage."""

    def _frame(self, kind: str) -> dict[str, Any]:
        return {"id": self.response_id, "object": kind, "created": self.created, "model": self.model}

    def _chunk(self, kind: str, choice: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
        usage_later = {"usage": None} if self.tells_usage else {}
        return {**self._frame(kind), "choices": [choice], **usage_later, **more}


class ChatFrame(Frame):
    """An answer of /v1/chat/completions."""

    def whole(self, choices: Sequence[Choice], usage: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
        """The answer as one object."""
        return {
            **self._frame("chat.completion"),
            "choices": [
                {
                    "index": index,
                    "message": {**choice.message, "refusal": None},
                    "logprobs": _chat_logprobs(choice.logprobs) if self.tells_logprobs else None,
                    "finish_reason": choice.finish_reason,
                }
                for index, choice in enumerate(choices)
            ],
            "usage": usage,
            "rayloop": ours,
        }

    def begin(self, index: int) -> dict[str, Any]:
        """The first chunk of a choice."""
        return self._part(index, {"role": "assistant", "content": ""})

    def chunks(self, index: int, pieces: Iterable[Piece], logprobs: Sequence[TokenLogprob]) -> Iterable[dict[str, Any]]:
        """The next ones. Log-probabilities go with the first of them."""
        told = _chat_logprobs(logprobs) if self.tells_logprobs and logprobs else None
        for piece in pieces:
            yield self._part(index, _delta(piece), told)
            told = None
        if told:
            yield self._part(index, {}, told)

    def end(self, index: int, finish_reason: str, ours: dict[str, Any]) -> dict[str, Any]:
        """The last chunk of a choice."""
        return self._part(index, {}, None, finish_reason, rayloop=ours)

    def usage(self, usage: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
        """The chunk after the last choice's last one."""
        return {**self._frame("chat.completion.chunk"), "choices": [], "usage": usage, "rayloop": ours}

    def _part(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: dict[str, Any] | None = None,
        finish_reason: str | None = None,
        **more: Any,
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return self._chunk("chat.completion.chunk", choice, more)


class CompletionFrame(Frame):
    """An answer of /v1/completions."""

    def whole(self, choices: Sequence[Choice], usage: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
        """The answer as one object."""
        parts = [
            self._choice(index, choice.text, choice.logprobs, choice.finish_reason)
            for index, choice in enumerate(choices)
        ]
        return {**self._frame("text_completion"), "choices": parts, "usage": usage, "rayloop": ours}

    def begin(self, index: int) -> None:
        """Plain completions begin with their text."""

    def chunks(self, index: int, pieces: Iterable[Piece], logprobs: Sequence[TokenLogprob]) -> Iterable[dict[str, Any]]:
        """The next ones."""
        text = "".join(piece for piece in pieces if isinstance(piece, str))
        if text or logprobs:
            yield self._chunk("text_completion", self._choice(index, text, logprobs, None), {})

    def end(self, index: int, finish_reason: str, ours: dict[str, Any]) -> dict[str, Any]:
        """The last chunk of a choice."""
        return self._chunk("text_completion", self._choice(index, "", (), finish_reason), {"rayloop": ours})

    def usage(self, usage: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
        """The chunk after the last choice's last one."""
        return {**self._frame("text_completion"), "choices": [], "usage": usage, "rayloop": ours}

    def _choice(
        self, index: int, text: str, logprobs: Sequence[TokenLogprob], finish_reason: str | None
    ) -> dict[str, Any]:
        told = _completion_logprobs(logprobs) if self.tells_logprobs and (logprobs or finish_reason is None) else None
        return {"index": index, "text": text, "logprobs": told, "finish_reason": finish_reason}


FRAMES: dict[Literal["chat", "completions"], type[ChatFrame] | type[CompletionFrame]] = {
    "chat": ChatFrame,
    "completions": CompletionFrame,
}


def _call(call: CallBegun) -> dict[str, Any]:
    return {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": ""}}


def _delta(piece: Piece) -> dict[str, Any]:
    if isinstance(piece, str):
        return {"content": piece}
    if isinstance(piece, CallArguments):
        return {"tool_calls": [{"index": piece.index, "function": {"arguments": piece.text}}]}
    return {"tool_calls": [{"index": piece.index, **_call(piece)}]}


def _chat_logprobs(told: Iterable[TokenLogprob]) -> dict[str, Any]:
    """What the model thought of its tokens."""
    content = [{**_logprob(each), "top_logprobs": [_logprob(other) for other in each.top]} for each in told]
    return {"content": content, "refusal": None}


def _logprob(one: TokenLogprob) -> dict[str, Any]:
    return {"token": _token(one), "logprob": max(one.logprob, LEAST_LOGPROB), "bytes": [*one.text]}


def _token(one: TokenLogprob) -> str:
    return one.text.decode("utf-8", errors="replace")


def _completion_logprobs(told: Sequence[TokenLogprob]) -> dict[str, Any]:
    """The same in the older shape; offsets count characters from the begin of this text."""
    offsets, read = [], b""
    for one in told:
        offsets.append(len(read.decode("utf-8", errors="ignore")))
        read += one.text
    return {
        "tokens": [_token(one) for one in told],
        "token_logprobs": [max(one.logprob, LEAST_LOGPROB) for one in told],
        "top_logprobs": [{_token(other): max(other.logprob, LEAST_LOGPROB) for other in one.top} for one in told],
        "text_offset": offsets,
    }


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int = 0) -> dict[str, Any]:
    """Token counts."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def embeddings(embedded: Embedded, model: str, is_base64: bool) -> dict[str, Any]:
    """The vectors as numbers, or as their little-endian float32 bytes."""
    coded: Sequence[Any] = embedded.vectors
    if is_base64:
        packed = (struct.pack(f"<{len(vector)}f", *vector) for vector in embedded.vectors)
        coded = [base64.b64encode(one).decode() for one in packed]
    return {
        "object": "list",
        "data": [{"object": "embedding", "index": index, "embedding": one} for index, one in enumerate(coded)],
        "model": model,
        "usage": {"prompt_tokens": embedded.prompt_tokens, "total_tokens": embedded.prompt_tokens},
    }


def error(status: int, message: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """The body of every status that is not a success."""
    kind = ERROR_TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def event(value: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def model_card(model_id: str, created: int, variant: str, version: str, adapter_of: str | None) -> dict[str, Any]:
    """One entry of /v1/models."""
    return {
        "id": model_id,
        "object": "model",
        "created": created,
        "owned_by": "rayloop",
        "rayloop": {"variant": variant, "version": version, "adapter_of": adapter_of},
    }
