"""Answers in OpenAI's shapes: completions, chunks, usage, errors. Plain dicts, checked in tests by its client."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from app.serving.schema import Conclusion, Finished, Intent, TokenLogprob

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


@dataclass(frozen=True)
class Reply:
    """What every part of one answer carries."""

    response_id: str
    created: int
    model: str
    variant: str

    def completion(
        self,
        text: str,
        prompt_tokens: int,
        finished: Finished,
        conclusion: Conclusion,
        intent: Intent | None,
        logprobs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The whole answer as one object."""
        return {
            **self._frame("chat.completion"),
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": text, "refusal": None},
                    "logprobs": logprobs,
                    "finish_reason": finished.finish_reason,
                }
            ],
            "usage": usage(prompt_tokens, finished.completion_tokens),
            "rayloop": self.ours(conclusion, intent),
        }

    def chunk(
        self,
        delta: dict[str, str],
        finish_reason: str | None = None,
        logprobs: dict[str, Any] | None = None,
        **more: Any,
    ) -> dict[str, Any]:
        """A part of a streamed answer."""
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return {**self._frame("chat.completion.chunk"), "choices": [choice], **more}

    def usage_chunk(self, prompt_tokens: int, completion_tokens: int, **more: Any) -> dict[str, Any]:
        """The last part of a streamed answer when the client asked for usage."""
        frame = self._frame("chat.completion.chunk")
        return {**frame, "choices": [], "usage": usage(prompt_tokens, completion_tokens), **more}

    def ours(self, conclusion: Conclusion, intent: Intent | None) -> dict[str, Any]:
        """What we tell beyond OpenAI's fields."""
        return {
            "handover": conclusion.handover is not None,
            "reason": conclusion.handover,
            "intent": intent.label if intent else None,
            "variant": self.variant,
        }

    def _frame(self, kind: str) -> dict[str, Any]:
        return {"id": self.response_id, "object": kind, "created": self.created, "model": self.model}


def logprobs(told: Iterable[TokenLogprob]) -> dict[str, Any]:
    """What the model thought of its tokens."""
    content = [{**_logprob(each), "top_logprobs": [_logprob(other) for other in each.top]} for each in told]
    return {"content": content, "refusal": None}


def _logprob(one: TokenLogprob) -> dict[str, Any]:
    token = one.text.decode("utf-8", errors="replace")
    return {"token": token, "logprob": max(one.logprob, LEAST_LOGPROB), "bytes": [*one.text]}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    """Token counts."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def error(status: int, message: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """The body of every status that is not a success."""
    kind = ERROR_TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def event(value: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def model_card(model_id: str, created: int, variant: str, version: str) -> dict[str, Any]:
    """One entry of /v1/models."""
    return {
        "id": model_id,
        "object": "model",
        "created": created,
        "owned_by": "rayloop",
        "rayloop": {"variant": variant, "version": version},
    }
