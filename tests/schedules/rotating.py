"""A server whose images are made, verified, pinned, used and deleted as they are in earnest.

Database, operations, journal, rotation and the API's own changes are real. Faked is the edge of
the disk alone: a copy is a folder, and an image is rotten if a file in it says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from operations.spine import Killed, World
from sqlalchemy import select

from services.api.images import Change, _change
from services.api.schedules import Plan, _put
from services.imager import images, verification
from shared import (
    faults,
    recovery,  # noqa: F401  registers the journal's actions
)
from shared.commands import CreateImage, DeleteImage, RestoreImage, VerifyImage
from shared.copying import Stored, vault
from shared.database import reading, transaction
from shared.disks.errors import CopyFailed
from shared.ids import new_id
from shared.manifest import Manifest, ManifestAbout, ManifestServer
from shared.models import Image, Schedule, ScheduleRun, Server
from shared.operations import journal, runner
from shared.operations.cancel import cancel
from shared.operations.context import Context
from shared.operations.submit import submit

START = datetime(2026, 1, 1, tzinfo=UTC)
ROTTEN = "rotten"
_NUMBERS = count()


class Disk:
    """The edge: what the copy engine and the reading of a copy come to, as each test wants it."""

    def __init__(self, world: World, patch: pytest.MonkeyPatch) -> None:
        self.moment = START
        self.outcome = "sound"
        """What the next copy comes to: sound, rotten, or failed."""
        self.dies_at: str | None = None
        """The fault point at which the worker is killed, once."""
        self.meanwhile: Callable[[], object] = lambda: None
        """Called once, while the next copy is made."""
        self.removing: Callable[[Path], object] = lambda folder: None
        """Called before a copy's folder is removed for good."""
        patch.setattr(images, "copy_server", self._copy)
        patch.setattr(verification, "_faults", self._read)
        patch.setattr(faults, "point", self._point)
        patch.setattr(runner, "flush_if_possible", lambda: None)  # no broker is needed here
        remove = journal._ACTIONS["remove_copy"]

        def watched(folder: str) -> None:
            self.removing(Path(folder))
            remove(folder=folder)

        patch.setitem(journal._ACTIONS, "remove_copy", watched)
        for command, handler in (
            (CreateImage, images.create),
            (DeleteImage, images.delete),
            (VerifyImage, verification.verify),
        ):
            world.handler(handler, command.kind)

    def _copy(
        self,
        context: Context,
        server: Server,
        kind: Any,
        copy_id: str,
        *,
        quiesce: str,
        about: ManifestAbout,
    ) -> Stored:
        folder = vault().folder(kind, server.id, copy_id)
        context.undo("remove_copy", folder=str(folder))
        folder.mkdir(parents=True)
        meanwhile, self.meanwhile = self.meanwhile, lambda: None
        meanwhile()
        if self.outcome == "failed":
            raise CopyFailed("the disk could not be read")
        if self.outcome == ROTTEN:
            (folder / ROTTEN).touch()
        return Stored(
            Manifest(
                kind=kind,
                id=copy_id,
                server=ManifestServer(id=server.id, name=server.name, uuid=server.domain_uuid),
                about=about,
                taken_at=self.moment,
                way="reflink",
                consistency="crash",
                disks=[],
            )
        )

    def _read(self, context: Context, folder: Path) -> list[dict[str, Any]]:
        return [{"file": "vda", "fault": ROTTEN}] if (folder / ROTTEN).exists() else []

    def _point(self, name: str) -> None:
        if name == self.dies_at:
            self.dies_at = None
            raise Killed


@dataclass
class Site:
    """A server with a daily and a weekly schedule, and what there is of its images."""

    world: World
    disk: Disk
    server: Server
    schedules: dict[str, str]
    """By kind, the id."""

    def schedule(self, kind: str = "daily") -> Schedule:
        with reading() as session:
            return session.get_one(Schedule, self.schedules[kind])

    def there(self, kind: str | None = None) -> list[Image]:
        """The images that there are, oldest first; those of one schedule if it is given."""
        row: Any = Image
        query = select(Image).where(row.server_id == self.server.id, row.deleted_at.is_(None))
        if kind:
            query = query.where(row.schedule_id == self.schedules[kind])
        with reading() as session:
            return list(session.scalars(query.order_by(row.created_at, row.id)))

    def ids(self, kind: str | None = None) -> list[str]:
        return [each.id for each in self.there(kind)]

    def folder(self, image: str) -> Path:
        return vault().folder("image", self.server.id, image)

    # What happens

    def asked_for(self, kind: str | None) -> str:
        """An image that a schedule's slot, or a person, asks for; the operation."""
        with transaction() as session:
            command = CreateImage(server=self.server.id)
            operation = submit(session, command, requested_by="test").id
            if kind:
                slot = START + timedelta(microseconds=next(_NUMBERS))
                run = ScheduleRun(schedule_id=self.schedules[kind], slot=slot, state="running")
                run.operation_id = operation
                session.add(run)
        return operation

    def run(self, kind: str | None = "daily", hours: float = 24) -> str | None:
        """Have an image made, so long after the one before; its id, or None if that failed."""
        self.moved(hours)
        return self.end(self.asked_for(kind))

    def moved(self, hours: float) -> None:
        """Let so much time have passed, by the database's clock."""
        self.disk.moment += timedelta(hours=hours)

    def cancel(self, operation: str) -> None:
        with transaction() as session:
            cancel(session, operation)

    def end(self, operation: str) -> str | None:
        try:
            runner.run(operation)
        except Killed:
            runner.run(operation)  # a worker that starts finds what the dead one left
        row = self.world.row(operation)
        assert row.state in ("succeeded", "failed"), row
        return row.result["image"] if row.result else None

    @contextmanager
    def used(self, image: str) -> Iterator[None]:
        """While an operation that will read it waits in the server's line."""
        waiting = self.restore_is_asked_for(image)
        yield
        self.cancel(waiting)

    def restore_is_asked_for(self, image: str) -> str:
        with transaction() as session:
            return submit(session, RestoreImage(image=image), requested_by="test").id

    def pin(self, image: str, pinned: bool = True) -> None:
        with transaction() as session:
            _change(session, image, Change(pinned=pinned))

    def delete(self, image: str) -> None:
        runner.run(self.world.submit(DeleteImage(image=image)))

    def verify(self, image: str) -> None:
        runner.run(self.world.submit(VerifyImage(image=image)))

    def rot(self, image: str) -> None:
        (self.folder(image) / ROTTEN).touch()

    def plan(self, kind: str = "daily", **fields: Any) -> None:
        """Set the schedule as the API does; what is not given stays as it is."""
        now = self.schedule(kind)
        same = {name: getattr(now, name) for name in ("at", "timezone", "weekday", "keep")}
        with transaction() as session:
            given = {**same, "require": now.require, "enabled": False, **fields}
            _put(session, self.server.id, kind, Plan(**given))


def site(world: World, disk: Disk, **daily: Any) -> Site:
    """A server to which nothing has happened yet; the daily schedule keeps three."""
    server = world.server(new_id("name"))
    common = {"server_id": server.id, "at": "03:00", "timezone": "UTC", "catch_up_s": 60}
    schedules = [
        Schedule(kind="daily", **{**common, "keep": 3, **daily}),
        Schedule(kind="weekly", weekday="sun", keep=2, **common),
    ]
    world.add(*schedules)
    return Site(world, disk, server, {each.kind: each.id for each in schedules})
