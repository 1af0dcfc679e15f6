"""Farms as the cloner leaves them: rows, domains, disks; and what became of them."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from operations.spine import HOST, Killed, World, vault_of_its_own
from sqlalchemy import select

from lab.guest import Guest, attach, make_disk
from lab.libvirtd import Hypervisor
from services.api.servers import _forget
from services.cloner import farms, removal
from shared import faults, recovery  # noqa: F401  registers the journal's actions
from shared.commands import Command
from shared.database import reading, transaction
from shared.disks.overlays import create_overlay
from shared.models import Clone, Farm, JournalEntry, Operation, Server
from shared.operations import runner

SIZE = 64 * 1024


@dataclass
class Made:
    """One clone, and its VM."""

    clone: Clone
    server: Server
    guest: Guest
    disk: Path

    @property
    def is_whole(self) -> bool:
        """As it was made."""
        there = self.guest.state() != "missing" and self.disk.exists()
        return there and self.disk.stat().st_size == SIZE

    @property
    def is_gone(self) -> bool:
        return self.guest.state() == "missing" and not self.disk.exists()


def plug(guest: Guest, disk: Path, target: str = "vdb", fmt: str = "raw") -> None:
    """Give the domain another disk, for its next start."""
    guest.domain.attachDeviceFlags(
        f"<disk type='file' device='disk'><driver name='qemu' type='{fmt}'/>"
        f"<source file='{disk}'/><target dev='{target}' bus='virtio'/></disk>",
        2,  # VIR_DOMAIN_AFFECT_CONFIG
    )


class Farmed:
    def __init__(self, world: World, hypervisor: Hypervisor, folder: Path) -> None:
        self.world = world
        self.hypervisor = hypervisor
        self.disks = folder / "disks"
        self.disks.mkdir()
        vault_of_its_own()
        self.source = world.server("golden")
        self.guests: list[Guest] = []

    def remove(self) -> None:
        for guest in self.guests:
            guest.remove()

    def guest(self, name: str | None = None, disks: list[Path] | None = None) -> Guest:
        paths = disks or [self.disk()]
        made = Guest.create(self.hypervisor, self.disks, name, [str(each) for each in paths])
        self.guests.append(made)
        return made

    def adopt(self, name: str) -> None:
        """Remove that VM, too, in the end."""
        self.guests.append(attach(self.hypervisor, name))

    def disk(self, fmt: str = "raw") -> Path:
        return make_disk(self.disks, fmt, "blank", SIZE)

    def farm(self, count: int = 2, **fields: Any) -> tuple[Farm, list[Made]]:
        """A farm of that many clones that are ready, and off."""
        pattern = f"triptych-lab-{secrets.token_hex(3)}-{{n}}"
        source = {"kind": "server", "id": self.source.id}
        given = {"command": {"source": source, "name": pattern, "count": count}, **fields}
        farm = Farm(
            name=pattern, host=HOST, server_id=self.source.id, operation_id="op_made", **given
        )
        self.world.add(farm)
        return farm, [self.clone(farm, n) for n in range(1, count + 1)]

    def clone(self, farm: Farm, number: int) -> Made:
        guest = self.guest(farm.name.format(n=number))
        server = Server(name=guest.name, host=HOST, domain_uuid=guest.domain.UUIDString())
        self.world.add(server)
        clone = self.row(
            farm, guest.name, "ready", server_id=server.id, files=[str(guest.disks[0])]
        )
        return Made(clone, server, guest, guest.disks[0])

    def linked_farm(self, count: int) -> tuple[Farm, list[Made], Path]:
        """A farm whose clones have a second disk each, which stands on a base."""
        farm, made = self.farm(count)
        base = make_disk(self.disks, "raw", "blank", SIZE)
        for each in made:
            overlay = base.with_name(f"{each.guest.name}-vdb.qcow2")
            create_overlay(base, "raw", overlay)
            plug(each.guest, overlay, fmt="qcow2")
            with transaction() as session:
                clone = session.get_one(Clone, each.clone.id)
                clone.linked_to, clone.files = [str(base)], [str(each.disk), str(overlay)]
        return farm, made, base

    def row(self, farm: Farm, name: str, state: str, **fields: Any) -> Clone:
        source = farm.command["source"]
        clone = Clone(
            farm_id=farm.id,
            operation_id="op_made",
            host=HOST,
            name=name,
            source_kind=source["kind"],
            source_id=source["id"],
            state=state,
            **fields,
        )
        self.world.add(clone)
        return clone

    def done(self, command: Command) -> Operation:
        """The operation, when it has ended, well or not."""
        operation = self.world.submit(command)
        runner.run(operation)
        ended = self.world.row(operation)
        assert ended.finished_at, (ended.phase, ended.error)
        self.is_tidy()
        return ended

    def is_tidy(self) -> None:
        """Nothing is set aside, nothing held, nothing left to do."""
        row: Any = Server
        assert [each.name for each in self.disks.glob(".triptych-*")] == []
        with reading() as session:
            assert list(session.scalars(select(Server).where(row.held_by.is_not(None)))) == []
            assert list(session.scalars(select(JournalEntry))) == []

    def states(self, farm: Farm) -> dict[str, str]:
        """The clones' states, by name."""
        row: Any = Clone
        with reading() as session:
            query = select(Clone).where(row.farm_id == farm.id)
            return {each.name: each.state for each in session.scalars(query)}


@contextmanager
def forgotten_before_it_is_held(made: Made) -> Iterator[None]:
    """Forget a clone's server when an operation knows which clones there are, and holds none."""
    real = farms.hold

    def hold(*arguments: Any) -> Any:
        with transaction() as session:
            assert _forget(session, made.server.id).id == made.server.id
        return real(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(farms, "hold", hold)
        patch.setattr(removal, "hold", hold)
        yield


def outcomes(operation: Operation) -> dict[str, dict[str, Any]]:
    """Each clone's outcome, by name."""
    assert operation.result, operation.error
    return {each["name"]: each for each in operation.result["clones"]}


@contextmanager
def passing() -> Iterator[list[str]]:
    """The points that are passed meanwhile."""
    passed: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(faults, "point", passed.append)
        yield passed


@contextmanager
def killed_at(point: str, nth: int = 1) -> Iterator[None]:
    """Die at a point, the nth time that it is passed."""
    left = [nth]

    def die(name: str) -> None:
        if name == point:
            left[0] -= 1
            if not left[0]:
                raise Killed(name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(faults, "point", die)
        with pytest.raises(Killed):
            yield
