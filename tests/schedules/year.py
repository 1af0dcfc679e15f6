"""A year in the life of many servers, on a clock of its own.

Real are the schedules, the ticks, the engine of operations, rotation and the database. Faked is
a copy alone: an empty folder in the vault. Beat, hosts and database are away at random, for
minutes or weeks; copies fail, workers die within them, clocks step, hosts drain, and owners pin,
delete nothing, change their minds and make images by hand. All of it by a seed.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from operations.spine import Killed, World
from schedules.planned import set_plan
from sqlalchemy import delete, event, func, select, update
from sqlalchemy.exc import OperationalError
from sqlmodel import Session

from services.imager import images, ticks
from shared import database, errors, recovery  # noqa: F401  the journal's actions
from shared.commands import CreateImage
from shared.copying import vault
from shared.database import now, transaction
from shared.models import Host, Image, Operation, OutboxMessage, Schedule, ScheduleRun, Server
from shared.operations import drain, runner
from shared.operations.context import Context
from shared.settings import settings
from shared.slots import WEEKDAYS, slots_after

BEGIN = datetime(2025, 1, 1, tzinfo=UTC)
"""Long ago: leases go by the real clock."""
STEP, DAY = timedelta(hours=1), timedelta(days=1)
HOSTS = ("kvm-1", "kvm-2", "kvm-3", "kvm-4")
ZONES = ("UTC", "Europe/Berlin", "America/Santiago", "Australia/Lord_Howe", "Africa/Casablanca")
QUIET = 9 * DAY
"""At the end nothing is away and nothing is changed, so that all that is owed comes."""


@dataclass
class Copied:
    """Stands for a copy that is complete on disk."""

    id: str
    server: Server
    origin: str

    def facts(self) -> dict[str, Any]:
        return {}

    def image_row(self) -> Image:
        return Image(
            id=self.id,
            name=self.id,
            server_id=self.server.id,
            created_at=now(),
            origin=self.origin,
            consistency="crash",
            way="reflink",
            bytes=1,
        )


@dataclass
class Promise:
    """While a schedule was so: its slots after `since` and until `until` are owed a run."""

    since: datetime
    timing: tuple[str, str, str | None, str]
    until: datetime | None = None

    def slots(self, end: datetime) -> Iterator[datetime]:
        for slot in slots_after(*self.timing, self.since):
            if slot > min(self.until or end, end):
                return
            yield slot


@dataclass
class Year:
    world: World
    patch: pytest.MonkeyPatch
    servers: int
    days: int
    seed: int = 1
    moment: datetime = BEGIN
    promises: dict[tuple[str, str], list[Promise]] = field(default_factory=dict)
    made: Counter[str] = field(default_factory=Counter)
    happened: Counter[str] = field(default_factory=Counter)
    away_until: dict[str, datetime] = field(default_factory=dict)
    alive: dict[str, dict[str, Image]] = field(default_factory=lambda: defaultdict(dict))

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.end = BEGIN + self.days * DAY
        self.patch.setattr(images, "copy_server", self._copy)
        self.patch.setattr(ticks, "transaction", self._transaction)
        self.patch.setattr("shared.vault.sync", lambda _path: None)
        for module in (ticks, runner):
            self.patch.setattr(module, "flush_if_possible", lambda: True)
        event.listen(database.engine(), "checkout", _unsafe)
        with transaction() as session:
            session.add_all(Host(name=name) for name in HOSTS[2:])
        self._clock(BEGIN)
        self.ids = [self._server(n) for n in range(self.servers)]

    def _clock(self, moment: datetime) -> None:
        self.moment = moment
        self.patch.setattr(database, "_ahead", moment - datetime.now(UTC))

    def _server(self, number: int) -> str:
        server = self.world.server(f"server-{number}", host=HOSTS[number % len(HOSTS)])
        for kind in ("daily", "weekly"):
            self._set(server.id, kind)
        return server.id

    # What goes on

    def run(self) -> None:
        while self.moment < self.end:
            self._clock(self.moment + STEP)
            calm = self.moment > self.end - QUIET
            if not calm:
                self._troubles()
                self._owners()
            if self._up("database", calm):
                if self._up("beat", calm):
                    self._tick(calm)
                for host in HOSTS:
                    if self._up(host, calm):
                        self._work(host, 10**6 if calm else self.random.randint(0, self.servers))

    def _up(self, what: str, calm: bool) -> bool:
        return calm or self.away_until.get(what, BEGIN) <= self.moment

    def _chance(self, days: float) -> bool:
        """Of what happens once in so many days."""
        return self.random.random() < STEP / (days * DAY)

    def _troubles(self) -> None:
        for what, days in (("beat", 12), ("database", 25), *((host, 15) for host in HOSTS)):
            if self._chance(days):
                self.happened[f"{what.split('-')[0]} away"] += 1
                length = self.random.choice([STEP, 4 * STEP, DAY / 3, DAY, 4 * DAY, 12 * DAY])
                self.away_until[what] = self.moment + self.random.random() * length
        for host in HOSTS:
            draining = self.away_until.get(f"drain {host}")
            if draining is None and self._chance(40):
                self.happened["host drained"] += 1
                self.away_until[f"drain {host}"] = self.moment + self.random.random() * 6 * DAY
                self._in_transaction(lambda session, name=host: drain.drain(session, name))
            elif draining and (draining <= self.moment or self.moment > self.end - QUIET - DAY):
                del self.away_until[f"drain {host}"]
                self._in_transaction(lambda session, name=host: drain.resume(session, name))

    def _tick(self, calm: bool) -> None:
        seen = self.moment
        if not calm and self._chance(30):
            self.happened["clock stepped"] += 1
            seen += self.random.choice([-3 * DAY, -DAY / 12, DAY / 12, 2 * DAY, 40 * DAY])
        for _ in range(2):  # two beats
            try:
                ticks.give_up_missed(min(seen, self.moment))
                ticks.run_due(seen)
            except OperationalError:
                self.happened["tick broken off"] += 1

    @contextmanager
    def _transaction(self) -> Iterator[Session]:
        with transaction() as session:
            yield session
            if self.moment < self.end - QUIET and self.random.random() < 0.003:
                raise OperationalError("COMMIT", {}, Exception("the connection is gone"))

    # Workers

    def _copy(self, context: Context, server: Server, kind: Any, id_: str, **given: Any) -> Copied:
        folder = vault().folder(kind, server.id, id_)
        context.undo("remove_copy", folder=str(folder))
        folder.mkdir(parents=True)
        fate = self.random.random() if self.moment < self.end - QUIET else 1
        if fate < 0.03:
            self.happened["copy failed"] += 1
            raise errors.HostNotAnswering("as chance would have it")
        if fate < 0.035:
            self.happened["worker died"] += 1
            raise Killed
        return Copied(id_, server, given["about"].origin)

    def _work(self, host: str, most: int) -> None:
        """Do what the host is woken for, some of it twice."""
        settings().host = host
        row: Any = OutboxMessage
        query = select(OutboxMessage).where(row.queue == f"images.{host}").order_by(row.seq)
        with transaction() as session:
            messages = list(session.scalars(query.limit(most)))
            session.execute(delete(OutboxMessage).where(row.seq.in_([m.seq for m in messages])))
        for message in messages:
            operation_id = message.arguments["operation_id"]
            for _ in range(1 + (self.random.random() < 0.05)):
                self._one(operation_id)

    def _one(self, operation_id: str) -> None:
        try:
            runner.run(operation_id)
        except Killed:
            self.world.expire(operation_id)
            self._one(operation_id)
        operation = self.world.row(operation_id)
        self._compare(operation)

    def _compare(self, operation: Operation) -> None:
        """What an operation has changed among its server's images is what it may change (I4)."""
        row: Any = Image
        query = select(Image).where(row.server_id == operation.server_id, row.deleted_at.is_(None))
        with transaction() as session:
            after = {each.id: each for each in session.scalars(query)}
            keeps = {
                each.id: each.keep
                for each in session.scalars(
                    select(Schedule).where(Schedule.server_id == operation.server_id)  # type: ignore[arg-type]
                )
            }
        before = self.alive[operation.server_id]
        new, gone = after.keys() - before.keys(), before.keys() - after.keys()
        self.alive[operation.server_id] = after
        assert len(new) <= 1, "one operation, one image"
        if not new:
            assert not gone, "nothing goes before the new image is there"
            return
        image = after[new.pop()]
        self.made[str(operation.idempotency_key or operation.id)] += 1
        of = image.schedule_id
        counted = sorted(
            (each for each in before.values() if each.schedule_id == of and not each.pinned),
            key=lambda each: (each.created_at, each.id),
        )
        if of is None:
            assert not gone, "an image made by hand takes nobody's place"
        elif of in keeps:
            assert len(counted) - len(gone) + 1 >= min(keeps[of], len(counted) + 1)
        assert gone == {each.id for each in counted[: len(gone)]}, "the oldest of its schedule go"
        folder = vault().folder("image", operation.server_id, image.id)
        assert folder.is_dir()
        for id_ in gone:
            assert not vault().folder("image", operation.server_id, id_).exists()
            self.happened["image rotated"] += 1

    # Owners

    def _owners(self) -> None:
        if not self._up("database", calm=False):
            return
        for _ in range(max(1, self.servers // 50)):
            if self._chance(0.3):
                action: Callable[[str], None] = self.random.choice(
                    [self._set_one, self._set_one, self._pin, self._by_hand, self._disable]
                )
                action(self.random.choice(self.ids))

    def _set_one(self, server_id: str) -> None:
        self.happened["schedule set"] += 1
        self._set(server_id, self.random.choice(["daily", "weekly"]))

    def _set(self, server_id: str, kind: str, enabled: bool = True) -> None:
        at = f"{self.random.randint(0, 23):02}:{self.random.choice([0, 15, 30, 59]):02}"
        weekday = self.random.choice(WEEKDAYS) if kind == "weekly" else None
        zone = self.random.choice(ZONES)
        plan = {"at": at, "weekday": weekday, "timezone": zone, "enabled": enabled}
        moment = now()
        set_plan(server_id, kind, keep=self.random.randint(1, 8), **plan)
        known = self.promises.setdefault((server_id, kind), [])
        if known and known[-1].until is None:
            known[-1].until = moment
        if enabled:
            known.append(Promise(moment, (kind, at, weekday, zone)))

    def _disable(self, server_id: str) -> None:
        self.happened["schedule disabled"] += 1
        self._set(server_id, self.random.choice(["daily", "weekly"]), enabled=False)

    def _pin(self, server_id: str) -> None:
        if not self.alive[server_id]:
            return
        self.happened["image pinned or not"] += 1
        image = self.random.choice(list(self.alive[server_id].values()))
        image.pinned = not image.pinned
        row: Any = Image
        change = update(Image).where(row.id == image.id).values(pinned=image.pinned)
        self._in_transaction(lambda session: session.execute(change))

    def _by_hand(self, server_id: str) -> None:
        self.happened["image by hand"] += 1
        with suppress(errors.HostDraining):
            self.world.submit(CreateImage(server=server_id))

    def _in_transaction(self, work: Callable[[Session], Any]) -> None:
        with transaction() as session:
            work(session)

    # What is left to say

    def duplicates(self) -> list[str]:
        """Slots, or operations, that have made more than one image."""
        row: Any = ScheduleRun
        query = select(row.schedule_id, row.slot).group_by(row.schedule_id, row.slot)
        with transaction() as session:
            twice = session.execute(query.having(func.count() > 1)).all()
        return [*map(str, twice), *(key for key, count in self.made.items() if count > 1)]

    def gaps(self) -> list[str]:
        """Slots that were promised and of which there is no run that says what became of it."""
        found = []
        with transaction() as session:
            for (server_id, kind), promises in self.promises.items():
                schedule = session.scalars(
                    select(Schedule).where(Schedule.server_id == server_id, Schedule.kind == kind)  # type: ignore[arg-type]
                ).one()
                told, ranges = self._told(session, schedule.id)
                for promise in promises:
                    for slot in promise.slots(self.end - DAY):
                        covered = any(first <= slot <= last for first, last in ranges)
                        if slot not in told and not covered:
                            found.append(f"{kind} {slot} of {server_id}, {promise}")
        return found

    def _told(self, session: Session, schedule_id: str) -> tuple[set[Any], list[Any]]:
        row: Any = ScheduleRun
        told, ranges = set(), []
        for run in session.scalars(select(ScheduleRun).where(row.schedule_id == schedule_id)):
            explained = run.state == "succeeded" and run.image_id
            if explained or (run.state in ("failed", "skipped") and run.reason):
                told.add(run.slot)
                if run.first_slot:
                    ranges.append((run.first_slot, run.slot))
            self.happened[f"run {run.state}"] += 1
        return told, ranges


def _unsafe(connection: Any, _record: Any, _proxy: Any) -> None:
    """This database need not outlive a power cut."""
    connection.execute("PRAGMA synchronous=OFF")
