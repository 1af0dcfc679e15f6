"""The main job on every file system, in both power states, with one disk and two, raw and qcow2."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from live_site import Machine, Site, digests, modes, wait_for

from lab import offline
from lab.guest import attach

pytestmark = pytest.mark.vm

CONSISTENCY = {"application", "file-system", "crash"}


def paused(site: Site, machine: Machine) -> bool:
    """Whether a copy of the machine makes it stand still."""
    return machine.power == "running" and site.way == "reflink"


def assert_facts(site: Site, machine: Machine, result: dict, disks: int) -> None:
    """The result of a copy is as product.md says, and true."""
    assert result["way"] == site.way
    assert result["consistency"] in CONSISTENCY
    assert result["left_out"] == []
    assert result["bytes"] > 0
    assert result["consistency"] == ("file-system" if machine.power == "running" else "crash")
    assert (result["pause_ms"] > 0) is paused(site, machine)
    assert result["pause_ms"] < 5000


def test_a_snapshot_brings_a_changed_server_back(site: Site, machine: Machine) -> None:
    """Revert brings every disk back, twice, in the same power state; the snapshot stays as is."""
    machine.write("before")

    taken = site.done(site.client.snapshots.take(machine.id, description="known good"))

    assert_facts(site, machine, taken["result"], len(machine.disks))
    assert machine.state() == machine.power
    shown = site.client.snapshots.get(machine.id)
    assert (shown["id"], shown["server"]) == (taken["result"]["snapshot"], machine.id)
    assert (shown["way"], shown["description"]) == (site.way, "known good")
    folder = site.copy_of("snapshot", machine)
    whole = digests(folder)
    assert modes(folder) == {"0o400"}
    assert len(whole) == len(machine.disks) + 3

    twice = machine.power == "stopped" or (site.host, len(machine.disks)) == ("xfs", 2)
    for change in ("changed", "changed again")[: 1 + twice]:
        machine.write(change)
        reverted = site.done(site.client.snapshots.revert(machine.id))

        assert reverted["result"]["snapshot"] == shown["id"]
        assert reverted["result"]["way"] == site.way
        assert reverted["undo_until"]
        assert machine.state() == machine.power
        assert machine.read() == {"before"}
    assert digests(folder) == whole
    assert modes(folder) == {"0o400"}

    site.done(site.client.snapshots.delete(machine.id))
    assert not folder.exists()
    assert site.client.servers.get(machine.id)["snapshot"] is None


def test_an_image_restores_a_destroyed_server(site: Site, machine: Machine) -> None:
    """An image explains itself and puts back destroyed disks, also of an undefined domain."""
    machine.write("precious")
    name = f"image-{machine.name}"

    made = site.done(site.client.images.create(machine.id, name=name))

    assert_facts(site, machine, made["result"], len(machine.disks))
    assert machine.state() == machine.power
    image = site.client.images.get(name)
    assert (image["id"], image["server"]) == (made["result"]["image"], machine.id)
    assert (image["state"], image["origin"], image["way"]) == ("complete", "manual", site.way)
    folder = site.copy_of("image", machine)
    assert_explains_itself(folder, machine)
    before = digests(folder)

    lost = len(machine.disks) == 2
    destroy(machine, lost)
    restored = site.done(site.client.images.restore(name))

    assert restored["result"]["image"] == image["id"]
    assert restored["result"]["way"] == site.way
    expected = "stopped" if lost else machine.power
    assert machine.state() == expected
    if machine.power == "running" and lost:
        machine.guest.start(wait=False)
    assert machine.read() == {"precious"}
    assert digests(folder) == before
    assert all(offline.info(disk)["format"] == disk.suffix[1:] for disk in machine.disks)


def destroy(machine: Machine, lost: bool) -> None:
    """Noise over the disks; `lost`: the definition and the disks are gone altogether."""
    disks = machine.disks
    if lost:
        machine.guest.remove()
        assert machine.state() == "missing"
        assert not any(disk.exists() for disk in disks)
        return
    for disk in disks:
        with disk.open("r+b") as file:
            file.write(b"\xde\xad" * 2**20)


def assert_explains_itself(folder: Path, machine: Machine) -> None:
    """Manifest, definition and instructions agree with the disks beside them (I1)."""
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["kind"] == "image"
    assert manifest["server"]["name"] == machine.name
    assert manifest["server"]["uuid"] == machine.guest.domain.UUIDString()
    formats = [disk.suffix[1:] for disk in machine.disks]
    if manifest["way"] == "stream" and machine.power != "stopped":
        formats = ["qcow2" for _ in formats]
    assert [disk["format"] for disk in manifest["disks"]] == formats
    for disk, original in zip(manifest["disks"], machine.disks, strict=True):
        about = offline.info(folder / disk["file"])
        assert about["format"] == disk["format"]
        assert about["virtual-size"] == disk["virtual_bytes"]
        assert about["virtual-size"] == offline.info(original)["virtual-size"]
        assert "backing-filename" not in about
        assert offline.check(folder / disk["file"]).clean
    definition = ElementTree.parse(folder / "domain.xml").getroot()  # noqa: S314
    assert definition.findtext("name") == machine.name
    notes = (folder / "RESTORE.md").read_text()
    assert "virsh define domain.xml" in notes
    assert all(disk["file"] in notes for disk in manifest["disks"])
    assert modes(folder) == {"0o400"}


def test_a_clone_lives_on_its_own(site: Site, machine: Machine) -> None:
    """A clone has its own identity and files; nothing of its source's can harm it (C2, C3)."""
    machine.write("common")
    site.done(site.client.snapshots.take(machine.id))
    name = f"{machine.name}-clone"
    start = machine.power == "running"

    operation = site.done(site.client.clones.create(machine.id, name=name, start=start))

    (made,) = operation["result"]["clones"]
    assert (operation["result"]["pause_ms"] > 0) is paused(site, machine)
    assert (made["name"], made["state"], made["way"]) == (name, "ready", site.way)
    assert machine.state() == machine.power
    clone = Machine(site, attach(site.hypervisor, name), machine.power, made["server"])
    try:
        assert clone.state() == machine.power
        assert_own_identity(machine, clone)
        listed = site.client.clones.get(made["id"])
        assert listed["source"] == {"kind": "server", "id": machine.id}
        assert site.client.servers.get(made["server"])["name"] == name

        assert clone.read() == {"common"}
        clone.write("the clone's")
        assert machine.read() == {"common"}
        machine.write("the source's")
        assert clone.read() == {"the clone's"}

        site.done(site.client.snapshots.delete(machine.id))
        assert clone.read() == {"the clone's"}
        clone.guest.destroy()
        assert all(offline.check(disk).clean for disk in clone.disks)
    finally:
        site.remove(clone)


