"""What the doctor's tests make, damage and look at."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from operations.spine import HOST, World, vault_of_its_own
from sqlalchemy import select

from lab.guest import Guest, make_disk
from lab.libvirtd import Hypervisor
from shared import doctor
from shared.copying import Stored
from shared.database import now, transaction
from shared.disks import setaside
from shared.doctor.findings import Finding
from shared.manifest import Manifest, ManifestAbout, ManifestDisk, ManifestServer
from shared.models import Operation, Server
from shared.operations import claim, journal, presence
from shared.settings import settings

SIZE = 64 * 1024


class Patient:
    """One host, with servers that libvirt knows and copies that are as they should be."""

    def __init__(self, world: World, hypervisor: Hypervisor, folder: Path) -> None:
        self.world = world
        self.hypervisor = hypervisor
        self.disks = folder / "disks"
        self.disks.mkdir()
        self.vault = vault_of_its_own()
        self.guests: list[Guest] = []

    def remove(self) -> None:
        for guest in self.guests:
            guest.remove()

    # Making

    def guest(self, name: str | None = None, disk: Path | None = None) -> Guest:
        """A domain that is off, with one raw disk."""
        path = disk or make_disk(self.disks, "raw", "blank", SIZE)
        made = Guest.create(self.hypervisor, self.disks, name, [str(path)])
        self.guests.append(made)
        return made

    def server(self, guest: Guest | None = None) -> Server:
        """A registered server."""
        domain = (guest or self.guest()).domain
        made = Server(name=domain.name(), host=HOST, domain_uuid=domain.UUIDString())
        self.world.add(made)
        return made

    def copy(
        self, kind: Any, copy_id: str, server: Server, *, row: bool = True, name: str | None = None
    ) -> Path:
        """A whole copy of one raw disk, and its row unless told otherwise; returns its folder."""
        manifest = Manifest(
            kind=kind,
            id=copy_id,
            server=ManifestServer(id=server.id, name=server.name, uuid=server.domain_uuid),
            about=ManifestAbout(name=name or copy_id),
            taken_at=now() - timedelta(hours=1),
            way="reflink",
            consistency="file-system",
            disks=[
                ManifestDisk(
                    target="vda", file="vda.raw", format="raw", virtual_bytes=512, bytes=4096
                )
            ],
        )
        with self.vault.begin(kind, server.id, copy_id) as partial:
            (partial.path / "vda.raw").write_bytes(b"x" * 512)
            folder = partial.publish(manifest, "<domain/>")
        if row:
            stored = Stored(manifest)
            self.world.add(stored.snapshot_row() if kind == "snapshot" else stored.image_row())
        return folder

    def reverted(self, server: Server, guest: Guest, **values: Any) -> tuple[Operation, Path]:
        """A revert that exchanged the guest's disk and set the old one aside, for a day."""
        operation_id = self.world.snapshot_of(server)
        (path,) = guest.disks
        live = {"vda": path}
        (new,) = setaside.prepare(live, operation_id).values()
        new.write_bytes(b"reverted".ljust(SIZE, b"."))
        setaside.swap(live, operation_id)
        undo = {"live": {"vda": str(path)}, "previous": None, "missing": []}
        ended = {"state": "succeeded", "finished_at": now(), "committed": True, "undo": undo}
        until = now() + timedelta(hours=23)
        self.world.change(operation_id, **{**ended, "undo_until": until, **values})
        return self.world.row(operation_id), setaside.folder_of(path, operation_id)

    def abandoned(self, server: Server, *steps: tuple[str, dict[str, Any]], **values: Any) -> str:
        """An operation whose worker died after it had written these steps down."""
        operation_id = self.world.snapshot_of(server)
        owner = f"{settings().host}/snapshotter/dead"
        presence._made()
        presence._file(owner).touch()  # locked by nobody, as after SIGKILL
        assert claim.claim(operation_id, owner)
        with transaction() as session:
            side: Any = "redo" if values.get("committed") else "undo"
            for action, arguments in steps:
                journal.write(session, operation_id, side, action, **arguments)
        if values:
            self.world.change(operation_id, **values)
        return operation_id

    @contextlib.contextmanager
    def at_work(self, server: Server, *steps: tuple[str, dict[str, Any]]) -> Iterator[str]:
        """An operation that a worker, this process, is at."""
        operation_id = self.world.snapshot_of(server)
        with presence.attempt("snapshotter") as owner:
            assert claim.claim(operation_id, owner)
            with transaction() as session:
                for action, arguments in steps:
                    journal.write(session, operation_id, "undo", action, **arguments)
            yield operation_id

    # Examining

    def is_healthy(self) -> None:
        assert [each.told() for each in doctor.examine()] == []

    def finds(self, check: str, subject: str, *words: str) -> Finding:
        """Demand this one finding and no other, and that looking has changed nothing."""
        before = self.trace()
        first = doctor.examine()
        (found,) = doctor.examine()
        assert [each.told() for each in first] == [found.told()]
        assert before == self.trace()
        assert (check, subject, False) == (found.check, found.subject, found.fixed)
        assert [word for word in words if word not in f"{found.detail}. {found.remedy}"] == []
        return found

    def mends(self, check: str, subject: str, *words: str) -> None:
        """Demand this one finding, that it is fixed, and that nothing differs afterwards."""
        found = self.finds(check, subject, *words)
        assert found.remedy.startswith("--fix ")
        doctor.repair([found])
        assert found.fixed, found.remedy
        self.is_healthy()

    def leaves(self, check: str, subject: str, *words: str) -> None:
        """Demand this one finding, and that it is left to a person, all files as they were."""
        found = self.finds(check, subject, *words)
        before = self.trace()
        doctor.repair([found])
        assert before == self.trace()
        self.finds(check, subject, *words)

    def trace(self) -> dict[str, tuple[int, int]]:
        """Mode and inode of all files of the vault and beside the disks, and the rows."""
        found = {}
        for root in (self.vault.root, self.disks):
            for path in root.rglob("*"):
                status = path.lstat()
                found[str(path)] = (status.st_mode, status.st_ino)
        with transaction() as session:
            for each in session.scalars(select(Operation)):
                found[each.id] = (hash(each.state), hash(str(each.owner)))
        return found


def writable(path: Path) -> Path:
    """A file of a copy, after somebody has made it writable."""
    path.chmod(0o600)
    return path


def seal(path: Path) -> None:
    """As the vault does."""
    path.chmod(0o400)
    assert os.access(path, os.R_OK)
