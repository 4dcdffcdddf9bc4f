"""What each API key has spent in the last minute, exactly.

A sliding window: in no sixty seconds, wherever they begin, is more let in than the limit. A bucket that begins full
and fills up meanwhile would let in twice the limit in its first minute. OpenAI's headers say of a limit how much is
left of it and when it is whole again (`x-ratelimit-reset-*`: "the time until the rate limit resets to its initial
state"): here that is when the last thing that was let in is a minute old.
"""

import math
import secrets
from collections.abc import Callable
from dataclasses import dataclass

WINDOW_S = 60.0
SLOTS_PER_S = 20
"""What comes in within a twentieth of a second is one number, and leaves the window together, at the earliest when the
last of it is a minute old. So an account is 1,200 numbers at most, however much comes."""


@dataclass(frozen=True)
class Limits:
    """How much is let in a minute; none: as much as comes."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None


@dataclass(frozen=True)
class Standing:
    """How one limit stands."""

    limit: int
    remaining: int
    reset_s: float
    """Until all of it is free again."""


@dataclass(frozen=True)
class Reservation:
    """Tokens that were let in, to be settled when it is known how many it were."""

    account: str
    tokens: int
    slot: int
    ledger: str
    """Which ledger knows of it; one that was started anew does not."""


@dataclass(frozen=True)
class Granted:
    """A request may go on."""

    requests: Standing | None
    tokens: Standing | None
    reservation: Reservation


@dataclass(frozen=True)
class Exceeded:
    """A request may not go on, and nothing was taken for it."""

    requests: Standing | None
    tokens: Standing | None
    what: str
    """requests, or tokens"""
    retry_after_s: float
    """Until the same request would be let in if no other came."""


class Ledger:
    """The accounts of all keys.

    Args:
        clock: Seconds that never go back.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._id = secrets.token_hex(8)
        self._requests: dict[str, _Window] = {}
        self._tokens: dict[str, _Window] = {}

    def reserve(self, account: str, limits: Limits, tokens: int) -> Granted | Exceeded:
        """Take one request and some tokens for an account, or nothing at all.

        Of requests and tokens the one that has to wait longer is told. More tokens at once than the limit are never
        let in; they are told to wait a minute.
        """
        now_s = self._clock()
        requests_spent = self._requests.setdefault(account, _Window())
        tokens_spent = self._tokens.setdefault(account, _Window())
        waits = {
            "requests": requests_spent.wait_s(now_s, 1, limits.requests_per_minute),
            "tokens": tokens_spent.wait_s(now_s, tokens, limits.tokens_per_minute),
        }
        what = max(waits, key=waits.__getitem__)
        if waits[what] > 0:
            return Exceeded(*self._standings(account, limits, now_s), what, waits[what])
        slot = requests_spent.add(now_s, 1)
        tokens_spent.add(now_s, tokens)
        return Granted(
            *self._standings(account, limits, now_s), reservation=Reservation(account, tokens, slot, self._id)
        )

    def settle(self, reservation: Reservation, tokens: int) -> None:
        """Put the tokens that were really spent in the place of those that were reserved.

        It is as if they had been reserved at first: what was not spent is free at once, and what was spent beyond it
        keeps others waiting. For a reservation that has left the window, or was made with another ledger, nothing
        changes.
        """
        if reservation.ledger == self._id and reservation.account in self._tokens:
            self._tokens[reservation.account].change(reservation.slot, tokens - reservation.tokens)

    def _standings(self, account: str, limits: Limits, now_s: float) -> tuple[Standing | None, Standing | None]:
        return (
            self._requests[account].standing(now_s, limits.requests_per_minute),
            self._tokens[account].standing(now_s, limits.tokens_per_minute),
        )


class _Window:
    """What was spent in the last minute, by the slot at whose end it counts as spent."""

    def __init__(self) -> None:
        self._slots: dict[int, int] = {}
        self._total = 0

    def add(self, now_s: float, amount: int) -> int:
        """Spend; returns the slot."""
        slot = math.ceil(now_s * SLOTS_PER_S)
        self._slots[slot] = self._slots.get(slot, 0) + amount
        self._total += amount
        return slot

    def change(self, slot: int, amount: int) -> None:
        if slot in self._slots:
            self._slots[slot] += amount
            self._total += amount

    def wait_s(self, now_s: float, amount: int, limit: int | None) -> float:
        """Until so much more is within the limit; 0 if it is now."""
        self._forget(now_s)
        if limit is None or amount == 0:
            return 0.0
        if amount > limit:
            return WINDOW_S
        free = limit - self._total
        if free >= amount:
            return 0.0
        for slot, spent in self._slots.items():
            free += spent
            if free >= amount:
                return self._leaves_at_s(slot) - now_s
        raise AssertionError("an empty window has room for whatever is within the limit")

    def standing(self, now_s: float, limit: int | None) -> Standing | None:
        if limit is None:
            return None
        spent = (slot for slot in reversed(self._slots) if self._slots[slot])
        last = next(spent, None)
        reset_s = 0.0 if last is None else self._leaves_at_s(last) - now_s
        return Standing(limit, max(0, limit - self._total), reset_s)

    def _forget(self, now_s: float) -> None:
        """Let go of what is a minute old. Slots come in order, so the oldest is the first."""
        while self._slots and self._leaves_at_s(slot := next(iter(self._slots))) <= now_s:
            self._total -= self._slots.pop(slot)

    @staticmethod
    def _leaves_at_s(slot: int) -> float:
        return slot / SLOTS_PER_S + WINDOW_S
