"""Replies of an engine without the application around it."""

from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase

from app.serving.engines import Engine
from app.serving.reply import Reply
from app.serving.schema import Event, Sampling


def submit(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[int],
    sampling: Sampling,
    max_tokens: int,
    deliver: Callable[[Event], None],
    choice: int = 0,
    scope: str = "",
) -> Reply:
    """One reply, on its way."""

    def decode(ids: Sequence[int]) -> str:
        text: str = tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=True)
        return text

    reply = Reply(prompt, sampling, max_tokens, deliver, decode, choice, scope)
    engine.prepare([reply])
    engine.submit([reply])
    return reply
