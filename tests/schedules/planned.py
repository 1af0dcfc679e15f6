"""Schedules of the tests, and what has become of them."""

from datetime import UTC, datetime, timedelta
from typing import Any

from operations.spine import World
from sqlalchemy import select

from services.api.schedules import Kind, Plan, _delete, _put
from shared.database import transaction
from shared.models import Operation, Schedule, ScheduleRun, Server

SLOT = datetime(2026, 3, 10, 3, 0, tzinfo=UTC)
HOUR, DAY = timedelta(hours=1), timedelta(days=1)


def scheduled(world: World, server: Server, **fields: Any) -> Schedule:
    """A daily schedule at 03:00 UTC whose next slot is SLOT."""
    given = {
        "kind": "daily",
        "at": "03:00",
        "timezone": "UTC",
        "keep": 7,
        "catch_up_s": 6 * 3600,
        "next_run_at": SLOT,
        **fields,
    }
    given.setdefault("start_at", given["next_run_at"])
    schedule = Schedule(server_id=server.id, **given)
    world.add(schedule)
    return schedule


def set_plan(server_id: str, kind: Kind = "daily", **fields: Any) -> None:
    """As the API does."""
    plan = {"at": "03:00", "timezone": "UTC", **fields}
    with transaction() as session:
        _put(session, server_id, kind, Plan(**plan))


def end_schedule(server_id: str, kind: Kind = "daily") -> None:
    """As the API does."""
    with transaction() as session:
        _delete(session, server_id, kind)


def runs(schedule: Schedule) -> list[ScheduleRun]:
    row: Any = ScheduleRun
    query = select(ScheduleRun).where(row.schedule_id == schedule.id).order_by(row.slot)
    with transaction() as session:
        return list(session.scalars(query))


def states(schedule: Schedule) -> list[tuple[datetime, str]]:
    return [(each.slot, each.state) for each in runs(schedule)]


def now_of(schedule: Schedule) -> Schedule:
    with transaction() as session:
        return session.get_one(Schedule, schedule.id)


def operations() -> list[Operation]:
    row: Any = Operation
    with transaction() as session:
        return list(session.scalars(select(Operation).order_by(row.seq)))
