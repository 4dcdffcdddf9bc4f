"""What is let in is never more than the limit in any minute, and never less than it may be."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from app.serving.ledger import SLOTS_PER_S, WINDOW_S, Exceeded, Granted, Ledger, Limits

SLOT_S = 1 / SLOTS_PER_S
CLOSE_S = 1e-6


class Clock:
    def __init__(self) -> None:
        self.now_s = 1_000.0

    def __call__(self) -> float:
        return self.now_s


def let_in(answer: Granted | Exceeded) -> Granted:
    assert isinstance(answer, Granted)
    return answer


def refused(answer: Granted | Exceeded) -> Exceeded:
    assert isinstance(answer, Exceeded)
    return answer


@given(
    st.lists(st.tuples(st.floats(0, 40), st.integers(0, 12)), max_size=60), st.integers(1, 5), st.integers(1, 30)
)  # fmt: skip
def test_in_no_minute_is_more_let_in_than_the_limit_and_whoever_waits_as_told_is_let_in(
    arrivals: list[tuple[float, int]], most_requests: int, most_tokens: int
) -> None:
    clock = Clock()
    ledger = Ledger(clock)
    limits = Limits(most_requests, most_tokens)
    taken: list[tuple[float, int]] = []
    for pause_s, tokens in arrivals:
        clock.now_s += pause_s
        answer = ledger.reserve("shop", limits, tokens)
        if isinstance(answer, Exceeded):
            assert 0 < answer.retry_after_s <= WINDOW_S + SLOT_S
            if tokens > most_tokens:
                continue
            clock.now_s += answer.retry_after_s + CLOSE_S
            answer = ledger.reserve("shop", limits, tokens)
        let_in(answer)
        taken.append((clock.now_s, tokens))
        assert answer.requests
        assert answer.tokens
        recent = [tokens for at_s, tokens in taken if at_s > clock.now_s - WINDOW_S]
        assert answer.requests.remaining <= most_requests - len(recent)
        assert answer.tokens.remaining <= most_tokens - sum(recent)
    for begin_s, _ in taken:
        minute = [tokens for at_s, tokens in taken if begin_s <= at_s < begin_s + WINDOW_S - CLOSE_S]
        assert len(minute) <= most_requests
        assert sum(minute) <= most_tokens


@given(st.lists(st.floats(0, 30), min_size=1, max_size=40), st.integers(1, 5))
def test_what_came_a_minute_and_a_slot_ago_keeps_nobody_waiting(pauses_s: list[float], most: int) -> None:
    clock = Clock()
    ledger, taken = Ledger(clock), list[float]()
    for pause_s in pauses_s:
        clock.now_s += pause_s
        recent = [at_s for at_s in taken if at_s > clock.now_s - WINDOW_S - SLOT_S - CLOSE_S]
        answer = ledger.reserve("shop", Limits(most), 0)
        if len(recent) < most:
            assert isinstance(answer, Granted)
        if isinstance(answer, Granted):
            taken.append(clock.now_s)


class Settling(RuleBasedStateMachine):
    """Reservations that are settled with other numbers, at other times, against a list of what was spent."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.ledger = Ledger(self.clock)
        self.open: list[tuple[Granted, int]] = []
        self.spent: list[list[float]] = []

    @rule(pause_s=st.floats(0, 45))
    def wait(self, pause_s: float) -> None:
        self.clock.now_s += pause_s

    @rule(tokens=st.integers(1, 60))
    def reserve(self, tokens: int) -> None:
        answer = self.ledger.reserve("shop", Limits(tokens_per_minute=100), tokens)
        if isinstance(answer, Granted):
            self.open.append((answer, len(self.spent)))
            self.spent.append([self.clock.now_s, tokens])
        assert self.ledger.reserve("other", Limits(1_000, 1_000), 0)

    @rule(place=st.integers(0, 9), tokens=st.integers(0, 90))
    def settle(self, place: int, tokens: int) -> None:
        if self.open:
            granted, index = self.open.pop(place % len(self.open))
            self.ledger.settle(granted.reservation, tokens)
            if self.spent[index][0] > self.clock.now_s - WINDOW_S:
                self.spent[index][1] = tokens

    @invariant()
    def what_is_left_is_what_was_not_spent(self) -> None:
        answer = self.ledger.reserve("shop", Limits(tokens_per_minute=100), 0)
        assert isinstance(answer, Granted)
        assert answer.tokens
        now_s = self.clock.now_s
        surely = sum(tokens for at_s, tokens in self.spent if at_s > now_s - WINDOW_S + CLOSE_S)
        perhaps = sum(tokens for at_s, tokens in self.spent if at_s > now_s - WINDOW_S - SLOT_S - CLOSE_S)
        assert max(0, 100 - perhaps) <= answer.tokens.remaining <= max(0, 100 - surely)


