"""A server's owner moves or adds disks while it is copied: what was planned is no copy of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import libvirt
import pytest
from operations.waiting import wait_for

from lab.guest import Guest, make_disk
from lab.libvirtd import Hypervisor
from shared import faults
from shared.disks.engine import capture
from shared.disks.errors import ServerChanged
from shared.disks.planning import Way
from shared.hypervisor.connection import connect
from shared.hypervisor.definition import DomainDefinition
from shared.hypervisor.domains import Domain, find_by_name
from shared.hypervisor.watchdog import Watchdog

pytestmark = pytest.mark.vm
ways = pytest.mark.parametrize("way", ["reflink", "stream"])
LAST_CHANCE = {"reflink": "reflink:paused", "stream": "stream:frozen"}
"""Where a server's disks can be changed for the last time: not beside QEMU's copy job."""


@pytest.fixture
def server(hypervisor: Hypervisor, xfs: Path) -> Iterator[Guest]:
    """A running server with one disk."""
    with Guest.create(hypervisor, xfs / "moving", disks=["qcow2"]) as made:
        yield made.start(wait=False)


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Callable[[], None]], None]:
    """Have something done by somebody else once an operation passes a point."""

    def arm(name: str, act: Callable[[], None]) -> None:
        pending = [act]

        def point(passed: str) -> None:
            if passed == name and pending:
                pending.pop()()

        monkeypatch.setattr(faults, "point", point)

    return arm


def snapshot(server: Guest) -> None:
    """Put the disk on an overlay, as `virsh snapshot-create-as --disk-only` does."""
    flags = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY
    flags |= libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA
    overlay = server.disks[0].with_suffix(".overlay")
    server.domain.snapshotCreateXML(
        f"<domainsnapshot><disks><disk name='vda'><source file='{overlay}'/></disk></disks>"
        "</domainsnapshot>",
        flags,
    )


def commit(server: Guest) -> None:
    """Write the overlay back, as `virsh blockcommit --active --pivot` does."""
    server.domain.blockCommit("vda", None, None, 0, libvirt.VIR_DOMAIN_BLOCK_COMMIT_ACTIVE)
    pivot(server)


def move(server: Guest) -> None:
    """Copy the disk and go on with that copy, as `virsh blockcopy --pivot` does."""
    target = server.disks[0].with_suffix(".moved")
    xml = f"<disk type='file'><driver type='qcow2'/><source file='{target}'/></disk>"
    server.domain.blockCopy("vda", xml, None, libvirt.VIR_DOMAIN_BLOCK_COPY_TRANSIENT_JOB)
    pivot(server)


def pivot(server: Guest) -> None:
    def pivoted() -> bool:
        with contextlib.suppress(libvirt.libvirtError):  # not ready yet
            server.domain.blockJobAbort("vda", libvirt.VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT)
            return True
        return False

    wait_for(pivoted)


def plug(server: Guest) -> None:
    plugged = make_disk(server.disks[0].parent, "raw", "blank", name="plugged.raw")
    server.domain.attachDeviceFlags(
        f"<disk type='file' device='disk'><driver name='qemu' type='raw'/>"
        f"<source file='{plugged}'/><target dev='vdx' bus='virtio'/></disk>",
        libvirt.VIR_DOMAIN_AFFECT_LIVE,
    )


def domain_of(server: Guest) -> Domain:
    return find_by_name(connect(server.hypervisor.uri), server.name)


def sources(server: Guest) -> dict[str, str | None]:
    """The file that each disk is on now, by target."""
    live = DomainDefinition.parse(server.domain.XMLDesc())
    return {disk.target: disk.path for disk in live.disks}


@ways
@pytest.mark.parametrize("act", [snapshot, move, plug])
def test_a_copy_of_other_disks_than_the_guest_has_is_refused(
    server: Guest,
    watchdog: Watchdog,
    folder: Path,
    at: Callable[[str, Callable[[], None]], None],
    act: Callable[[Guest], None],
    way: Way,
) -> None:
    """Nothing of it is kept, and the guest runs on the disks that its owner gave it."""
    seen = [sources(server)]

    def somebody() -> None:
        act(server)
        seen.append(sources(server))

    at(LAST_CHANCE[way], somebody)
    with pytest.raises(ServerChanged) as refusal:
        capture(domain_of(server), folder, watchdog=watchdog, way=way, quiesce="never")

    assert refusal.value.code == "server_changed"
    assert list(folder.iterdir()) == []
    before, after = seen
    assert before != after == sources(server)
    assert server.state() == "running"


def test_a_chain_that_is_gone_is_refused(
    server: Guest,
    watchdog: Watchdog,
    folder: Path,
    at: Callable[[str, Callable[[], None]], None],
) -> None:
    """The guest is back on the base of the overlay that was planned to be copied."""
    snapshot(server)
    at("stream:frozen", lambda: commit(server))
    with pytest.raises(ServerChanged):
        capture(domain_of(server), folder, watchdog=watchdog, quiesce="never")
    assert list(folder.iterdir()) == []
    assert server.state() == "running"


def test_a_memory_without_its_disks_is_refused(
    server: Guest,
    watchdog: Watchdog,
    folder: Path,
    at: Callable[[str, Callable[[], None]], None],
) -> None:
    """A copy with memory looks at the instant of that memory."""
    at("reflink:frozen", lambda: snapshot(server))
    with pytest.raises(ServerChanged):
        capture(domain_of(server), folder, watchdog=watchdog, memory=True)
    assert list(folder.iterdir()) == []
    assert server.state() == "running"


def test_what_is_as_it_was_is_copied(
    server: Guest,
    watchdog: Watchdog,
    folder: Path,
    at: Callable[[str, Callable[[], None]], None],
) -> None:
    """An overlay that has come and gone meanwhile leaves the disk whole."""

    def come_and_go() -> None:
        snapshot(server)
        commit(server)

    at("reflink:opened", come_and_go)
    taken = capture(domain_of(server), folder, watchdog=watchdog, way="reflink", quiesce="never")
    assert [file.target for file in taken.files] == ["vda"]


@ways
def test_a_stopped_server_that_is_given_another_disk_is_refused(
    hypervisor: Hypervisor, xfs: Path, watchdog: Watchdog, folder: Path, way: Way
) -> None:
    """Its definition names another file than was planned to be copied."""
    with Guest.create(hypervisor, xfs / "redefined", disks=["qcow2"]) as made:
        other = make_disk(made.disks[0].parent, "qcow2", "blank")

        def redefine() -> bool:
            xml = made.domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
            made.domain.connect().defineXML(xml.replace(str(made.disks[0]), str(other)))
            return False  # nobody cancels

        with pytest.raises(ServerChanged):
            capture(domain_of(made), folder, watchdog=watchdog, way=way, cancelled=redefine)
        assert list(folder.iterdir()) == []
        assert sources(made) == {"vda": str(other)}
