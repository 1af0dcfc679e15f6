"""What must hold when a revert or restore comes to its turn, and what may have come between."""

from __future__ import annotations

import errno
import shutil
import subprocess
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import libvirt
import pytest
from live_server import SIZE, Live, live  # noqa: F401
from operations.spine import database_url, environment, world  # noqa: F401
from sqlalchemy import event, select, update

from lab.guest import Guest, make_disk
from shared import faults
from shared.commands import (
    Command,
    CreateClones,
    CreateImage,
    PromoteSnapshot,
    RestoreImage,
    RevertSnapshot,
    TakeSnapshot,
    UndoRestore,
    UndoRevert,
)
from shared.copying import vault
from shared.database import engine, now, reading, transaction
from shared.disks import images, planning
from shared.disks.digest import digest
from shared.disks.overlays import create_overlay
from shared.hypervisor import domains, undo
from shared.hypervisor.connection import connect
from shared.hypervisor.locks import is_open
from shared.manifest import read_manifest, write_manifest
from shared.models import Image, Operation, Server
from shared.operations import runner
from shared.operations.tasks import forget_due

pytestmark = pytest.mark.vm
DRIVE = (
    "<disk type='file' device='cdrom'><driver name='qemu' type='raw'/>{}"
    "<target dev='sdz' bus='sata'/><readonly/></disk>"
)
"""Of a CD, without or with its source."""


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


def test_an_undo_that_was_asked_for_in_time_is_carried_out(live: Live) -> None:  # noqa: F811
    """Its turn came when the time was over; what drops what was set aside stands behind it."""
    live.succeeds(TakeSnapshot(server=live.server.id))
    live.disk.write_bytes(b"x" * SIZE)
    revert = live.done(RevertSnapshot(server=live.server.id))
    undo = live.world.submit(UndoRevert(operation=revert.id))
    live.world.change(revert.id, undo_until=now() - timedelta(seconds=1))
    forget_due()
    row: Any = Operation
    with reading() as session:
        queued = list(
            session.scalars(select(row.id).where(row.state == "queued").order_by(row.seq))
        )
    assert len(queued) == 2

    states = [ended(live, each).state for each in queued]

    assert queued[0] == undo
    assert states == ["succeeded", "succeeded"]
    assert live.disk.read_bytes() == b"x" * SIZE


@pytest.mark.parametrize("what", ["restore", "revert", "undo"])
def test_a_disk_that_another_domain_stands_on_is_not_replaced(
    live: Live,  # noqa: F811
    workspace: Path,
    hypervisor: Any,
    what: str,
) -> None:
    """The server is a template: an overlay on its disk is another VM's, which is off."""
    image = live.succeeds(CreateImage(server=live.server.id))["image"]
    live.succeeds(TakeSnapshot(server=live.server.id))
    reverted = live.done(RevertSnapshot(server=live.server.id))
    overlay = workspace / "overlay.qcow2"
    create_overlay(live.disk, "raw", overlay)
    command = {
        "restore": RestoreImage(image=image),
        "revert": RevertSnapshot(server=live.server.id),
        "undo": UndoRevert(operation=reverted.id),
    }[what]
    keeps(live, command, Guest.create(hypervisor, workspace, None, [str(overlay)]))


def test_a_second_definition_of_a_server_is_in_nobody_s_way(
    live: Live,  # noqa: F811
    workspace: Path,
    hypervisor: Any,
) -> None:
    """It has the same disk, and is off: it stands on nothing that goes."""
    live.succeeds(TakeSnapshot(server=live.server.id))
    live.disk.write_bytes(b"x" * SIZE)
    twin = Guest.create(hypervisor, workspace, None, [str(live.disk)])
    try:
        live.succeeds(RevertSnapshot(server=live.server.id))
    finally:
        twin.domain.undefine()
    assert live.disk.read_bytes() == bytes(SIZE)


