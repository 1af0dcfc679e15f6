"""Gauges: how things stand. Moments are given as timestamps, so that their age is right
whenever somebody looks: `time() - triptych_…_timestamp_seconds`."""

from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from typing import Any

from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily
from sqlalchemy import and_, case, func, select
from sqlalchemy.orm import aliased
from sqlmodel import Session

from services.api.protection import PERIOD, unprotected
from shared import VERSION, usage
from shared.commands import SERVICES
from shared.database import now
from shared.models import (
    Event,
    Host,
    Image,
    Operation,
    OutboxMessage,
    Schedule,
    ScheduleRun,
    Server,
    Snapshot,
)

SERVER = ("host", "server", "server_id")
"""Names are not unique: of a server that was registered twice, or on two hosts."""


class Gauge(GaugeMetricFamily):
    """A family to which what is not known adds nothing."""

    def __init__(self, name: str, what: str, labels: Sequence[str] = ()) -> None:
        super().__init__(f"triptych_{name}", what, labels=labels)

    def set(self, labels: Sequence[str], value: float | datetime | timedelta | None) -> None:
        if isinstance(value, datetime):
            value = value.timestamp()
        elif isinstance(value, timedelta):
            value = value.total_seconds()
        if value is not None:
            self.add_metric(labels, value)


def read(session: Session) -> Iterator[Metric]:
    build = Gauge("build_info", "The version of this API", ["version"])
    build.set([VERSION], 1)
    yield build
    hosts = list(session.scalars(select(Host)))
    yield from _hosts(hosts)
    yield from _vaults(session, [host.name for host in hosts])
    yield from _servers(session)
    yield from _snapshots(session)
    yield from _schedules(session)
    yield from _queue(session, [host.name for host in hosts])
    yield from _outbox(session)


def _hosts(hosts: list[Host]) -> Iterator[Metric]:
    up = Gauge("host_up", "1 where the host's workers answer and have no problem", ["host"])
    seen = Gauge("host_last_seen_timestamp_seconds", "When the host last reported", ["host"])
    free = Gauge("vault_free_bytes", "Room left on the vault's file system", ["host"])
    size = Gauge("vault_size_bytes", "Size of the vault's file system", ["host"])
    for host in hosts:
        up.set([host.name], host.answering)
        seen.set([host.name], host.last_seen_at)
        free.set([host.name], host.facts.get("free_bytes"))
        size.set([host.name], host.facts.get("total_bytes"))
    yield from (up, seen, free, size)


def _vaults(session: Session, hosts: list[str]) -> Iterator[Metric]:
    used = usage.by_host(session)
    copies = Gauge("vault_copies", "Snapshots and images that the vault holds", ["host"])
    families = {
        name: Gauge(f"vault_{name}", what, ["host"])
        for name, what in (
            ("apparent_bytes", "What the copies would take up if they shared nothing"),
            ("unique_bytes", "What each copy alone would free by its deletion, added up"),
            ("shared_bytes", "What copies share with others or a live disk, for each that does"),
        )
    }
    for host in hosts:
        found = used.get(host, usage.Usage())
        copies.set([host], found.copies)
        for name, family in families.items():
            family.set([host], getattr(found, name))
    yield from (copies, *families.values())


def _servers(session: Session) -> Iterator[Metric]:
    server: Any = Server
    image: Any = Image
    whole = (
        select(
            image.server_id,
            func.count().label("images"),
            func.max(image.created_at).label("newest"),
            func.max(case((image.verified_result == "passed", image.created_at))).label("verified"),
        )
        .where(image.deleted_at.is_(None), image.state == "complete")
        .group_by(image.server_id)
        .subquery()
    )
    query = (
        select(server.host, server.name, server.id, *whole.c["images", "newest", "verified"])
        .outerjoin(whole, whole.c.server_id == server.id)
        .where(server.forgotten_at.is_(None))
    )
    info = Gauge("server_info", "1 for each registered server", SERVER)
    held = Gauge("server_images", "Whole images that the server has", SERVER)
    newest = Gauge(
        "server_newest_image_timestamp_seconds", "When its newest whole image was taken", SERVER
    )
    verified = Gauge(
        "server_newest_verified_image_timestamp_seconds",
        "When the newest of its images was taken whose last verification passed",
        SERVER,
    )
    lacking = Gauge(
        "server_unprotected",
        "1 where the newest good image is older than a schedule promises, or there is none",
        SERVER,
    )
    lacks = set(session.scalars(select(server.id).where(unprotected(now()))))
    for *labels, images, taken, taken_verified in session.execute(query):
        info.set(labels, 1)
        lacking.set(labels, labels[-1] in lacks)
        held.set(labels, images or 0)
        newest.set(labels, taken)
        verified.set(labels, taken_verified)
    yield from (info, lacking, held, newest, verified)


