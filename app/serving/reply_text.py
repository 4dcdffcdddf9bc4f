"""Tokens to text while a reply is being written: whole characters only, and never a stop string."""

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"
"""What a decoder puts for bytes that are no character, or not one yet."""


class ReplyText:
    """The text of one reply. Text that may yet turn out to begin a stop string is held back.

    Args:
        decode: Token ids to text.
        stop: Strings that end the reply and are not part of it.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stop = tuple(stop)
        self._ids: list[int] = []
        # Text of ids[context:read] is out; decoding from `context`, a little earlier, keeps spaces between words.
        self._context = self._read = 0
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Take one token; returns the text that is certain now."""
        self._ids.append(token)
        before = self._decode(self._ids[self._context : self._read])
        after = self._decode(self._ids[self._context :])
        if after.endswith(REPLACEMENT) and len(self._ids) - self._read < 8:
            return ""  # a character of several tokens; none has more than four bytes, so this ends
        self._context, self._read = self._read, len(self._ids)
        return self._release(after[len(before) :])

    def finish(self) -> str:
        """What was held back when the reply ended."""
        if self.stopped:
            return ""
        before = self._decode(self._ids[self._context : self._read])
        rest = self._release(self._decode(self._ids[self._context :])[len(before) :])
        held, self._held = self._held, ""
        return rest + held

    def _release(self, new: str) -> str:
        text = self._held + new
        found = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
