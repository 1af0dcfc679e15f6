"""A year in the life of many servers, on a clock of its own.

Real are the schedules, the ticks, the engine of operations, rotation and the database. Faked is
a copy alone: an empty folder in the vault. Beat, hosts and database are away at random, for
minutes or weeks; copies fail, workers die within them, clocks step, hosts drain, and owners pin,
delete nothing, change their minds and make images by hand. All of it by a seed. Mostly one thing
happens after the other; at random hours two beats and three imagers are at it at once, each with
all the messages.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import pytest
from operations.spine import Killed, World, at_once
from schedules.planned import set_plan
from sqlalchemy import bindparam, delete, event, select, update
from sqlalchemy.exc import OperationalError
from sqlmodel import Session

from services.imager import images, ticks
from shared import database, errors, recovery  # noqa: F401  the journal's actions
from shared.commands import CreateImage
from shared.copying import vault
from shared.database import now, reading, transaction
from shared.models import Host, Image, Operation, OutboxMessage, Schedule, Server
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
_image: Any = Image
_operation: Any = Operation
_schedule: Any = Schedule
_message: Any = OutboxMessage
_ALIVE = (
    select(_image.id, _image.schedule_id, _image.pinned, _schedule.keep)
    .join(Schedule, _schedule.id == _image.schedule_id, isouter=True)
    .where(_image.server_id == bindparam("server"), _image.deleted_at.is_(None))
)
_WOKEN = (
    select(_message.seq, _operation.id, _operation.server_id, _operation.idempotency_key)
    .join(Operation, _operation.id == _message.arguments["operation_id"].as_string())
    .where(_message.queue == bindparam("queue"))
    .order_by(_message.seq)
    .limit(bindparam("most"))
)


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


class Alive(NamedTuple):
    """An image that there is, and how many of its schedule's there may be."""

    id: str
    schedule_id: str | None
    pinned: bool
    keep: int | None


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
    violations: list[str] = field(default_factory=list)
    happened: Counter[str] = field(default_factory=Counter)
    away_until: dict[str, datetime] = field(default_factory=dict)
    alive: dict[str, dict[str, Alive]] = field(default_factory=lambda: defaultdict(dict))
    """By server and id, in the order in which they came."""

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.end = BEGIN + self.days * DAY
        self.patch.setattr(images, "copy_server", self._copy)
        self.patch.setattr(ticks, "transaction", self._transaction)
        self.patch.setattr("shared.vault.sync", lambda _path: None)
        for module in (ticks, runner):
            self.patch.setattr(module, "flush_if_possible", lambda: True)
        event.listen(database.engine(), "connect", _unsafe)
        database.engine().dispose()
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

    def run(self, told: Callable[[Year], None] = lambda _: None) -> None:
        """Let the year go by; `told` is called after each hour."""
        while self.moment < self.end:
            self._clock(self.moment + STEP)
            calm = self.moment > self.end - QUIET
            if not calm:
                self._troubles()
                self._owners()
            if self._up("database", calm):
                self._an_hour(calm)
            told(self)

    def _an_hour(self, calm: bool) -> None:
        crowded = not calm and self._chance(2)
        beat = self._up("beat", calm)
        if beat and not crowded:
            self._tick(calm)
            self._tick(calm)  # two beats
        for host in HOSTS:
            if self._up(host, calm):
                most = 10**6 if calm else self.random.randint(0, self.servers)
                if crowded:
                    self._crowd(host, most, beat)
                else:
                    self._work(host, most)

    def _up(self, what: str, calm: bool) -> bool:
        return calm or self.away_until.get(what, BEGIN) <= self.moment

    def _chance(self, days: float) -> bool:
        """Of what happens once in so many days."""
        return self.random.random() < STEP / (days * DAY)

    def _troubles(self) -> None:
        certain = self.moment == BEGIN + 10 * DAY  # also in a part of a year
        for what, days in (("beat", 12), ("database", 25), *((host, 15) for host in HOSTS)):
            if self._chance(days) or certain:
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
        # The same whichever imager comes first.
        attempt = f"{server.name} {given['about'].origin} {context.operation.attempt}"
        fate = random.Random(f"{self.seed} {self.moment} {attempt}").random()
        if self.moment >= self.end - QUIET:
            fate = 1
        if fate < 0.03:
            self.happened["copy failed"] += 1
            raise errors.HostNotAnswering("as chance would have it")
        if fate < 0.035:
            self.happened["worker died"] += 1
            raise Killed
        return Copied(id_, server, given["about"].origin)

    def _woken(self, host: str, most: int) -> list[Any]:
        """The messages that the host gets now, with what they are about."""
        settings().host = host
        with reading() as session:
            found = session.execute(_WOKEN, {"queue": f"images.{host}", "most": most}).all()
        return list(found)

    def _taken(self, messages: list[Any]) -> None:
        if messages:
            taken = delete(OutboxMessage).where(_message.seq.in_([each.seq for each in messages]))
            self._in_transaction(lambda session: session.execute(taken))

    def _work(self, host: str, most: int) -> None:
        """Do what the host is woken for, some of it twice."""
        messages = self._woken(host, most)
        self._taken(messages)
        for message in messages:
            for _ in range(1 + (self.random.random() < 0.05)):
                self._one(message.id)
            self._compare(message)

    def _crowd(self, host: str, most: int, beat: bool) -> None:
        """Three imagers that all get the same messages, and two beats, at once."""
        self.happened["crowded hour"] += 1
        first = {each.server_id: each for each in reversed(self._woken(host, most))}
        messages = list(first.values())  # one of each server; what these wake comes later
        self._taken(messages)

        def imager() -> None:
            for message in random.sample(messages, len(messages)):
                self._one(message.id)

        def one_beat() -> None:
            ticks.give_up_missed(self.moment)
            ticks.run_due(self.moment)

        with self.patch.context() as patch:
            patch.setattr(ticks, "transaction", transaction)
            at_once(*[imager] * 3, *[one_beat] * (2 if beat else 0))
        for message in messages:
            self._compare(message)

    def _one(self, operation_id: str) -> None:
        try:
            runner.run(operation_id)
        except Killed:
            self._one(operation_id)

    def _expect(self, holds: bool, rule: str, operation: Any) -> None:
        if not holds:
            self.violations.append(f"{rule}: {operation.id} of {operation.server_id}")

    def _compare(self, operation: Any) -> None:
        """What an operation has changed among its server's images is what it may change (I4)."""
        with reading() as session:
            found = session.execute(_ALIVE, {"server": operation.server_id})
            after = {row.id: Alive(*row) for row in found}
        before = self.alive[operation.server_id]
        new = [each for id_, each in after.items() if id_ not in before]
        gone = [each for id_, each in before.items() if id_ not in after]
        stay = {id_: after[id_] for id_ in before if id_ in after}
        self.alive[operation.server_id] = {**stay, **{each.id: each for each in new}}
        if not new:
            self._expect(not gone, "nothing goes before the new image is there", operation)
            return
        self._expect(len(new) == 1, "one operation, one image", operation)
        self.made[operation.idempotency_key or operation.id] += len(new)
        self._compare_rotated(operation, new[0], list(before.values()), gone)

    def _compare_rotated(
        self, operation: Any, new: Alive, before: list[Alive], gone: list[Alive]
    ) -> None:
        of = [each for each in before if each.schedule_id == new.schedule_id and not each.pinned]
        self._expect(gone == of[: len(gone)], "the oldest go", operation)
        if new.keep is None:
            self._expect(not gone, "an image by hand takes nobody's place", operation)
        else:
            kept = len(of) - len(gone) + 1
            self._expect(kept == min(new.keep, len(of) + 1), "so many are kept", operation)
        folder = vault().folder("image", operation.server_id, new.id)
        self._expect(folder.is_dir(), "it is in the vault", operation)
        for each in gone:
            self.happened["image rotated"] += 1
            left = folder.with_name(each.id).exists()
            self._expect(not left, "what goes is gone from the vault", operation)

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
        self.alive[server_id][image.id] = image._replace(pinned=not image.pinned)
        change = update(Image).where(_image.id == image.id).values(pinned=not image.pinned)
        self._in_transaction(lambda session: session.execute(change))

    def _by_hand(self, server_id: str) -> None:
        self.happened["image by hand"] += 1
        with suppress(errors.HostDraining):
            self.world.submit(CreateImage(server=server_id))

    def _in_transaction(self, work: Callable[[Session], Any]) -> None:
        with transaction() as session:
            work(session)


def _unsafe(connection: Any, _record: Any) -> None:
    """This database need not outlive a power cut."""
    connection.execute("PRAGMA synchronous=OFF")