def _snapshots(session: Session) -> Iterator[Metric]:
    server: Any = Server
    row: Any = Snapshot
    query = (
        select(server.host, server.name, server.id, row.taken_at, row.expires_at)
        .join(Server, server.id == row.server_id)
        .where(row.deleted_at.is_(None))
    )
    taken = Gauge("snapshot_taken_timestamp_seconds", "When its snapshot was taken", SERVER)
    expires = Gauge("snapshot_expires_timestamp_seconds", "When its snapshot goes", SERVER)
    for *labels, taken_at, expires_at in session.execute(query):
        taken.set(labels, taken_at)
        expires.set(labels, expires_at)
    yield from (taken, expires)


def _schedules(session: Session) -> Iterator[Metric]:
    server: Any = Server
    row: Any = Schedule
    run: Any = ScheduleRun
    work: Any = Operation
    other: Any = aliased(ScheduleRun)
    last = select(func.max(other.slot)).where(other.schedule_id == row.id).scalar_subquery()
    query = (
        select(
            server.host,
            server.name,
            server.id,
            Schedule,
            func.coalesce(run.start_at, run.slot),
            work.state,
            work.started_at,
        )
        .join(Server, server.id == row.server_id)
        .outerjoin(ScheduleRun, and_(run.schedule_id == row.id, run.slot == last))
        .outerjoin(Operation, work.id == run.operation_id)
    )
    labels = (*SERVER, "schedule")
    period = Gauge("schedule_period_seconds", "Time between two slots, if it is enabled", labels)
    created = Gauge("schedule_created_timestamp_seconds", "When the schedule was set", labels)
    following = Gauge(
        "schedule_next_run_timestamp_seconds", "When its next run starts, if it is enabled", labels
    )
    failures = Gauge("schedule_failures_in_row", "Runs that failed since one succeeded", labels)
    late = Gauge(
        "schedule_lateness_seconds",
        "From when its last run was to start until it did; grows while the run is queued",
        labels,
    )
    for *of, schedule, planned, state, started_at in session.execute(query):
        of.append(schedule.kind)
        period.set(of, PERIOD[schedule.kind] if schedule.enabled else None)
        created.set(of, schedule.created_at)
        following.set(of, schedule.start_at)
        failures.set(of, schedule.failures_in_row)
        began = now() if state == "queued" else started_at
        late.set(of, began - planned if began else None)
    yield from (period, created, following, failures, late)


def _queue(session: Session, hosts: list[str]) -> Iterator[Metric]:
    row: Any = Operation
    query = (
        select(row.state, row.host, row.service, func.count(), func.min(row.created_at))
        .where(row.state.in_(("queued", "running")))
        .group_by(row.state, row.host, row.service)
    )
    counts = {
        state: {(host, service): 0 for host in hosts for service in SERVICES}
        for state in ("queued", "running")
    }
    labels = ("host", "service")
    queued = Gauge("operations_queued", "Operations that wait", labels)
    running = Gauge("operations_running", "Operations that are worked on", labels)
    oldest = Gauge(
        "operations_queued_oldest_timestamp_seconds",
        "When the one that has waited longest was asked for",
        labels,
    )
    for state, host, service, count, since in session.execute(query):
        counts[state][host, service] = count
        if state == "queued":
            oldest.set((host, service), since)
    for family, state in ((queued, "queued"), (running, "running")):
        for of, count in counts[state].items():
            family.set(of, count)
    yield from (queued, running, oldest)


def _outbox(session: Session) -> Iterator[Metric]:
    event: Any = Event
    message: Any = OutboxMessage
    unsent = select(func.count(), func.min(message.created_at))
    unrelayed = select(func.count(), func.min(event.time)).where(event.relayed_at.is_(None))
    for name, what, query in (
        ("outbox_messages", "Wake-ups that the broker has not got yet", unsent),
        ("events_unrelayed", "Events that the stream has not got yet", unrelayed),
    ):
        count, since = session.execute(query).one()
        held = Gauge(name, what)
        held.set((), count)
        oldest = Gauge(f"{name}_oldest_timestamp_seconds", "When the oldest of these was written")
        oldest.set((), since)
        yield from (held, oldest)
