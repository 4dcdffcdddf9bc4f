"""What a language model's engine does, and which there are.

    transformers   continuous batching in this process, on a CPU or a GPU: engine.py
    vllm           vLLM, for models that fill a GPU: vllm_engine.py (an extra)

Torch and transformers are imported where an engine is made, so that whoever only names one starts without them.
"""

from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from app.serving.reply import Reply


class EngineFull(Exception):
    """As many replies wait as may, or the engine has ended."""


class Unsupported(Exception):
    """The engine cannot do what it was asked for; the message tells the customer."""


class Engine(Protocol):
    """Writes many replies at once."""

    @property
    def failure(self) -> Exception | None:
        """What ended it, or none: the replica's health check reports it and Serve starts another replica."""

    @property
    def slots_in_use(self) -> int:
        """Replies being written now."""

    @property
    def parameters(self) -> int:
        """Weights of the model."""

    def prepare(self, replies: Sequence["Reply"]) -> None:
        """Do beforehand what may take some milliseconds; safe to call from any thread.

        Raises:
            GrammarFailed: A reply's grammar is broken or too large.
        """

    def submit(self, replies: Sequence["Reply"]) -> None:
        """Queue all of them; what is written goes to their `deliver`.

        Raises:
            EngineFull: So many cannot wait; none is queued.
        """

    def cancel(self, replies: Sequence["Reply"]) -> None:
        """Free what they hold; nothing more is delivered to them."""

    def embed(self, prompts: Sequence[Sequence[int]], adapter: str = "") -> list[Future[list[float]]]:
        """Of each prompt, the mean of its tokens' last hidden states, of length 1, when there is time for it.

        Raises:
            EngineFull: The engine has ended.
            Unsupported: Not with this engine.
        """

    def stop(self) -> None:
        """End it."""
