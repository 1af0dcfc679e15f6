"""The instants of schedules, over every kind of clock change (rule I5)."""

from datetime import UTC, datetime, timedelta
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.slots import WEEKDAYS, next_slot, upcoming


def utc(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def test_daily_slot_later_today() -> None:
    """A time still to come today is today's."""
    slot = next_slot("daily", "03:00", None, "UTC", utc("2026-03-10 02:59"))
    assert utc("2026-03-10 03:00") == slot


def test_slot_is_strictly_after() -> None:
    """At the very instant of a slot, the next one is the following day's."""
    slot = next_slot("daily", "03:00", None, "UTC", utc("2026-03-10 03:00"))
    assert utc("2026-03-11 03:00") == slot


def test_local_time_follows_the_zone() -> None:
    """03:00 in London is 03:00 UTC in winter and 02:00 UTC in summer."""
    london = "Europe/London"
    winter = next_slot("daily", "03:00", None, london, utc("2026-01-15 00:00"))
    summer = next_slot("daily", "03:00", None, london, utc("2026-07-15 00:00"))
    assert [utc("2026-01-15 03:00"), utc("2026-07-15 02:00")] == [winter, summer]


def test_weekly_slot_is_on_its_local_weekday() -> None:
    """Monday 01:00 in Auckland is Sunday in UTC."""
    slot = next_slot("weekly", "01:00", "mon", "Pacific/Auckland", utc("2026-07-01 00:00"))
    assert utc("2026-07-05 13:00") == slot
    local = slot.astimezone(ZoneInfo("Pacific/Auckland"))
    assert (local.weekday(), local.hour) == (0, 1)


def test_weekly_slots_are_a_week_apart() -> None:
    """After one weekly slot comes the same weekday a week later."""
    first, second = upcoming("weekly", "04:30", "sat", "UTC", utc("2026-03-10 00:00"), 2)
    assert (utc("2026-03-14 04:30"), timedelta(days=7)) == (first, second - first)


def test_skipped_time_runs_at_the_end_of_the_gap() -> None:
    """Berlin jumps from 02:00 to 03:00 (01:00 UTC): 02:30 is due at that instant."""
    slots = upcoming("daily", "02:30", None, "Europe/Berlin", utc("2026-03-28 12:00"), 2)
    assert [utc("2026-03-29 01:00"), utc("2026-03-30 00:30")] == slots


def test_first_time_of_a_gap_is_its_end_too() -> None:
    """02:00 does not exist in Berlin that night either: it is called 03:00."""
    slot = next_slot("daily", "02:00", None, "Europe/Berlin", utc("2026-03-28 12:00"))
    assert utc("2026-03-29 01:00") == slot


def test_gap_of_half_an_hour() -> None:
    """Lord Howe jumps by thirty minutes, 02:00 to 02:30."""
    slot = next_slot("daily", "02:15", None, "Australia/Lord_Howe", utc("2026-10-03 12:00"))
    assert utc("2026-10-03 15:30") == slot


def test_gap_at_midnight() -> None:
    """Santiago skips midnight: 00:00 is due at 01:00 local, of the same date."""
    slots = upcoming("daily", "00:00", None, "America/Santiago", utc("2026-09-05 12:00"), 2)
    assert [utc("2026-09-06 04:00"), utc("2026-09-07 03:00")] == slots


def test_day_that_never_was() -> None:
    """Apia left out 30 December 2011: its slot runs when the 31st begins, then all go on."""
    slots = upcoming("daily", "03:00", None, "Pacific/Apia", utc("2011-12-29 13:30"), 2)
    assert [utc("2011-12-30 10:00"), utc("2011-12-30 13:00")] == slots


def test_day_that_never_was_gives_midnight_once() -> None:
    """Where the left-out day's slot falls on the next day's own, it is one slot."""
    slots = upcoming("daily", "00:00", None, "Pacific/Apia", utc("2011-12-29 12:00"), 2)
    assert [utc("2011-12-30 10:00"), utc("2011-12-31 10:00")] == slots


def test_repeated_time_runs_once_at_its_first_occurrence() -> None:
    """Berlin has 02:30 twice (00:30 and 01:30 UTC): the first counts, the second does not."""
    slots = upcoming("daily", "02:30", None, "Europe/Berlin", utc("2026-10-24 12:00"), 2)
    assert [utc("2026-10-25 00:30"), utc("2026-10-26 01:30")] == slots


def test_asked_between_two_occurrences() -> None:
    """Between the two 02:30s, the next slot is tomorrow's."""
    slot = next_slot("daily", "02:30", None, "Europe/Berlin", utc("2026-10-25 01:00"))
    assert utc("2026-10-26 01:30") == slot


def test_naive_moment_is_refused() -> None:
    """A moment without a zone would be read in the machine's own."""
    with pytest.raises(ValueError, match="naive"):
        next_slot("daily", "03:00", None, "UTC", datetime(2026, 1, 1))


@pytest.mark.parametrize(("kind", "weekday"), [("hourly", None), ("weekly", None), ("weekly", "x")])
def test_nonsense_is_refused(kind: str, weekday: str | None) -> None:
    """What is no schedule raises; it does not loop for ever."""
    with pytest.raises(ValueError):
        next_slot(kind, "03:00", weekday, "UTC", utc("2026-01-01 00:00"))


@settings(deadline=None)
@given(
    after=st.datetimes(datetime(2000, 1, 1), datetime(2037, 1, 1), timezones=st.just(UTC)),
    zone=st.sampled_from(
        ["UTC", "Europe/Berlin", "America/Sao_Paulo", "Africa/Casablanca", "Asia/Tehran"]
    ),
    at=st.times().map(lambda each: each.strftime("%H:%M")),
    weekday=st.sampled_from((None, *WEEKDAYS)),
)
def test_slots_neither_stall_nor_skip(
    after: datetime, zone: str, at: str, weekday: str | None
) -> None:
    """Each slot is after the one before, by one period give or take a clock change."""
    kind = "weekly" if weekday else "daily"
    period = timedelta(days=7 if weekday else 1)
    slots = [after, *upcoming(kind, at, weekday, zone, after, 5)]
    assert slots == sorted(set(slots))
    gaps = [later - earlier for earlier, later in pairwise(slots)]
    assert max(gaps) <= period + timedelta(hours=2)
    assert min(gaps[1:]) >= period - timedelta(hours=2)
