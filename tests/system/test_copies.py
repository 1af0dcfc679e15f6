"""What snapshots, images and clones promise beyond the main job, on XFS unless said otherwise."""

from __future__ import annotations

import json

import libvirt
import pytest
from live_site import Machine, Site, digests, wait_for
from triptych import Problem

from lab.filesystems import MIB
from lab.guest import Guest, attach
from lab.qemu_img import as_encrypted, encrypted, rewrite

pytestmark = pytest.mark.vm
on_xfs = pytest.mark.parametrize("site", ["xfs"], indirect=True)


def clone_machine(site: Site, made: dict, power: str, words: int | None = None) -> Machine:
    return Machine(site, attach(site.hypervisor, made["name"]), power, made["server"], words)


@on_xfs
def test_a_second_snapshot_needs_replace(site: Site, stopped: Machine) -> None:
    """Without `replace` 409 names the old one; with it the old one goes and the new one counts."""
    stopped.write("first")
    first = site.done(site.client.snapshots.take(stopped.id))["result"]["snapshot"]
    old = site.copy_of("snapshot", stopped)

    with pytest.raises(Problem) as refusal:
        site.client.snapshots.take(stopped.id)
    assert (refusal.value.status, refusal.value.code) == (409, "snapshot_exists")
    assert refusal.value.conflict == first
    assert old.exists()

    stopped.write("second")
    second = site.done(site.client.snapshots.take(stopped.id, replace=True))["result"]["snapshot"]
    assert second != first
    assert not old.exists()
    stopped.write("third")
    site.done(site.client.snapshots.revert(stopped.id))
    assert stopped.read() == {"second"}


@pytest.mark.parametrize("site", ["ext4"], indirect=True)
def test_the_old_snapshot_stays_until_the_new_one_is_whole(site: Site) -> None:
    """A replacement that is cancelled half-way leaves the old snapshot, whole and usable (S1)."""
    machine = site.machine(["raw", "raw"], "stopped")
    machine.write("first")
    first = site.done(site.client.snapshots.take(machine.id))["result"]["snapshot"]
    folder = site.copy_of("snapshot", machine)
    before = digests(folder)

    with site.points.held(
        lambda: site.client.snapshots.take(machine.id, replace=True), "stream:disk-copied"
    ) as operation:
        assert site.client.servers.get(machine.id)["snapshot"] == first
        site.client.operations.cancel(operation["id"])

    ended = site.ended(operation)
    assert (ended["state"], ended["error"]["code"]) == ("cancelled", "cancelled")
    assert site.client.servers.get(machine.id)["snapshot"] == first
    assert digests(folder) == before
    site.remove(machine)


@pytest.mark.parametrize("what", ["revert", "restore"])
@on_xfs
def test_a_revert_and_a_restore_can_be_undone(site: Site, stopped: Machine, what: str) -> None:
    """Undo puts back what was replaced (E1), once; what the revert brought is dropped."""
    stopped.write("old")
    if what == "revert":
        site.done(site.client.snapshots.take(stopped.id))
        stopped.write("new")
        operation = site.done(site.client.snapshots.revert(stopped.id))
    else:
        image = site.done(site.client.images.create(stopped.id))["result"]["image"]
        stopped.write("new")
        operation = site.done(site.client.images.restore(image))
    assert stopped.read() == {"old"}
    aside = site.disks / f".triptych-{operation['id']}"
    assert aside.is_dir()

    undone = site.done(site.client.operations.undo(operation["id"]))

    assert undone["result"]["undone"] == operation["id"]
    assert stopped.read() == {"new"}
    assert stopped.state() == "stopped"
    assert not aside.exists()
    with pytest.raises(Problem) as refusal:
        site.client.operations.undo(operation["id"])
    assert refusal.value.code == "not_undoable"


@on_xfs
def test_undo_of_a_revert_leaves_a_running_server_running(site: Site, running: Machine) -> None:
    """Revert and undo of a running server each end with it running, on the right disks."""
    running.write("old")
    site.done(site.client.snapshots.take(running.id, replace=True))
    running.write("new")
    operation = site.done(site.client.snapshots.revert(running.id))
    assert running.state() == "running"

    site.done(site.client.operations.undo(operation["id"]))

    assert running.state() == "running"
    assert running.read() == {"new"}