TestSettling = Settling.TestCase


def test_a_refusal_takes_nothing() -> None:
    ledger = Ledger(Clock())
    let_in(ledger.reserve("shop", Limits(5, 10), 8))
    for _ in range(20):
        answer = refused(ledger.reserve("shop", Limits(5, 10), 8))
        assert (answer.what, answer.requests and answer.requests.remaining) == ("tokens", 4)
    assert let_in(ledger.reserve("shop", Limits(5, 10), 2)).tokens


def test_an_account_does_not_see_the_others() -> None:
    ledger = Ledger(Clock())
    let_in(ledger.reserve("shop", Limits(1), 0))
    refused(ledger.reserve("shop", Limits(1), 0))
    let_in(ledger.reserve("other", Limits(1), 0))


def test_more_at_once_than_the_limit_is_never_let_in() -> None:
    answer = refused(Ledger(Clock()).reserve("shop", Limits(None, 10), 11))
    assert (answer.what, answer.retry_after_s, answer.requests) == ("tokens", WINDOW_S, None)


def test_the_reset_is_when_all_of_it_is_free_again() -> None:
    clock = Clock()
    ledger = Ledger(clock)
    ledger.reserve("shop", Limits(3), 0)
    clock.now_s += 10
    answer = let_in(ledger.reserve("shop", Limits(3), 0))
    assert answer.requests
    assert (answer.requests.remaining, answer.requests.reset_s) == (1, pytest.approx(60, abs=SLOT_S))
    clock.now_s += 30
    third = let_in(ledger.reserve("shop", Limits(3), 0))
    assert third.requests
    answer_then = refused(ledger.reserve("shop", Limits(3), 0))
    assert answer_then.retry_after_s == pytest.approx(20, abs=SLOT_S), "the first one is a minute old then"


def test_a_changed_limit_counts_at_once() -> None:
    ledger = Ledger(Clock())
    for _ in range(5):
        let_in(ledger.reserve("shop", Limits(5), 0))
    refused(ledger.reserve("shop", Limits(5), 0))
    let_in(ledger.reserve("shop", Limits(6), 0))
    answer = refused(ledger.reserve("shop", Limits(2), 0))
    assert answer.requests
    assert answer.requests.remaining == 0


def test_a_reservation_of_another_ledger_changes_nothing() -> None:
    clock = Clock()
    before = let_in(Ledger(clock).reserve("shop", Limits(None, 10), 9))
    ledger = Ledger(clock)
    ledger.settle(before.reservation, 0)
    let_in(ledger.reserve("shop", Limits(None, 10), 9))
    ledger.settle(before.reservation, 0)
    refused(ledger.reserve("shop", Limits(None, 10), 9))


def test_an_account_stays_small_however_much_comes() -> None:
    clock = Clock()
    ledger = Ledger(clock)
    for _ in range(20_000):
        clock.now_s += 0.005
        ledger.reserve("shop", Limits(1_000_000, 1_000_000), 3)
    for windows in (ledger._requests, ledger._tokens):
        assert len(windows["shop"]._slots) <= WINDOW_S * SLOTS_PER_S + 1
