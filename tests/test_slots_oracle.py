"""Slots beside an oracle that only ever reads clocks (rule I5).

`shared.slots` turns wall times into instants. The oracle goes the other way: it walks through
UTC minute by minute, reads what a wall clock in the zone shows, and notes when it first shows a
date's time or a later one. Every zone, every clock change since 2000 and until 2040.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, date, datetime, time, timedelta
from functools import cache
from itertools import pairwise
from zoneinfo import ZoneInfo, available_timezones

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.slots import WEEKDAYS, next_slot, upcoming

MINUTE, DAY = timedelta(minutes=1), timedelta(days=1)
FIRST, LAST = datetime(2000, 1, 1, tzinfo=UTC), datetime(2040, 1, 1, tzinfo=UTC)
ZONES = sorted(available_timezones() - {"localtime", "Factory"})


def shown(moment: datetime, zone: ZoneInfo) -> datetime:
    """What a wall clock in the zone shows then."""
    return moment.astimezone(zone).replace(tzinfo=None)


@cache
def changes(name: str) -> list[datetime]:
    """The minutes at which the zone's clocks are put forward or back."""
    zone, step, found = ZoneInfo(name), timedelta(days=10), []

    def offset(moment: datetime) -> timedelta | None:
        return moment.astimezone(zone).utcoffset()

    sampled = [(FIRST + n * step, offset(FIRST + n * step)) for n in range((LAST - FIRST) // step)]
    for (early, before), (late, after) in pairwise(sampled):
        if before == after:
            continue
        while late - early > MINUTE:
            middle = early + (late - early) // MINUTE // 2 * MINUTE
            early, late = (middle, late) if offset(middle) == before else (early, middle)
        found.append(late)
    return found


def walked(zone: ZoneInfo, times: list[time], begin: datetime, end: datetime) -> dict:
    """By time and date, the first minute at which the wall clock had come to it; for the dates
    that begin and end within the walk."""
    first: dict[tuple[time, date], datetime] = {}
    furthest = shown(begin, zone)
    minute = begin
    while minute < end:
        minute += MINUTE
        wall = shown(minute, zone)
        if wall <= furthest:
            continue  # put back: it has shown this before
        if wall - furthest == MINUTE:
            if wall.time() in times:
                first[wall.time(), wall.date()] = minute
        else:  # put forward, over all of these
            for each in times:
                day = furthest.date()
                while day <= wall.date():
                    if furthest < datetime.combine(day, each) <= wall:
                        first[each, day] = minute
                    day += DAY
        furthest = wall
    return first


def compare(name: str, times: list[time], begin: datetime, days: int = 4) -> None:
    """All slots of some days, daily and for each weekday, are the oracle's."""
    begin = begin.replace(second=0, microsecond=0)
    found = walked(ZoneInfo(name), times, begin, begin + days * DAY)
    end = begin + days * DAY
    for each in times:
        text = each.strftime("%H:%M")
        by_date = {day: moment for (of, day), moment in found.items() if of == each}
        assert between("daily", text, None, name, begin, end) == sorted(set(by_date.values()))
        for number, weekday in enumerate(WEEKDAYS):
            theirs = {moment for day, moment in by_date.items() if day.weekday() == number}
            assert between("weekly", text, weekday, name, begin, end) == sorted(theirs)


def between(
    kind: str, at: str, weekday: str | None, zone: str, begin: datetime, end: datetime
) -> list[datetime]:
    """Slots after `begin` and until `end`, each asked for anew as the tick does."""
    found = []
    while (begin := next_slot(kind, at, weekday, zone, begin)) <= end:
        found.append(begin)
    return found


def around(name: str, change: datetime) -> list[time]:
    """The times at, beside and within what the change leaves out or repeats."""
    zone = ZoneInfo(name)
    before, after = shown(change - MINUTE, zone) + MINUTE, shown(change, zone)
    middle = min(before, after) + abs(after - before) // 2 // MINUTE * MINUTE
    edges = [each + n * MINUTE for each in (before, after) for n in (-1, 0, 1)]
    return sorted({each.time() for each in [*edges, middle]} | {time(0), time(12)})


def test_the_machine_knows_the_worlds_zones() -> None:
    """Else all that follows would say little."""
    assert len(ZONES) > 400
    assert sum(bool(changes(name)) for name in ZONES) > 200


def both_edges() -> Iterator[tuple[str, datetime]]:
    """For each set of rules the newest change forward and the newest back; for those that never
    change, some day."""
    seen = set()
    for name in ZONES:
        zone, moments = ZoneInfo(name), changes(name)
        leaps = [
            (shown(each, zone) - shown(each - MINUTE, zone) > MINUTE, each) for each in moments
        ]
        rules = (zone.utcoffset(FIRST.replace(tzinfo=None)), *moments)
        if rules in seen:
            continue  # another name for a zone that was tried
        seen.add(rules)
        yield from ((name, change) for change in dict(leaps).values())
        if not moments:
            yield name, LAST


def test_both_edges_of_every_zone() -> None:
    """Each zone's newest change in each direction, at every time that it touches."""
    for name, change in both_edges():
        compare(name, around(name, change), change - DAY, days=2)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_any_change_of_any_zone(data: st.DataObject) -> None:
    """Changes of base offsets, of whole days, of half an hour, and those of each year."""
    name = data.draw(st.sampled_from([each for each in ZONES if changes(each)]))
    change = data.draw(st.sampled_from(changes(name)))
    ahead = data.draw(st.integers(1, 3000))
    compare(name, around(name, change), change - ahead * MINUTE)


@pytest.mark.parametrize(
    ("zone", "change"),
    [
        ("Pacific/Apia", "2011-12-30T10:00"),  # left out a day
        ("Pacific/Kwajalein", "1993-08-21T12:00"),  # left out a day, at another offset
        ("America/Caracas", "2007-12-09T07:00"),  # half an hour back for good
        ("America/Caracas", "2016-05-01T07:00"),  # and forward again
        ("Asia/Pyongyang", "2018-05-04T15:00"),
        ("Europe/Istanbul", "2016-09-06T21:00"),  # stayed at summer time
        ("Africa/Casablanca", "2026-02-15T02:00"),  # back for Ramadan
        ("Africa/Casablanca", "2026-03-22T02:00"),
        ("Australia/Lord_Howe", "2026-04-04T15:00"),  # by half an hour
        ("Antarctica/Troll", "2026-03-29T01:00"),  # by two hours
        ("America/Godthab", "2023-03-26T01:00"),
    ],
)
def test_changes_that_are_unlike_others(zone: str, change: str) -> None:
    """Whatever clocks have done."""
    moment = datetime.fromisoformat(change).replace(tzinfo=UTC)
    compare(zone, around(zone, moment), moment - 1.5 * DAY)


@settings(max_examples=12, deadline=None)
@given(
    zone=st.sampled_from(ZONES),
    at=st.times().map(lambda each: each.strftime("%H:%M")),
    weekday=st.sampled_from((None, *WEEKDAYS)),
    year=st.integers(2000, 2027),
)
def test_twelve_years_of_any_zone(zone: str, at: str, weekday: str | None, year: int) -> None:
    """Every date once, leap days and year ends too: each slot is the first instant at which the
    wall clock has come to its date's time."""
    begin = datetime(year, 1, 1, tzinfo=UTC)
    wall = shown(begin, there := ZoneInfo(zone))
    day, wanted = wall.date(), WEEKDAYS.index(weekday) if weekday else None
    due = time.fromisoformat(at)
    count = 12 * (52 if weekday else 365)
    for slot in upcoming("weekly" if weekday else "daily", at, weekday, zone, begin, count):
        while datetime.combine(day, due) <= wall or wanted not in (None, day.weekday()):
            day += DAY
        nominal = datetime.combine(day, due)
        earlier = [slot - timedelta(seconds=n) for n in (1, 1800, 3600, 7200, 10800)]
        assert max(shown(each, there) for each in earlier) < nominal <= shown(slot, there)
        wall = max(shown(slot, there), nominal)
    years = (slot - begin) / timedelta(days=365.2425)
    assert 11.9 < years < 12.1


@settings(max_examples=60, deadline=None)
@given(
    after=st.datetimes(datetime(1990, 1, 1), datetime(2050, 1, 1), timezones=st.just(UTC)),
    zone=st.sampled_from(ZONES),
    at=st.times().map(lambda each: each.strftime("%H:%M")),
    weekday=st.sampled_from((None, *WEEKDAYS)),
    back=st.integers(0, 10**6),
)
def test_asking_earlier_gives_the_same_slots(
    after: datetime, zone: str, at: str, weekday: str | None, back: int
) -> None:
    """A clock that steps back, a tick that comes late: the slots stay where they are."""
    kind = "weekly" if weekday else "daily"
    slots = upcoming(kind, at, weekday, zone, after - timedelta(seconds=back), 16)
    assert slots == sorted(set(slots))
    expected = [each for each in slots if each > after]
    assert expected[:3] == upcoming(kind, at, weekday, zone, after, 3)[: len(expected)]
    for early, late in pairwise(slots):
        assert next_slot(kind, at, weekday, zone, early) == late
        assert next_slot(kind, at, weekday, zone, late - timedelta(microseconds=1)) == late