@pytest.mark.parametrize("power", ["running", "stopped"])
@on_xfs
def test_a_revert_with_memory_resumes_that_very_instant(site: Site, power: str) -> None:
    """What ran then runs on (S5), also where the server is off by now; and it can be undone."""
    machine = site.machine(["qcow2"], "running")
    machine.write("old")
    machine.guest.run(
        "mkdir -p /run/held; mount -t tmpfs none /run/held; "
        "sleep 100000 >/dev/null 2>&1 & echo $! >/run/held/pid"
    )
    machine.guest.write("/run/held/word", "in memory\n")
    taken = site.done(site.client.snapshots.take(machine.id, with_memory=True))
    snapshot = site.client.snapshots.get(machine.id)
    assert machine.state() == "running"
    assert (snapshot["with_memory"], snapshot["consistency"]) == (True, "crash")
    assert taken["result"]["pause_ms"] > 0
    saved = site.copy_of("snapshot", machine) / "memory.save"
    assert saved.stat().st_mode & 0o777 == 0o400
    before = saved.read_bytes()

    machine.write("new")
    machine.guest.destroy()
    if power == "running":
        machine.guest.start().wait_ready()
    reverted = site.done(site.client.snapshots.revert(machine.id))

    assert machine.state() == "running"
    assert machine.guest.read("/run/held/word") == "in memory\n"
    assert machine.guest.run("kill -0 $(cat /run/held/pid)")[0] == 0
    assert machine.read() == {"old"}
    assert saved.read_bytes() == before

    site.done(site.client.operations.undo(reverted["id"]))
    assert machine.read() == {"new"}
    site.remove(machine)


@on_xfs
def test_a_memory_that_would_not_resume_leaves_the_guest_on(site: Site) -> None:
    """A CD was in its drive when it was saved, and is gone from the host since."""
    medium = site.disks / "medium.iso"
    medium.write_bytes(bytes(MIB))
    drive = (
        "<disk type='file' device='cdrom'><driver name='qemu' type='raw'/>{}"
        "<target dev='sdz' bus='sata'/><readonly/></disk>"
    )
    devices = drive.format(f"<source file='{medium}'/>")
    machine = site.machine(["qcow2"], "running", devices=devices)
    machine.guest.wait_ready()
    both = libvirt.VIR_DOMAIN_AFFECT_CONFIG | libvirt.VIR_DOMAIN_AFFECT_LIVE
    both |= libvirt.VIR_DOMAIN_DEVICE_MODIFY_FORCE
    site.done(site.client.snapshots.take(machine.id, with_memory=True))
    machine.guest.domain.updateDeviceFlags(drive.format(""), both)
    medium.unlink()
    boot = machine.guest.domain.ID()

    assert site.refused(site.client.snapshots.revert(machine.id)) == "medium_missing"

    assert machine.guest.domain.ID() == boot
    site.remove(machine)


@on_xfs
def test_a_revert_without_the_memory_boots_from_the_disks(site: Site) -> None:
    """Asked for so, the server boots; a promoted image has the disks alone."""
    machine = site.machine(["qcow2"], "running")
    machine.write("old")
    site.done(site.client.snapshots.take(machine.id, with_memory=True))
    machine.guest.run("mkdir -p /run/held; mount -t tmpfs none /run/held")
    machine.write("new")
    site.done(site.client.snapshots.revert(machine.id, with_memory=False))

    machine.guest.wait_ready()
    assert machine.read() == {"old"}
    assert machine.guest.run("mountpoint /run/held")[0] != 0
    image = site.done(site.client.snapshots.promote(machine.id))["result"]["image"]
    folder = site.vault / "images" / machine.id / image
    assert not (folder / "memory.save").exists()
    assert json.loads((folder / "manifest.json").read_text())["memory"] is None
    site.remove(machine)


@on_xfs
def test_memory_that_cannot_be_had_is_refused(site: Site, stopped: Machine) -> None:
    """A server that is off has none, and one that must be frozen would stay frozen in it."""
    operation = site.client.snapshots.take(stopped.id, replace=True, with_memory=True)
    assert site.refused(operation) == "server_not_running"
    with pytest.raises(Problem) as refusal:
        site.client.snapshots.take(stopped.id, replace=True, with_memory=True, quiesce="require")
    assert refusal.value.code == "unsupported"


@pytest.mark.parametrize("what", ["revert", "restore"])
@on_xfs
def test_an_encrypted_disk_is_put_back(site: Site, what: str) -> None:
    """Byte by byte, by those who do not have its key; and its copy verifies."""
    disk = encrypted(site.disks / f"luks-{what}.qcow2")
    guest = Guest.create(site.hypervisor, site.disks, disks=[str(disk)])
    definition = guest.domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
    guest.connection.defineXML(as_encrypted(definition, disk))
    machine = Machine(site, guest, "stopped", site.register(guest), words=0)
    before = disk.read_bytes()

    if what == "revert":
        site.done(site.client.snapshots.take(machine.id))
        rewrite(disk, fill=9)
        site.done(site.client.snapshots.revert(machine.id))
    else:
        image = site.done(site.client.images.create(machine.id))["result"]["image"]
        rewrite(disk, fill=9)
        site.done(site.client.images.restore(image))
        verified = site.done(site.client.images.verify(image))["result"]
        assert verified["verified"] == "passed"

    assert disk.read_bytes() == before
    site.remove(machine)