def qcow2_server(live: Live, workspace: Path, hypervisor: Any) -> tuple[Guest, Server]:  # noqa: F811
    disk = make_disk(workspace, "qcow2", "blank", SIZE)
    guest = Guest.create(hypervisor, workspace, None, [str(disk)])
    server = Server(name=guest.name, host="kvm-1", domain_uuid=guest.domain.UUIDString())
    live.world.add(server)
    return guest, server


def qemu(tool: str, *arguments: object) -> None:
    subprocess.run([tool, *map(str, arguments)], check=True, capture_output=True)


def put_on_a_snapshot(guest: Guest, overlay: Path) -> None:
    """As `virsh snapshot-create-as --disk-only` leaves it: libvirt writes the chain down."""
    base = guest.disks[0]
    qemu("qemu-img", "create", "-f", "qcow2", "-b", base, "-F", "qcow2", overlay)
    definition = guest.xml
    disk: Any = definition.find("devices/disk")
    disk.find("source").set("file", str(overlay))
    chain = ElementTree.SubElement(disk, "backingStore", type="file")
    ElementTree.SubElement(chain, "format", type="qcow2")
    ElementTree.SubElement(chain, "source", file=str(base))
    ElementTree.SubElement(chain, "backingStore")
    guest.connection.defineXML(ElementTree.tostring(definition, "unicode"))


