"""Identifiers sort by the time they were made."""

import time

import pytest

from shared.ids import new_id


def test_identifiers_sort_as_they_were_made() -> None:
    """Also within one millisecond."""
    made = [new_id("x") for _ in range(2000)]

    assert sorted(set(made)) == made


def test_a_clock_that_steps_back_does_not_turn_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is made after the step sorts after what was made before it."""
    before = new_id("x")
    hour_ago = time.time_ns() - 3_600_000_000_000
    monkeypatch.setattr(time, "time_ns", lambda: hour_ago)

    assert before < new_id("x")