@on_xfs
def test_a_restore_over_disks_without_a_domain_can_be_undone(site: Site, stopped: Machine) -> None:
    """Where the domain was undefined but its disks were there, undo puts these disks back."""
    stopped.write("old")
    image = site.done(site.client.images.create(stopped.id))["result"]["image"]
    stopped.write("new")
    stopped.guest.domain.undefine()

    operation = site.done(site.client.images.restore(image))
    assert stopped.state() == "stopped"
    assert stopped.read() == {"old"}

    site.done(site.client.operations.undo(operation["id"]))
    assert stopped.read() == {"new"}


@on_xfs
def test_a_promoted_snapshot_shares_its_data(site: Site) -> None:
    """Promoting makes an image without a second copy of the data, and the image outlives it."""
    machine = site.machine(["raw"], "stopped", noise=256 * MIB)
    machine.write("kept")
    site.done(site.client.snapshots.take(machine.id))
    before = site.used_bytes()

    operation = site.done(site.client.snapshots.promote(machine.id, name="promoted-one"))

    assert site.used_bytes() - before < 8 * MIB
    image = site.client.images.get("promoted-one")
    assert image["id"] == operation["result"]["image"]
    assert (image["origin"], image["way"]) == ("promoted", "reflink")
    site.done(site.client.snapshots.delete(machine.id))
    machine.write("lost")
    site.done(site.client.images.restore("promoted-one"))
    assert machine.read() == {"kept"}
    site.remove(machine)


@on_xfs
def test_clones_come_from_a_snapshot_and_from_an_image(site: Site, stopped: Machine) -> None:
    """A clone holds what its source held; deleting the source leaves it whole (C2)."""
    stopped.write("in the snapshot")
    site.done(site.client.snapshots.take(stopped.id))
    stopped.write("in the image")
    image = site.done(site.client.images.create(stopped.id))["result"]["image"]
    stopped.write("now")

    for kind, source in (("snapshot", stopped.id), ("image", image)):
        operation = site.client.clones.create(
            source, name=f"from-{kind}", source_kind=kind, start=False
        )
        (made,) = site.done(operation)["result"]["clones"]
        clone = clone_machine(site, made, "stopped")
        shown = site.client.clones.get(made["id"])
        assert shown["source"] == {"kind": kind, "id": source}
        if kind == "snapshot":
            site.done(site.client.snapshots.delete(stopped.id))
        else:
            site.done(site.client.images.delete(image))

        assert clone.read() == {f"in the {kind}"}
        clone.write("its own")
        assert stopped.read() == {"now"}
        site.remove(clone)


@on_xfs
def test_an_image_of_a_clone_needs_no_seed(site: Site, running: Machine) -> None:
    """The clone is deleted with the seed that cloud-init was given; it comes back by its image and
    starts, and so does a clone of the image."""
    asked = {"name": "seeded", "identity": "cloud-init"}
    (made,) = site.done(site.client.clones.create(running.id, **asked))["result"]["clones"]
    seeded = clone_machine(site, made, "running", 1)
    seeded.write("seeded")
    (seed,) = site.disks.glob("seeded-seed.iso")
    image = site.done(site.client.images.create(seeded.id))["result"]["image"]
    site.done(site.client.clones.delete(made["id"]))
    assert not seed.exists()

    site.done(site.client.images.restore(image))
    again = clone_machine(site, made, "running", 1)
    again.guest.start()
    assert again.read() == {"seeded"}
    assert site.client.servers.get(seeded.id)["state"] == "running"
    site.done(site.client.snapshots.take(seeded.id))

    operation = site.client.clones.create(image, source_kind="image", name="of-seeded")
    (made,) = site.done(operation)["result"]["clones"]
    clone = clone_machine(site, made, "running", 1)
    assert clone.read() == {"seeded"}
    site.remove(clone)
    site.remove(again)


