"""Beat: that ticks come whatever this machine's clock does, and whatever fails."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import pytest
from operations.waiting import wait_for

from shared import beat
from shared.beat import Beat, Steady
from shared.settings import settings

TICKS = set(beat.app.conf.beat_schedule)


class Clock:
    """This machine's clock, as Celery reads it, ahead of the true time by so much."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ahead = timedelta(0)
        now = beat.app.now
        monkeypatch.setattr(beat.app, "now", lambda: now() + self.ahead)


def sent_by(scheduler: Steady, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    sent: list[str] = []

    def send(entry: Any, producer: Any = None) -> None:
        sent.append(entry.name)

    monkeypatch.setattr(Steady, "producer", None)
    monkeypatch.setattr(scheduler, "apply_entry", send)
    return sent


def run_until_idle(scheduler: Steady) -> float:
    while (pause := scheduler.tick()) <= 0:
        pass
    return pause


@pytest.mark.parametrize("back", [timedelta(0), timedelta(hours=8), timedelta(days=400)])
def test_clock_that_is_set_back_holds_up_no_tick(
    monkeypatch: pytest.MonkeyPatch, back: timedelta
) -> None:
    """Each is sent once more within one interval of the true time."""
    clock, tick = Clock(monkeypatch), timedelta(seconds=settings().tick)
    clock.ahead = back
    scheduler = Steady(beat.app, max_interval=settings().tick)
    sent = sent_by(scheduler, monkeypatch)
    run_until_idle(scheduler)
    clock.ahead += tick
    run_until_idle(scheduler)
    assert set(sent) == TICKS
    sent.clear()

    clock.ahead += tick - back
    assert run_until_idle(scheduler) <= settings().tick

    assert sorted(sent) == sorted(TICKS)


def test_beat_that_failed_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that Celery's scheduler lets out ends no ticks."""
    monkeypatch.setattr(beat, "AGAIN_S", 0.01)
    called: list[float] = []

    def tick(_self: Steady) -> float:
        called.append(time.monotonic())
        if len(called) == 1:
            raise RuntimeError("as a heap that cannot be compared")
        return 0.01

    monkeypatch.setattr(Steady, "tick", tick)
    thread = Beat()
    thread.start()
    wait_for(lambda: len(called) > 2)
    thread.stop()
    thread.join(10)
    assert not thread.is_alive()