@pytest.mark.parametrize("made_by", ["this version", "an earlier one"])
def test_a_restored_disk_stands_alone(
    live: Live,  # noqa: F811
    workspace: Path,
    hypervisor: Any,
    made_by: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The chain that the owner's external snapshot made is not in the copy, and no more in the
    definition: libvirt would go by that, and find no file, or read what the guest had zeroed."""
    guest, server = qcow2_server(live, workspace, hypervisor)
    base, overlay = guest.disks[0], workspace / "overlay.qcow2"
    put_on_a_snapshot(guest, overlay)
    assert "<backingStore type" in guest.domain.XMLDesc(2)
    with monkeypatch.context() as patch:
        if made_by != "this version":
            patch.setattr(planning, "alone", lambda xml, _targets: xml)
        image = live.succeeds(CreateImage(server=server.id))["image"]
    for each in (base, overlay):
        each.unlink()

    live.succeeds(RestoreImage(image=image))

    assert images.chain(overlay, "qcow2") == []
    assert "<backingStore type" not in guest.domain.XMLDesc(2)
    guest.domain.createWithFlags(1)  # paused, so that nothing boots
    guest.domain.destroy()
    guest.remove()


def test_a_device_that_is_gone_is_not_made_a_file(
    live: Live,  # noqa: F811
    workspace: Path,
    hypervisor: Any,
) -> None:
    """Its directory is there: a file in it would lie in the host's memory."""
    guest, server = qcow2_server(live, workspace, hypervisor)
    image = live.succeeds(CreateImage(server=server.id))["image"]
    folder = vault().folder("image", server.id, image)
    definition = folder / "domain.xml"
    device = workspace / "vg0-web"
    text = definition.read_text()
    disk = f"file='{guest.disks[0]}'"
    assert disk in text.replace('"', "'")
    definition.chmod(0o600)
    definition.write_text(
        text.replace('"', "'")
        .replace("<disk type='file'", "<disk type='block'")
        .replace(disk, f"dev='{device}'")
    )
    manifest = read_manifest(folder)
    digests = {**manifest.digests, definition.name: digest(definition)}
    write_manifest(folder, manifest.model_copy(update={"digests": digests}))
    guest.domain.undefine()

    refused = live.done(RestoreImage(image=image))

    assert code(refused) == "copy_failed"
    assert not device.exists()
    assert [each.name for each in workspace.glob(".triptych-*")] == []
    guest.remove()


def test_snapshots_inside_an_image_are_told_of(
    live: Live,  # noqa: F811
    workspace: Path,
    hypervisor: Any,
) -> None:
    """A copy by stream goes without them, and so does the disk that it is put back onto."""
    guest, server = qcow2_server(live, workspace, hypervisor)
    before = live.succeeds(CreateImage(server=server.id))
    qemu("qemu-img", "snapshot", "-c", "before-upgrade", guest.disks[0])

    after = live.succeeds(CreateImage(server=server.id))
    restored = live.succeeds(RestoreImage(image=before["image"]))

    inside = {"target": "vda", "reason": images.INSIDE_NOT_COPIED}
    assert before["left_out"] == []
    assert after["left_out"] == ([] if after["way"] == "reflink" else [inside])
    assert restored["left_out"] == [inside]
    guest.remove()


def test_a_server_renamed_while_it_is_restored_keeps_its_disks(
    live: Live,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The definition goes by the name that was read first, which libvirt would refuse for ever."""
    image = live.succeeds(CreateImage(server=live.server.id))["image"]
    live.disk.write_bytes(b"x" * SIZE)
    renamed = f"{live.guest.name}-b"

    def point(name: str) -> None:
        if name == "materialise:written":
            live.guest.domain.rename(renamed)

    monkeypatch.setattr(faults, "point", point)
    refused = live.done(RestoreImage(image=image))
    monkeypatch.undo()

    live.guest.connection.lookupByName(renamed).rename(live.guest.name)
    assert code(refused) == "server_changed"
    assert live.disk.read_bytes() == b"x" * SIZE


def test_a_definition_is_put_back_under_the_name_of_now(live: Live) -> None:  # noqa: F811
    """Its owner renamed the domain after an operation had died on it."""
    before = live.guest.domain.XMLDesc(2)
    renamed = f"{live.guest.name}-b"
    live.guest.domain.rename(renamed)

    assert undo.define_domain(live.guest.hypervisor.uri, before.replace("</vcpu>", "</vcpu>"))

    again = live.guest.connection.lookupByName(renamed)
    again.rename(live.guest.name)
    assert again.UUIDString() == live.server.domain_uuid


@pytest.mark.parametrize(
    ("policy", "ejected"),
    [
        ("mandatory", None),
        ("mandatory", libvirt.VIR_DOMAIN_AFFECT_LIVE),
        ("mandatory", libvirt.VIR_DOMAIN_AFFECT_CONFIG),
        ("optional", None),
    ],
)
def test_a_guest_that_would_not_start_again_is_not_stopped(
    live: Live,  # noqa: F811
    workspace: Path,
    policy: str,
    ejected: int | None,
) -> None:
    """The file of its CD is gone: it runs on with it, until it is stopped. Where a start goes
    without it, there is nothing to refuse."""
    medium = workspace / "medium.iso"
    medium.write_bytes(bytes(SIZE))
    source = f"<source file='{medium}' startupPolicy='{policy}'/>"
    live.guest.domain.attachDeviceFlags(DRIVE.format(source), libvirt.VIR_DOMAIN_AFFECT_CONFIG)
    live.succeeds(TakeSnapshot(server=live.server.id))
    live.guest.domain.create()
    boot = live.guest.domain.ID()
    if ejected is not None:
        forced = ejected | libvirt.VIR_DOMAIN_DEVICE_MODIFY_FORCE
        live.guest.domain.updateDeviceFlags(DRIVE.format(""), forced)
    medium.unlink()

    reverted = live.done(RevertSnapshot(server=live.server.id))

    if policy == "optional" or ejected == libvirt.VIR_DOMAIN_AFFECT_CONFIG:
        assert reverted.state == "succeeded", reverted.error
    else:
        assert code(reverted) == "medium_missing"
        assert str(medium) in (reverted.error or {})["message"]
        assert live.guest.domain.ID() == boot
    assert live.guest.state() == "running"
    live.guest.domain.destroy()


@pytest.mark.parametrize("what", ["revert", "undo"])
def test_no_database_is_waited_for_while_the_server_is_off(
    live: Live,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    what: str,
) -> None:
    """It may be away for an hour, and the server would be too."""
    live.succeeds(TakeSnapshot(server=live.server.id))
    command: Command = RevertSnapshot(server=live.server.id)
    if what == "undo":
        command = UndoRevert(operation=live.done(command).id)
    live.guest.domain.create()
    done: list[str] = []

    def noted(name: str) -> Any:
        real = getattr(domains.Domain, name)
        return lambda *given, **more: (done.append(name), real(*given, **more))[1]

    for name in ("destroy", "start"):
        monkeypatch.setattr(domains.Domain, name, noted(name))

    def begun(_connection: object) -> None:
        if threading.current_thread() is threading.main_thread():  # the heartbeat's own may wait
            done.append("database")

    event.listen(engine(), "begin", begun)
    try:
        live.succeeds(command)
    finally:
        event.remove(engine(), "begin", begun)
    off = done.index("destroy")
    assert done[off - 1 : off + 3] == ["database", "destroy", "start", "database"]
    live.guest.domain.destroy()


@pytest.mark.parametrize("replaced", [False, True], ids=["removed", "replaced"])
@pytest.mark.parametrize("what", ["revert", "undo"])
def test_a_guest_whose_disk_has_no_name_any_more_is_not_stopped(
    live: Live,  # noqa: F811
    what: str,
    replaced: bool,
) -> None:
    """What it wrote since the copy is in a file that goes with its QEMU."""
    live.succeeds(TakeSnapshot(server=live.server.id))
    command: Command = RevertSnapshot(server=live.server.id)
    if what == "undo":
        command = UndoRevert(operation=live.done(command).id)
    live.guest.domain.create()
    boot = live.guest.domain.ID()
    live.disk.unlink()
    if replaced:
        live.disk.write_bytes(bytes(SIZE))

    refused = live.done(command)

    assert code(refused) == "disk_lost"
    assert str(live.disk) in (refused.error or {})["message"]
    assert (live.guest.domain.ID(), live.guest.state()) == (boot, "running")
    live.guest.domain.destroy()
    if what == "revert":
        live.succeeds(command)
        assert live.disk.read_bytes() == bytes(SIZE)


def test_a_restore_of_a_server_whose_disk_was_moved_can_be_undone(
    live: Live,  # noqa: F811
    workspace: Path,
) -> None:
    """Nothing was set aside, since nothing was in its place; but the server's disk is elsewhere."""
    image = live.succeeds(CreateImage(server=live.server.id))["image"]
    moved = workspace / "moved.raw"
    live.disk.write_bytes(b"x" * SIZE)
    live.disk.rename(moved)
    was = live.guest.domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
    live.guest.connection.defineXML(was.replace(str(live.disk), str(moved)))

    restored = live.done(RestoreImage(image=image))
    assert live.disk.read_bytes() == bytes(SIZE)
    live.succeeds(UndoRestore(operation=restored.id))

    assert str(moved) in live.guest.domain.XMLDesc()
    assert moved.read_bytes() == b"x" * SIZE
    assert not live.disk.exists()
    moved.rename(live.disk)
    live.guest.connection.defineXML(was)


def test_an_undo_that_fails_leaves_no_guest_on_disks_that_are_not_its_own(
    live: Live,  # noqa: F811
    workspace: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It had started the guest where its disk had been before the restore, and is itself undone:
    the guest runs on what was restored, as its definition says."""
    image = live.succeeds(CreateImage(server=live.server.id))["image"]
    moved = workspace / "moved.raw"
    live.disk.rename(moved)
    was = live.guest.domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
    live.guest.connection.defineXML(was.replace(str(live.disk), str(moved)))
    restored = live.done(RestoreImage(image=image))
    live.guest.domain.create()
    seen: list[bool] = []

    def fail(name: str) -> None:
        if name == "committing":
            seen.append(is_open(moved))
            raise OSError("a mishap")

    with monkeypatch.context() as failing:
        failing.setattr(faults, "point", fail)
        assert live.done(UndoRestore(operation=restored.id)).state == "failed"

    assert seen == [True]
    assert live.guest.state() == "running"
    assert (is_open(live.disk), is_open(moved)) == (True, False)
    assert str(live.disk) in live.guest.domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
    live.guest.domain.destroy()
    moved.unlink()


def test_a_server_that_started_with_its_host_does_so_again(live: Live) -> None:  # noqa: F811
    """Its domain was undefined, and libvirt forgot it with that."""
    live.guest.domain.setAutostart(1)
    image = live.succeeds(CreateImage(server=live.server.id))["image"]
    live.guest.domain.undefine()

    live.succeeds(RestoreImage(image=image))

    uuid = live.server.domain_uuid
    assert live.guest.connection.lookupByUUIDString(uuid).autostart()
    notes = vault().folder("image", live.server.id, image) / "RESTORE.md"
    assert f"virsh autostart {live.guest.name}" in notes.read_text()


def test_an_image_whose_definition_would_not_start_leaves_the_guest_on(
    live: Live,  # noqa: F811
    workspace: Path,
) -> None:
    """A CD was in its drive, and is gone from the host since. Of one that is off it is restored."""
    medium = workspace / "medium.iso"
    medium.write_bytes(bytes(SIZE))
    domain, config = live.guest.domain, libvirt.VIR_DOMAIN_AFFECT_CONFIG
    domain.attachDeviceFlags(DRIVE.format(f"<source file='{medium}'/>"), config)
    image = live.succeeds(CreateImage(server=live.server.id))["image"]
    domain.updateDeviceFlags(DRIVE.format(""), config)
    medium.unlink()
    domain.create()
    boot = domain.ID()

    assert code(live.done(RestoreImage(image=image))) == "medium_missing"

    assert live.guest.domain.ID() == boot
    live.guest.domain.destroy()
    live.succeeds(RestoreImage(image=image))


def test_what_a_container_does_not_see_is_not_called_gone(
    live: Live,  # noqa: F811
    workspace: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its own directories have the names of the host's; those of the host are mounted."""
    mounts = workspace / "mounts"
    mounts.write_text("overlay / overlay rw 0 0\n")
    monkeypatch.setattr(domains, "_MOUNTS", mounts)
    of, at = "<disk type='file' device='cdrom'><source file='{}'/>", "<target dev='sdz'/></disk>"
    wanted = live.guest.domain.XMLDesc(2)
    domain = domains.find(connect(live.guest.hypervisor.uri), live.server.domain_uuid)

    def lost(path: Path) -> list[str]:
        drive = f"{of.format(path)}{at}</devices>"
        return list(domain.lost_files([wanted.replace("</devices>", drive)], []))

    assert lost(workspace / "medium.iso") == []
    assert lost(live.root / "medium.iso") == ["sdz"]  # that is mounted


@pytest.mark.parametrize("whose", ["its own", "another's"])
def test_a_disk_that_cannot_be_read_keeps_no_server_from_being_restored(
    live: Live,  # noqa: F811
    workspace: Path,
    hypervisor: Any,
    monkeypatch: pytest.MonkeyPatch,
    whose: str,
) -> None:
    """It may be the very one that is to be replaced."""
    guest, server = qcow2_server(live, workspace, hypervisor)
    image = live.succeeds(CreateImage(server=server.id))["image"]
    damaged = guest.disks[0]
    command: Command = RestoreImage(image=image)
    if whose != "its own":
        command = RestoreImage(image=live.succeeds(CreateImage(server=live.server.id))["image"])
    opened = Path.open

    def fail(path: Path, *arguments: Any, **named: Any) -> Any:
        if path == damaged:
            raise OSError(errno.EIO, "Input/output error")
        return opened(path, *arguments, **named)

    overlay = workspace / "overlay.qcow2"
    qemu("qemu-img", "create", "-f", "qcow2", "-b", damaged, "-F", "qcow2", overlay)
    monkeypatch.setattr(Path, "open", fail)
    live.succeeds(command)
    if whose == "its own":
        other = Guest.create(hypervisor, workspace, None, [str(overlay)])
        assert code(live.done(command)) == "disk_in_use"
        other.remove()
    monkeypatch.undo()
    guest.remove()