@on_xfs
def test_one_clone_that_fails_leaves_the_others_alone(site: Site, stopped: Machine) -> None:
    """Of three clones the one whose disk file exists fails by name; two are ready (C4)."""
    stopped.write("common")
    suffix = stopped.disks[0].suffix
    taken = site.disks / f"farm-2-vda{suffix}"
    taken.write_text("somebody else's")

    operation = site.client.clones.create(stopped.id, name="farm-{n}", count=3, start=False)
    made = site.done(operation)["result"]["clones"]

    assert [each["name"] for each in made] == ["farm-1", "farm-2", "farm-3"]
    assert [each["state"] for each in made] == ["ready", "failed", "ready"]
    assert made[1]["error"]["code"] == "clone_name_taken"
    assert taken.read_text() == "somebody else's"
    assert attach(site.hypervisor, "farm-2").state() == "missing"
    for each in (made[0], made[2]):
        clone = clone_machine(site, each, "stopped")
        assert clone.read() == {"common"}
        site.remove(clone)
    taken.unlink()


@pytest.mark.parametrize("site", ["ext4"], indirect=True)
def test_a_cancelled_farm_leaves_nothing(site: Site) -> None:
    """Neither of the two that are being made nor of those that wait for their turn (E5)."""
    machine = site.machine(["raw"], "stopped")
    with site.points.held(
        lambda: site.client.clones.create(machine.id, name="never-{n}", count=4),
        "materialise:written",
        "materialise:written",
    ) as operation:
        site.client.operations.cancel(operation["id"])

    assert site.ended(operation)["state"] == "cancelled"
    names = {each.name() for each in site.hypervisor_connection().listAllDomains()}
    assert not [name for name in names if name.startswith("never-")]
    assert list(site.disks.glob("never-*")) == []
    shown = [each for each in site.client.clones.list() if each["name"].startswith("never-")]
    assert [each["state"] for each in shown] == ["cancelled"] * 4
    site.remove(machine)


@on_xfs
def test_a_clone_is_given_other_vcpus_and_memory(site: Site, stopped: Machine) -> None:
    """vCPUs and memory are as asked for; without asking as the source's (C1)."""
    bigger = site.client.clones.create(
        stopped.id, name="bigger", start=False, vcpus=3, memory_mib=320
    )
    same = site.client.clones.create(stopped.id, name="same", start=False)

    sizes = {}
    for operation in (bigger, same):
        (made,) = site.done(operation)["result"]["clones"]
        clone = clone_machine(site, made, "stopped")
        info = clone.guest.domain.info()
        sizes[made["name"]] = (info[3], info[1] // 1024)
        wait_for(lambda made=made: site.client.servers.get(made["server"])["vcpus"], "is seen")
        server = site.client.servers.get(made["server"])
        assert (server["vcpus"], server["memory_bytes"] // MIB) == sizes[made["name"]]
        site.remove(clone)
    assert sizes == {"bigger": (3, 320), "same": (1, 192)}


@pytest.mark.parametrize("site", ["xfs", "ext4"], indirect=True)
def test_a_guest_that_its_owner_paused_stays_paused(site: Site, running: Machine) -> None:
    """Neither a snapshot nor an image nor a revert resumes a guest that its owner paused."""
    running.write("paused")
    running.guest.domain.suspend()
    try:
        site.done(site.client.snapshots.take(running.id, replace=True))
        assert running.state() == "paused"
        site.done(site.client.images.create(running.id))
        assert running.state() == "paused"
        reverted = site.done(site.client.snapshots.revert(running.id))
        assert running.state() == "paused"
        assert reverted["result"]["state"] == "paused"
    finally:
        running.guest.domain.resume()
    assert running.read() == {"paused"}


@on_xfs
def test_what_the_workers_do_in_the_background(site: Site) -> None:
    """Digests and sizes come by themselves: a byte that is flipped from then on is found by the
    first verification, and the host adds up what its copies take up."""
    machine = site.machine(["raw"], "stopped", noise=64 * MIB)
    image = site.done(site.client.images.create(machine.id))["result"]["image"]
    folder = site.copy_of("image", machine)

    def complete() -> bool:
        manifest = json.loads((folder / "manifest.json").read_text())
        return all(disk["digest"] for disk in manifest["disks"])

    wait_for(complete, "the digests are there")
    wait_for(lambda: site.client.images.get(image)["unique_bytes"] is not None, "it was measured")
    assert site.client.images.get(image)["unique_bytes"] < MIB  # the live disk has the rest
    used = site.client.hosts.get(site.host)["vault_usage"]
    assert used["measured"] >= 1
    assert used["apparent_bytes"] >= used["shared_bytes"] >= 64 * MIB

    disk = folder / "vdb.raw"
    disk.chmod(0o600)
    with disk.open("r+b") as file:
        file.seek(40 * MIB)
        byte = file.read(1)
        file.seek(40 * MIB)
        file.write(bytes([byte[0] ^ 1]))
    result = site.done(site.client.images.verify(image))["result"]
    assert (result["verified"], [each["file"] for each in result["faults"]]) == (
        "damaged",
        ["vdb.raw"],
    )
    site.remove(machine)
