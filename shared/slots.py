"""When a schedule is due: local time in a named zone, as instants in UTC (I5).

Pure: no database, no clock. A local time that DST skips is due at the first instant after
the gap; one that repeats is due once, at its first occurrence.
"""

from collections.abc import Iterator
from datetime import UTC, date, datetime, time, timedelta
from zoneinfo import ZoneInfo

WEEKDAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")


def next_slot(kind: str, at: str, weekday: str | None, timezone: str, after: datetime) -> datetime:
    """The first slot strictly after `after` (aware), in UTC.

    `kind` is daily or weekly, `at` is `HH:MM`, `weekday` is mon … sun for weekly ones.
    Raises ValueError for what is none of these and ZoneInfoNotFoundError for the zone.
    """
    return next(slots_after(kind, at, weekday, timezone, after))


def upcoming(
    kind: str, at: str, weekday: str | None, timezone: str, after: datetime, n: int
) -> list[datetime]:
    """The next `n` slots strictly after `after`, in UTC, oldest first."""
    slots = slots_after(kind, at, weekday, timezone, after)
    return [next(slots) for _ in range(n)]


def slots_after(
    kind: str, at: str, weekday: str | None, timezone: str, after: datetime
) -> Iterator[datetime]:
    """The slots strictly after `after`, in UTC, oldest first, without end; raises as above."""
    if after.tzinfo is None:
        raise ValueError("a naive datetime names no instant")
    if kind not in ("daily", "weekly"):
        raise ValueError(f"a schedule is daily or weekly, not {kind!r}")
    zone, local = ZoneInfo(timezone), time.fromisoformat(at)
    wanted = WEEKDAYS.index(weekday or "") if kind == "weekly" else None
    last = after.astimezone(UTC)
    day = after.astimezone(zone).date()
    while True:
        if wanted is None or day.weekday() == wanted:
            slot = _instant(day, local, zone)
            if slot > last:
                yield slot
                last = slot
        day += timedelta(days=1)


def _instant(day: date, local: time, zone: ZoneInfo) -> datetime:
    wall = datetime.combine(day, local)
    instant = wall.replace(tzinfo=zone).astimezone(UTC)  # fold=0: the first of two
    if instant.astimezone(zone).replace(tzinfo=None) == wall:
        return instant
    return _end_of_gap(wall, zone)


def _end_of_gap(wall: datetime, zone: ZoneInfo) -> datetime:
    """The instant at which the clock jumped over `wall`.

    For a time in a gap, fold=1 reads it with the offset after the jump, which lands before
    the jump, and fold=0 with the offset before, which lands after it (PEP 495).
    """
    before = int(wall.replace(tzinfo=zone, fold=1).timestamp())
    after = int(wall.replace(tzinfo=zone, fold=0).timestamp())
    offset_before = datetime.fromtimestamp(before, zone).utcoffset()
    while after - before > 1:
        middle = (before + after) // 2
        if datetime.fromtimestamp(middle, zone).utcoffset() == offset_before:
            before = middle
        else:
            after = middle
    return datetime.fromtimestamp(after, UTC)
