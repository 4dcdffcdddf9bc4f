"""Replies of an engine without the application around it."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from app.serving.engines import Engine
from app.serving.reply import Reply
from app.serving.schema import Delta, Event, Finished, Refused, Sampling

GREEDY = Sampling(max_tokens=None, temperature=0.0, top_p=1.0, seed=None, stop=())


@dataclass
class Client:
    """Collects what the engine delivers."""

    events: list[Event] = field(default_factory=list)
    done: threading.Event = field(default_factory=threading.Event)
    begun: threading.Event = field(default_factory=threading.Event)

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        self.begun.set()
        if isinstance(event, Finished | Refused):
            self.done.set()

    @property
    def text(self) -> str:
        assert self.done.wait(60)
        return "".join(event.text for event in self.events if isinstance(event, Delta))

    @property
    def finished(self) -> Finished:
        assert self.done.wait(60)
        assert isinstance(self.events[-1], Finished)
        return self.events[-1]


def submit(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[int],
    sampling: Sampling,
    max_tokens: int,
    deliver: Callable[[Event], None],
    choice: int = 0,
    scope: str = "",
    adapter: str = "",
) -> Reply:
    """One reply, on its way."""

    def decode(ids: Sequence[int]) -> str:
        text: str = tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=True)
        return text

    reply = Reply(prompt, sampling, max_tokens, deliver, decode, choice, scope, adapter)
    engine.prepare([reply])
    engine.submit([reply])
    return reply
