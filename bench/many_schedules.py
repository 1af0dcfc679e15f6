"""The processes of the part `schedule`: one fills a database, one ticks, eight claim.

    python -m bench.many_schedules fill | tick | claim START

Each writes what it found as JSON, last. Database and broker are those of the environment.
"""

from __future__ import annotations

import json
import logging
import resource
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from itertools import islice
from typing import Any

import structlog
from sqlalchemy import Connection, func, insert, literal, select, update
from sqlalchemy.exc import OperationalError

from bench.sizes import SHRUNK
from services.imager import ticks
from shared.broker import redis_client
from shared.commands import queue_of
from shared.database import UTCDateTime, engine, migrate, now, unhurried
from shared.models import Host, Operation, OutboxMessage, Schedule, ScheduleRun, Server
from shared.operations.claim import claim
from shared.settings import settings

SCALE = 100 if SHRUNK else 1
SERVERS, SCHEDULES, RUNS = 100_000 // SCALE, 150_000 // SCALE, 5_000_000 // SCALE
HOSTS = 100 // SCALE
"""A thousand servers each."""
DUE = {"idle": 0, "100_due": 100 // SCALE, "10k_due": 10_000 // SCALE}
IDLE_TICKS = 50
CLAIMED = 1000 // SCALE
AT = "03:00"
DAY = timedelta(days=1)


def fill() -> dict[str, Any]:
    """A database as it is after some weeks: every server with a daily schedule, every second with
    a weekly one, none of which is due."""
    _wait_for_database()
    began = time.monotonic()
    migrate()
    with engine().connect() as connection:
        unhurried(connection)
        _rows(connection, Host, ({"name": f"kvm-{n:03}", "facts": {}} for n in range(HOSTS)))
        _rows(connection, Server, map(_server, range(SERVERS)))
        _rows(connection, Schedule, map(_schedule, range(SCHEDULES)))
        _runs(connection)
        if connection.dialect.name == "postgresql":
            connection.exec_driver_sql("ANALYZE")  # as autovacuum has done long since
        connection.commit()
    return {"seconds": round(time.monotonic() - began, 1)}


def _wait_for_database() -> None:
    """A container that has just been started takes a while. Raises OperationalError."""
    end = time.monotonic() + 60
    while True:
        try:
            engine().connect().close()
            return
        except OperationalError:
            if time.monotonic() > end:
                raise
            time.sleep(0.5)


def _slot() -> datetime:
    """The one that comes next for all: tomorrow's, which no tick of this run reaches."""
    return now().replace(hour=3, minute=0, second=0, microsecond=0) + DAY


def _server(n: int) -> dict[str, Any]:
    of = {"host": f"kvm-{n % HOSTS:03}", "domain_uuid": f"uuid-{n}", "created_at": now()}
    return {"id": f"srv_{n:06}", "name": f"server-{n:06}", **of}


def _schedule(n: int) -> dict[str, Any]:
    weekly = n >= SERVERS
    return {
        "id": f"sch_{n:06}",
        "server_id": f"srv_{n % SERVERS:06}",
        "kind": "weekly" if weekly else "daily",
        "weekday": _slot().strftime("%a").lower() if weekly else None,
        "at": AT,
        "timezone": "UTC",
        "keep": 7,
        "enabled": True,
        "catch_up_s": 6 * 3600,
        "next_run_at": _slot(),
        "start_at": _slot(),
        "failures_in_row": 0,
        "created_at": now(),
    }


def _rows(connection: Connection, table: type, rows: Iterator[dict[str, Any]]) -> None:
    while some := list(islice(rows, 5000)):
        connection.execute(insert(table), some)


def _runs(connection: Connection) -> None:
    """The newest of each schedule first, until there are enough."""
    row: Any = Schedule
    left, back = RUNS, 1
    while left:
        slot = literal(_slot() - back * DAY, UTCDateTime())
        values = {"id": row.id + f"_{back}", "schedule_id": row.id, "slot": slot, "start_at": slot}
        values |= {"state": literal("succeeded"), "created_at": slot}
        query = select(*values.values()).order_by(row.id).limit(left)
        connection.execute(insert(ScheduleRun).from_select(list(values), query))
        left, back = left - min(left, SCHEDULES), back + 1


def tick() -> dict[str, Any]:
    """Seconds of ticks with so many due, as beat runs them, up to the last message in Redis."""
    seconds: dict[str, list[float]] = {}
    ticks.run_due_schedules()  # what a process does for the first time takes longer
    for name, due in DUE.items():
        before = _counts()
        _make_due(due)
        seconds[name] = []
        for _ in range(1 if due else IDLE_TICKS):
            began = time.perf_counter()
            ticks.run_due_schedules()
            seconds[name].append(time.perf_counter() - began)
        _check(due, before, _counts())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "peak_bytes": peak}


def _make_due(count: int) -> None:
    """As if the first of them were set to this minute."""
    row: Any = Schedule
    slot = now().replace(second=0, microsecond=0)
    first = select(row.id).where(row.at == AT, row.kind == "daily")
    due = first.order_by(row.id.desc()).limit(count).scalar_subquery()
    values = {"at": slot.strftime("%H:%M"), "next_run_at": slot, "start_at": slot}
    with engine().begin() as connection:
        unhurried(connection)
        connection.execute(update(Schedule).where(row.id.in_(due)).values(**values))


def _counts() -> dict[str, int]:
    """Runs that were started, operations, messages that wait, and those that Redis has."""
    run: Any = ScheduleRun
    operation: Any = Operation
    with engine().connect() as connection:
        unhurried(connection)
        counted = {
            "runs": select(func.count()).where(run.state == "running"),
            "operations": select(func.count(func.distinct(operation.server_id))),
            "waiting": select(func.count()).select_from(OutboxMessage),
        }
        found = {name: connection.execute(query).scalar_one() for name, query in counted.items()}
    prefix = settings().queue_prefix
    queues = [prefix + queue_of("imager", f"kvm-{n:03}") for n in range(HOSTS)]
    lengths: list[Any] = [redis_client().llen(queue) for queue in queues]
    return {**found, "messages": sum(lengths)}


def _check(due: int, before: dict[str, int], after: dict[str, int]) -> None:
    added = {name: after[name] - before[name] for name in after}
    if added != {"runs": due, "operations": due, "waiting": 0, "messages": due}:
        raise RuntimeError(f"{due} were due, and there are {added} more")


def claims(start: float) -> dict[str, Any]:
    """The operations that this process got of those that all try to claim from `start` on."""
    row: Any = Operation
    with engine().connect() as connection:
        ids = list(connection.execute(select(row.id).order_by(row.seq).limit(CLAIMED)).scalars())
    time.sleep(max(0, start - time.time()))
    claimed = [id_ for id_ in ids if claim(id_, "bench")]
    return {"claimed": claimed, "end": time.time()}


def main() -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    found = {"fill": fill, "tick": tick, "claim": lambda: claims(float(sys.argv[2]))}
    print(json.dumps(found[sys.argv[1]]()))


if __name__ == "__main__":
    main()
