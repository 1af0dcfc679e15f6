"""What must hold when a revert or restore comes to its turn, and what may have come between."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from live_server import SIZE, Live, live  # noqa: F401
from operations.spine import database_url, environment, world  # noqa: F401
from sqlalchemy import update

from lab.guest import Guest, make_disk
from shared.commands import (
    Command,
    CreateClones,
    CreateImage,
    PromoteSnapshot,
    RestoreImage,
    RevertSnapshot,
    TakeSnapshot,
)
from shared.database import now, transaction
from shared.disks.overlays import create_overlay
from shared.models import Image, Operation, Server
from shared.operations import runner

pytestmark = pytest.mark.vm


def ended(live: Live, operation: str) -> Operation:  # noqa: F811
    runner.run(operation)
    return live.world.row(operation)


def code(operation: Operation) -> str:
    assert operation.state == "failed"
    return str((operation.error or {})["code"])


@pytest.mark.parametrize("what", ["restore", "clone"])
def test_an_image_found_damaged_meanwhile_is_not_used(live: Live, what: str) -> None:  # noqa: F811
    """It was whole when it was asked for, and a verification ahead of it in the line found out."""
    image = live.succeeds(CreateImage(server=live.server.id))["image"]
    command: Command = RestoreImage(image=image)
    if what == "clone":
        source: Any = {"kind": "image", "id": image}
        command = CreateClones(source=source, name=f"{live.guest.name}-c", start=False)
    waiting = live.world.submit(command)
    live.disk.write_bytes(b"x" * SIZE)
    with transaction() as session:
        session.execute(update(Image).values(state="damaged"))

    assert code(ended(live, waiting)) == "image_not_usable"
    assert live.disk.read_bytes() == b"x" * SIZE


@pytest.mark.parametrize("what", ["revert", "promote", "clone"])
def test_another_snapshot_than_the_one_meant_is_not_used(live: Live, what: str) -> None:  # noqa: F811
    """One that waited ahead took its place: the server is left as it is."""
    source: Any = {"kind": "snapshot", "id": live.server.id}
    commands: dict[str, Command] = {
        "revert": RevertSnapshot(server=live.server.id),
        "promote": PromoteSnapshot(server=live.server.id),
        "clone": CreateClones(source=source, name=f"{live.guest.name}-c", start=False),
    }
    live.succeeds(TakeSnapshot(server=live.server.id))
    waiting = live.world.submit(commands[what])
    live.disk.write_bytes(b"x" * SIZE)
    live.world.change(waiting, state="failed")  # out of the line, for what came ahead
    newer = live.succeeds(TakeSnapshot(server=live.server.id, replace=True))["snapshot"]
    live.world.change(waiting, state="queued")
    live.disk.write_bytes(b"y" * SIZE)

    refused = ended(live, waiting)

    assert code(refused) == "snapshot_not_found"
    assert newer in (refused.error or {})["message"]
    assert live.disk.read_bytes() == b"y" * SIZE


def test_an_image_of_an_earlier_registration_is_restored(live: Live) -> None:  # noqa: F811
    """In the line of the server that is registered for the domain now, which stays so."""
    image = live.succeeds(CreateImage(server=live.server.id))["image"]
    again = Server(name="again", host="kvm-1", domain_uuid=live.server.domain_uuid)
    with transaction() as session:
        session.execute(update(Server).values(forgotten_at=now()))
    live.world.add(again)
    live.disk.write_bytes(b"x" * SIZE)

    waiting = live.world.submit(RestoreImage(image=image))
    assert live.world.row(waiting).server_id == again.id
    restored = ended(live, waiting)

    assert restored.state == "succeeded", restored.error
    assert live.disk.read_bytes() == bytes(SIZE)
    with transaction() as session:
        assert session.get_one(Server, live.server.id).forgotten_at is not None
        assert session.get_one(Server, again.id).forgotten_at is None


def keeps(live: Live, command: Command, other: Guest) -> None:  # noqa: F811
    """Demand that the other's disk, with what is on it by now, is not replaced."""
    live.disk.write_bytes(b"x" * SIZE)
    try:
        refused = live.done(command)
        assert live.disk.read_bytes() == b"x" * SIZE
    finally:
        other.remove()
    assert code(refused) == "disk_in_use"
    assert other.name in (refused.error or {})["message"]


@pytest.mark.parametrize("has", ["the disk", "an overlay on it"])
def test_a_disk_that_another_domain_was_given_is_not_replaced(
    live: Live,  # noqa: F811
    workspace: Path,
    hypervisor: Any,
    has: str,
) -> None:
    """The domain is gone and its disk another's, which is off: that may be all there is of it."""
    image = live.succeeds(CreateImage(server=live.server.id))["image"]
    live.guest.domain.undefine()
    disk = live.disk
    if has != "the disk":
        disk = workspace / "overlay.qcow2"
        create_overlay(live.disk, "raw", disk)
    keeps(live, RestoreImage(image=image), Guest.create(hypervisor, workspace, None, [str(disk)]))


@pytest.mark.parametrize("what", ["restore", "revert"])
def test_a_disk_that_the_server_has_no_more_is_not_replaced(
    live: Live,  # noqa: F811
    workspace: Path,
    hypervisor: Any,
    what: str,
) -> None:
    """It was given to another domain, which is off, and the server has another one."""
    image = live.succeeds(CreateImage(server=live.server.id))["image"]
    live.succeeds(TakeSnapshot(server=live.server.id))
    definition = live.guest.xml
    source: Any = definition.find("devices/disk/source")
    source.set("file", str(make_disk(workspace, "raw", "blank", SIZE)))
    live.guest.connection.defineXML(ElementTree.tostring(definition, "unicode"))
    command = {
        "restore": RestoreImage(image=image),
        "revert": RevertSnapshot(server=live.server.id),
    }[what]
    keeps(live, command, Guest.create(hypervisor, workspace, None, [str(live.disk)]))


def test_a_lost_directory_is_named(live: Live, workspace: Path, hypervisor: Any) -> None:  # noqa: F811
    """A restore makes none: what belongs there may not be mounted. Once it is there, it does."""
    folder = workspace / "web"
    folder.mkdir()
    disk = make_disk(folder, "raw", "blank", SIZE)
    guest = Guest.create(hypervisor, workspace, None, [str(disk)])
    server = Server(name=guest.name, host="kvm-1", domain_uuid=guest.domain.UUIDString())
    live.world.add(server)
    image = live.succeeds(CreateImage(server=server.id))["image"]
    guest.domain.undefine()
    shutil.rmtree(folder)

    refused = live.done(RestoreImage(image=image))

    assert code(refused) == "disk_folder_missing"
    assert str(folder) in (refused.error or {})["message"]
    assert not folder.exists()
    folder.mkdir()
    live.succeeds(RestoreImage(image=image))
    assert disk.read_bytes() == bytes(SIZE)
    guest.remove()
