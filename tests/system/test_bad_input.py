"""What cannot be done is said clearly, leaves nothing, and nothing after it is harmed."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from xml.etree import ElementTree

import pytest
from live_site import SMALL, Machine, Site, open_site, wait_for
from triptych import Problem

from lab import filesystems
from lab.filesystems import MIB, fill
from lab.guest import Guest, make_disk
from lab.libvirtd import libvirtd

pytestmark = pytest.mark.vm
on_xfs = pytest.mark.parametrize("site", ["xfs"], indirect=True)
on_ext4 = pytest.mark.parametrize("site", ["ext4"], indirect=True)

NETWORK_DISK = """
<disk type='network' device='disk'><driver name='qemu' type='raw'/>
  <source protocol='nbd' name='export'><host name='127.0.0.1' port='10809'/></source>
  <target dev='vdb' bus='virtio'/></disk>"""
VOLUME_DISK = """
<disk type='volume' device='disk'><driver name='qemu' type='raw'/>
  <source pool='default' volume='v'/><target dev='vdb' bus='virtio'/></disk>"""
READ_ONLY_DISK = """
<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{path}'/>
  <target dev='vdb' bus='virtio'/><readonly/></disk>"""
CD_ROM = """
<disk type='file' device='cdrom'><driver name='qemu' type='raw'/>
  <target dev='sda' bus='sata'/><readonly/></disk>"""


@contextlib.contextmanager
def defined(site: Site, extra: str = "") -> Iterator[Guest]:
    """A stopped guest with one small disk and whatever else."""
    disk = make_disk(site.disks, "raw", "data", SMALL)
    with Guest.create(site.hypervisor, site.disks, disks=[str(disk)], extra_devices=extra) as guest:
        yield guest


@on_xfs
def test_a_domain_without_a_disk_cannot_be_registered(site: Site) -> None:
    """There is nothing to copy: domain_without_disks, and no server."""
    with defined(site) as guest:
        xml = guest.xml
        devices = xml.find("devices")
        devices.remove(devices.find("disk"))
        disk = guest.disks[0]
        guest.connection.defineXML(ElementTree.tostring(xml, encoding="unicode"))
        disk.unlink()
        wait_for(
            lambda: any(
                each["name"] == guest.name and not each["disks"]
                for each in site.client.domains.list(site.host)
            ),
            "the host has seen it",
        )

        with pytest.raises(Problem) as refusal:
            site.client.servers.add(site.host, guest.name)

        assert (refusal.value.status, refusal.value.code) == (422, "domain_without_disks")
        assert guest.name not in [each["name"] for each in site.client.servers.list()]


@pytest.mark.parametrize("disk", [NETWORK_DISK, VOLUME_DISK], ids=["network", "volume"])
@on_xfs
def test_a_disk_that_cannot_be_copied_is_never_left_out(site: Site, disk: str) -> None:
    """A copy without a writable disk would look whole: disk_not_copyable, and nothing is kept."""
    with defined(site, disk) as guest:
        server = site.register(guest)
        for ask in (site.client.snapshots.take, site.client.images.create):
            operation = site.ended(ask(server))
            assert operation["state"] == "failed"
            assert operation["error"]["code"] == "disk_not_copyable"
            assert "vdb" in operation["error"]["message"]


@on_xfs
def test_read_only_disks_are_left_out_by_name(site: Site) -> None:
    """CD-ROMs and read-only disks are not copied, and the result says which and why (I1)."""
    shared = make_disk(site.disks, "raw", "blank", MIB)
    with defined(site, READ_ONLY_DISK.format(path=shared) + CD_ROM) as guest:
        server = site.register(guest)
        operation = site.done(site.client.images.create(server))

        left_out = {each["target"]: each["reason"] for each in operation["result"]["left_out"]}
        assert set(left_out) == {"vdb", "sda"}
        assert "read-only" in left_out["vdb"]
        assert "CD-ROM" in left_out["sda"]
        image = site.client.images.get(operation["result"]["image"])
        assert image["left_out"] == operation["result"]["left_out"]


@on_ext4
def test_a_full_disk_is_refused_before_it_is_full(site: Site) -> None:
    """Too little room: insufficient_space, nothing written, the server untouched (E6)."""
    machine = site.machine(["raw"], "stopped", noise=320 * MIB)
    machine.write("untouched")
    before = machine.disks[0].stat().st_mtime_ns
    ballast = fill(site.folder, leave=site_floor(site) + 160 * MIB)
    try:
        assert site.refused(site.client.snapshots.take(machine.id)) == "insufficient_space"
        assert site.refused(site.client.images.create(machine.id)) == "insufficient_space"
        clone = site.client.clones.create(machine.id, name="no-room", start=False)
        assert site.refused(clone) == "insufficient_space"
    finally:
        ballast.unlink()
    assert machine.disks[0].stat().st_mtime_ns == before
    assert machine.read() == {"untouched"}
    site.done(site.client.snapshots.take(machine.id))
    site.remove(machine)


def site_floor(site: Site) -> int:
    """The 5 % that are kept free."""
    return shutil.disk_usage(site.folder).total // 20


@pytest.mark.parametrize("power", ["running", "stopped"])
@on_ext4
def test_a_disk_that_fills_up_meanwhile_ends_the_copy(site: Site, power: str) -> None:
    """When others take the room during a copy it ends itself while there is some left (E6): it
    fails as insufficient_space, says how much there is, and leaves nothing."""
    machine = site.busy(power)
    with site.points.held(
        lambda: site.client.images.create(machine.id), "stream:begun"
    ) as operation:
        ballast = fill(site.folder, leave=site_floor(site) * 9 // 10)
    try:
        assert site.refused(operation) == "insufficient_space"
        message = site.client.operations.get(operation["id"])["error"]["message"]
        assert "that are kept free" in message
        assert machine.state() == power
    finally:
        ballast.unlink()
    site.assert_tidy()
    site.done(site.client.images.create(machine.id))
    site.remove(machine)


@on_xfs
def test_a_clone_name_that_is_taken_is_refused_at_once(site: Site, stopped: Machine) -> None:
    """A name that a domain has is a 409 before anything starts."""
    with pytest.raises(Problem) as refusal:
        site.client.clones.create(stopped.id, name=stopped.name)
    assert (refusal.value.status, refusal.value.code) == (409, "clone_name_taken")


@on_xfs
def test_a_lone_clone_whose_file_exists_fails(site: Site, stopped: Machine) -> None:
    """A single clone that cannot be made is a failed operation, and the file stays."""
    taken = site.disks / "lone-vda.raw"
    taken.write_text("somebody else's")
    operation = site.client.clones.create(stopped.id, name="lone", start=False)
    assert site.refused(operation) == "clone_name_taken"
    assert taken.read_text() == "somebody else's"
    taken.unlink()


@pytest.fixture(scope="module")
def own_site() -> Iterator[Site]:
    """A stack on a libvirtd that may be stopped: no other stack loses it too."""
    if not filesystems.can_mount():
        pytest.skip("needs the right to mount loop devices")
    with (
        libvirtd(own=True) as own,
        open_site(own, "xfs", size=filesystems.GIB, host="restarts") as made,
    ):
        yield made


def test_libvirtd_may_go_and_come_back(own_site: Site) -> None:
    """While libvirtd is down the API answers and work fails as libvirt_unavailable."""
    site = own_site
    machine = site.machine(["raw"], "stopped")
    machine.write("kept")
    site.done(site.client.snapshots.take(machine.id))
    machine.write("changed")

    site.hypervisor.stop(kill=True)
    try:
        for ask in (site.client.snapshots.revert, site.client.images.create):
            assert site.refused(ask(machine.id)) == "libvirt_unavailable"
        assert site.client.servers.get(machine.id)["name"] == machine.name
        wait_for(lambda: site.client.hosts.get(site.host)["problem"], "the host says so")
    finally:
        site.hypervisor.start()

    wait_for(lambda: not site.client.hosts.get(site.host)["problem"], "the host is well again")
    site.done(site.client.snapshots.revert(machine.id))
    assert machine.read() == {"kept"}
    site.assert_tidy()
    site.remove(machine)