def assert_own_identity(source: Machine, clone: Machine) -> None:
    def macs(machine: Machine) -> set[str]:
        nodes = machine.guest.xml.iterfind("./devices/interface/mac")
        return {node.attrib["address"] for node in nodes}

    assert source.guest.domain.UUIDString() != clone.guest.domain.UUIDString()
    assert len(macs(clone)) == 1
    assert macs(source) & macs(clone) == set()
    assert len(clone.disks) == len(source.disks)
    assert set(source.disks) & set(clone.disks) == set()
    for disk in clone.disks:
        assert "backing-filename" not in offline.info(disk)
    if clone.power == "running":
        clone.guest.wait_ready()
        inside = clone.guest.run("cat /sys/class/dmi/id/product_uuid /sys/class/net/eth0/address")
        assert inside[1].split() == [clone.guest.domain.UUIDString(), *macs(clone)]
        for file in ("/etc/hostname", "/etc/machine-id"):
            assert clone.guest.read(file) != source.guest.read(file)
        assert clone.guest.read("/etc/hostname") == f"{clone.name}\n"
        assert clone.guest.read("/sys/class/net/eth0/carrier") == "1\n"


@pytest.mark.parametrize("machine", [("qcow2+raw", "running")], indirect=True)
def test_all_disks_are_copied_at_one_instant(site: Site, machine: Machine) -> None:
    """With a writer that counts on both disks in turn, the copy holds neighbouring numbers."""
    machine.guest.wait_ready()
    both = "/root/n /data/n"
    machine.guest.run(f"for f in {both}; do printf 00000000 >$f; done; sync")
    count = (
        "n=0; while [ ! -e /run/enough ]; do n=$((n+1)); "
        f"for f in {both}; do printf %08d $n | dd of=$f conv=notrunc,fsync; done; done"
    )
    machine.guest.write("/run/count", count)
    machine.guest.run("sh /run/count </dev/null >/dev/null 2>&1 &")
    wait_for(lambda: int(machine.guest.read("/data/n")) > 5, "the writer writes")

    taken = site.done(site.client.snapshots.take(machine.id, quiesce="never"))

    assert taken["result"]["consistency"] == "crash"
    folder = site.copy_of("snapshot", machine)
    root, data = (
        int(offline.read_file(next(folder.glob(f"{disk}.*")), path))
        for disk, path in (("vda", "/root/n"), ("vdb", "/n"))
    )
    machine.guest.run("touch /run/enough")
    assert root > 5
    assert 0 <= root - data <= 1
    assert all(offline.check(disk).clean for disk in folder.glob("vd*"))
    assert all(offline.fsck(disk).clean for disk in folder.glob("vd*"))
    site.done(site.client.snapshots.delete(machine.id))
