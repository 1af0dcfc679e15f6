"""Clones and copies of servers that give QEMU options past libvirt."""

from __future__ import annotations

import socket

import pytest
from farms.farmed import Farmed, outcomes
from lxml import etree

from lab.guest import Guest, attach
from services.snapshotter import snapshots  # noqa: F401  registers the handlers
from shared.commands import CloneSource, CreateClones, TakeSnapshot
from shared.models import Server

pytestmark = pytest.mark.vm

QEMU = "http://libvirt.org/schemas/domain/qemu/1.0"


def give(guest: Guest, *words: str) -> None:
    """Define the guest anew, with these arguments for QEMU."""
    old = etree.fromstring(guest.domain.XMLDesc())
    root = etree.Element("domain", {**old.attrib}, nsmap={"qemu": QEMU})
    root.extend(list(old))
    line = etree.SubElement(root, f"{{{QEMU}}}commandline")
    for word in words:
        etree.SubElement(line, f"{{{QEMU}}}arg", value=word)
    guest.connection.defineXML(etree.tostring(root, encoding="unicode"))


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def source_of(farmed: Farmed, guest: Guest) -> Server:
    source = Server(name=guest.name, host="kvm-1", domain_uuid=guest.domain.UUIDString())
    farmed.world.add(source)
    return source


def clone_of(source: Server, name: str, *, start: bool) -> CreateClones:
    return CreateClones(
        source=CloneSource(kind="server", id=source.id), name=name, start=start, identity="keep"
    )


def test_clones_run_beside_their_source(farmed: Farmed) -> None:
    """Forwarded ports, sockets and displays are the source's: both run at once, and the result
    says what the clone goes without, and what is as its source's."""
    guest = farmed.guest()
    port = free_port()
    mac = "52:54:00:12:aa:01"
    give(
        guest,
        *("-fw_cfg", "name=opt/org.example,string=x"),
        *("-netdev", f"user,id=n,hostfwd=tcp:127.0.0.1:{port}-:22"),
        *("-device", f"virtio-net-pci,netdev=n,addr=1d.0,mac={mac}"),
        *("-chardev", f"socket,id=c,host=127.0.0.1,port={free_port()},server=on,wait=off"),
        *("-device", "isa-serial,chardev=c,index=3"),
        *("-gdb", f"tcp:127.0.0.1:{free_port()}"),
    )
    guest.domain.create()
    name = f"{guest.name}-clone"

    made = farmed.done(clone_of(source_of(farmed, guest), name, start=True))

    farmed.adopt(name)
    assert made.state == "succeeded", made.error
    clone = attach(farmed.hypervisor, name)
    assert (guest.state(), clone.state()) == ("running", "running")
    told = outcomes(made)[name]["identity"]
    assert {each["target"] for each in told["left_out"]} == {
        "-netdev user,hostfwd",
        "-chardev socket",
        "-gdb",
    }
    (kept,) = [each["reason"] for each in told["kept"] if each["part"] == "qemu:commandline"]
    assert kept == "-fw_cfg, -device: its source's"
    assert mac not in clone.domain.XMLDesc()


def test_disk_on_the_command_line_is_no_clone_s(farmed: Farmed) -> None:
    """Two machines would write to one disk: the clone is refused before anything is copied, with
    words that name the disk; a snapshot is taken, and names what it does not hold."""
    guest = farmed.guest()
    disk = farmed.disk()
    disk.chmod(0o666)  # libvirt gives it to nobody
    give(
        guest,
        *("-drive", f"file={disk},format=raw,if=none,id=x"),
        *("-device", "virtio-blk-pci,drive=x,addr=1c.0"),
    )
    guest.domain.create()
    source = source_of(farmed, guest)
    before = set(farmed.disks.iterdir())

    refused = farmed.done(clone_of(source, f"{guest.name}-clone", start=False))
    taken = farmed.done(TakeSnapshot(server=source.id))

    assert (refused.state, (refused.error or {})["code"]) == ("failed", "unsupported")
    assert f"-drive {disk}" in (refused.error or {})["message"]
    assert set(farmed.disks.iterdir()) == before
    assert guest.state() == "running"
    assert taken.result, taken.error
    assert [each["target"] for each in taken.result["left_out"]] == [f"-drive {disk}"]

    with_memory = farmed.done(TakeSnapshot(server=source.id, replace=True, with_memory=True))
    assert (with_memory.error or {})["code"] == "disk_not_copyable"
    assert f"-drive {disk}" in (with_memory.error or {})["message"]
    assert guest.state() == "running"
