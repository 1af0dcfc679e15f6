"""A large farm shut down: only a few guests are asked at a time, and each has its time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from services.cloner import farms
from shared.models import Clone, Server
from shared.turns import MOST_CALLS

ASKING_S = 1.3
"""How long libvirt waits for an agent."""
GOING_DOWN_S = 5.0
TIMEOUT_S = 30.0


class Clock:
    """Time that goes on when somebody waits, and no sooner."""

    def __init__(self) -> None:
        self.now = 0.0
        self.turn = threading.Lock()

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        with self.turn:
            self.now += seconds


class Guest(farms.Member):
    """A member and its domain in one: off some time after it was asked, if it heard it."""

    def __init__(self, clock: Clock, name: str, hears: bool = True) -> None:
        source = {"operation_id": "op_x", "host": "h", "source_kind": "server", "source_id": "s"}
        super().__init__(Clone(name=name, **source), Server(name=name))
        self.clock = clock
        self.hears = hears
        self.asked: list[float] = []

    def domain(self) -> Any:
        return self

    @property
    def state(self) -> str:
        heard = self.hears and self.asked
        return "stopped" if heard and self.clock.now >= self.asked[0] + GOING_DOWN_S else "running"

    def ask_to_shut_down(self) -> None:
        self.clock.sleep(ASKING_S)
        self.asked.append(self.clock.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(farms, "time", clock)
    return clock


def still_on(all_of: list[Guest], stopping: Callable[[], bool] = lambda: False) -> list[Any]:
    context: Any = SimpleNamespace(stopping=stopping)
    return farms._shut_down(context, [*all_of], TIMEOUT_S)


def test_the_last_one_asked_has_its_time(clock: Clock) -> None:
    """To ask all takes longer than they are given; that begins when the last has been asked."""
    guests = [Guest(clock, f"qa-{n}") for n in range(100)]
    assert still_on(guests) == []
    assert guests[-1].asked[0] > TIMEOUT_S


def test_who_went_down_while_others_were_asked_is_not_on(clock: Clock) -> None:
    """What a guest was when it was asked says nothing: only the deaf one is told."""
    deaf = Guest(clock, "deaf", hears=False)
    assert still_on([Guest(clock, f"qa-{n}") for n in range(40)] + [deaf]) == [deaf]
    assert clock.now >= deaf.asked[0] + TIMEOUT_S


def test_none_is_asked_when_time_is_over(clock: Clock) -> None:
    """What is asked last would have no time."""
    guests = [Guest(clock, f"qa-{n}", hears=False) for n in range(100)]
    assert still_on(guests) == guests
    first = max(each.asked[0] for each in guests)
    assert max(each.asked[-1] for each in guests) < first + TIMEOUT_S + MOST_CALLS * ASKING_S


def test_cancelled_while_guests_are_asked(clock: Clock) -> None:
    """Those whose turn had not come are left alone."""
    guests = [Guest(clock, f"qa-{n}") for n in range(100)]
    still_on(guests, stopping=lambda: any(each.asked for each in guests))
    assert 1 <= sum(bool(each.asked) for each in guests) <= MOST_CALLS
