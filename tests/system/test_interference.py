"""Somebody else's hands on the server meanwhile: never disks swapped under a guest (E2)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from xml.etree import ElementTree

import libvirt
import pytest
from live_site import Machine, Site, wait_for

from lab import filesystems
from lab.guest import make_disk
from shared.hypervisor.locks import is_open

pytestmark = pytest.mark.vm
on_ext4 = pytest.mark.parametrize("site", ["ext4"], indirect=True)
on_xfs = pytest.mark.parametrize("site", ["xfs"], indirect=True)


@pytest.fixture
def reverted(site: Site) -> Iterator[Machine]:
    """A running server: `before` in its snapshot, then `after` on its disk."""
    made = site.machine(["qcow2"], "running")
    made.write("before")
    site.done(site.client.snapshots.take(made.id))
    made.write("after")
    yield made
    site.remove(made)


@on_ext4
def test_a_server_started_while_it_is_reverted_runs_on_the_snapshots_disks(
    site: Site, reverted: Machine
) -> None:
    """What counts is the power state when the disks are swapped, not when the copy began."""
    reverted.guest.destroy()
    with site.points.held(
        lambda: site.client.snapshots.revert(reverted.id), "materialise:written"
    ) as operation:
        reverted.guest.start(wait=False)

    ended = site.done(operation)

    assert ended["result"]["state"] == "running"
    assert reverted.read() == {"before"}


@on_ext4
def test_disks_are_not_swapped_under_a_server_that_was_started_again(
    site: Site, reverted: Machine
) -> None:
    """Once ours had stopped it: it runs on."""
    with site.points.held(
        lambda: site.client.snapshots.revert(reverted.id), "stopped"
    ) as operation:
        reverted.guest.start(wait=False)
        since = reverted.guest.domain.ID()

    assert site.refused(operation) == "server_changed"
    assert reverted.read() == {"after"}
    assert reverted.guest.domain.ID() == since
    assert_lasting(reverted)


@on_ext4
def test_a_server_started_in_the_swap_keeps_the_disk_that_it_had(
    site: Site, reverted: Machine
) -> None:
    """It has the old file open, which gets its name again: nothing that it writes is lost."""
    with site.points.held(
        lambda: site.client.snapshots.revert(reverted.id), "swap:linked"
    ) as operation:
        reverted.guest.start(wait=False)

    assert site.refused(operation) == "server_changed"
    assert reverted.read() == {"after"}
    assert_lasting(reverted)


@on_ext4
def test_a_server_started_between_two_swaps_has_no_disks_of_two_instants(site: Site) -> None:
    """One disk of the snapshot, one of its own: it is started anew on its own, with all of them."""
    machine = site.machine(["qcow2", "raw"], "running")
    machine.write("before")
    site.done(site.client.snapshots.take(machine.id))
    machine.write("after")
    machine.guest.destroy()
    with site.points.held(
        lambda: site.client.snapshots.revert(machine.id), "swap:replaced"
    ) as operation:
        machine.guest.start(wait=False)

    assert site.refused(operation) == "server_changed"
    assert machine.state() == "running"
    assert machine.read() == {"after"}
    assert_lasting(machine)
    site.remove(machine)


def held_before_undo(site: Site, ask: Callable[[], Any], at: str, action: str) -> Any:
    """An operation that swapped the disks, ended in an error, and waits to put them back."""
    site.points.arm((at, "raise"), (f"undo:{action}", "wait"))
    operation = ask()
    wait_for(lambda: site.points.reached, f"it comes to {action}")
    return operation


@on_ext4
@pytest.mark.parametrize(
    ("undoing", "killed"),
    [(False, False), (False, True), (True, False)],
    ids=["revert", "revert, killed", "its undo"],
)
def test_a_server_started_before_an_undo_is_not_left_on_disks_that_go(
    site: Site, reverted: Machine, undoing: bool, killed: bool
) -> None:
    """The disks were swapped and the server off when the work ended in an error, and its owner
    started it before all was put back. It is started anew on the disks that it has in the end,
    also where the worker dies between."""
    asks = site.client.snapshots.revert, site.client.operations.undo
    expected, at, action, of = "after", "swap:replaced", "swap_back", reverted.id
    if undoing:
        of = site.done(asks[0](reverted.id))["id"]
        expected, at, action = "before", "swap_back:replaced", "swap_again"
    reverted.guest.destroy()  # so that nothing else in the journal starts it
    operation = held_before_undo(site, lambda: asks[undoing](of), at, action)
    reverted.guest.start(wait=False)
    if killed:
        site.points.arm(("without:off", "kill"))
    site.points.go()

    assert site.ended(operation)["state"] == "failed"
    assert reverted.state() == "running"
    assert reverted.read() == {expected}
    assert_lasting(reverted)


@on_ext4
def test_a_state_saved_before_an_undo_is_not_woken_on_other_disks(
    site: Site, reverted: Machine
) -> None:
    """The owner had started the server on disks that go, and saved it there."""
    operation = held_before_undo(
        site,
        lambda: site.client.snapshots.revert(reverted.id),
        "swap:replaced",
        "swap_back",
    )
    reverted.guest.start()
    reverted.guest.domain.managedSave()
    site.points.go()

    assert site.ended(operation)["state"] == "failed"
    assert reverted.read() == {"after"}
    assert_lasting(reverted)


@on_ext4
def test_a_server_whose_lost_disk_came_back_meanwhile_runs_on(site: Site) -> None:
    """What its owner put there was not brought by the restore, and is not taken away."""
    machine = site.machine(["raw", "raw"], "stopped")
    image = site.done(site.client.images.create(machine.id))["result"]["image"]
    machine.write("newer")
    lost = machine.disks[0]
    elsewhere = lost.rename(lost.with_suffix(".elsewhere"))
    with site.points.held(
        lambda: site.client.images.restore(image), "journalled:swap_back"
    ) as operation:
        elsewhere.rename(lost)
        machine.guest.start(wait=False)
        since = machine.guest.domain.ID()

    assert site.refused(operation) == "server_changed"
    assert machine.guest.domain.ID() == since
    machine.guest.destroy()
    assert machine.read() == {"newer"}
    site.remove(machine)


@pytest.fixture
def remembered(site: Site) -> Iterator[Machine]:
    """A server that is off: `before` in its snapshot with memory, then `after` on its disk."""
    made = site.machine(["qcow2"], "running")
    made.write("before")
    site.done(site.client.snapshots.take(made.id, with_memory=True))
    made.write("after")
    made.guest.run("sync")
    made.guest.destroy()
    yield made
    site.remove(made)


@on_xfs
def test_a_server_started_before_its_memory_is_resumed_is_not_forced_off(
    site: Site, remembered: Machine
) -> None:
    """It was off, and is its owner's, started anew on its own disks."""
    with site.points.held(
        lambda: site.client.snapshots.revert(remembered.id, with_memory=True),
        "swap:replaced",
    ) as operation:
        remembered.guest.start(wait=False)

    assert site.refused(operation) == "server_changed"
    assert remembered.state() == "running"
    assert remembered.read() == {"after"}


@on_xfs
def test_a_server_started_after_a_crash_is_not_taken_for_a_resumed_one(
    site: Site, remembered: Machine
) -> None:
    """The worker died before it resumed the memory of a server that was off, and the owner started
    the server before all was put back. It runs on its own disks, also where nothing is tried
    again."""
    site.points.arm(("journalled:stop_domain", "kill"), ("undo:stop_domain", "wait"))
    operation = site.client.snapshots.revert(remembered.id, with_memory=True)
    wait_for(lambda: site.points.reached, "it comes to undoing")
    remembered.guest.start(wait=False)
    site.client.operations.cancel(operation["id"])
    site.points.go()

    assert site.ended(operation)["state"] == "cancelled"
    assert remembered.state() == "running"
    assert remembered.read() == {"after"}
    assert_lasting(remembered)


@on_xfs
def test_a_server_that_was_resumed_when_its_worker_died_is_off_again(
    site: Site, remembered: Machine
) -> None:
    """Nobody but the revert had started it."""
    site.points.arm(("started", "kill"), ("undo:stop_domain", "wait"))
    operation = site.client.snapshots.revert(remembered.id, with_memory=True)
    wait_for(lambda: site.points.reached, "it comes to undoing")
    assert remembered.state() == "running"
    site.client.operations.cancel(operation["id"])
    site.points.go()

    assert site.ended(operation)["state"] == "cancelled"
    assert remembered.state() == "stopped"
    remembered.guest.start()
    assert remembered.read() == {"after"}


def assert_lasting(machine: Machine) -> None:
    """What the guest writes goes to the files that it is started with next time."""
    wait_for(lambda: all(map(is_open, machine.disks)), "its disks are open by their names")


def with_a_lost_disk(site: Site) -> tuple[Machine, str, bytes]:
    """A server whose first disk was lost after its image; and what is on the other one since."""
    machine = site.machine(["raw", "raw"], "stopped")
    machine.write("image")
    image = site.done(site.client.images.create(machine.id))["result"]["image"]
    machine.write("newer")
    lost, kept = machine.disks
    lost.unlink()
    return machine, image, kept.read_bytes()


@on_ext4
def test_a_failed_restore_of_a_lost_disk_leaves_none_behind(site: Site) -> None:
    """The disk that was lost is lost again, and the other one is what it was."""
    machine, image, newer = with_a_lost_disk(site)
    lost, kept = machine.disks
    site.points.arm(("committing", "raise"))

    site.refused(site.client.images.restore(image))

    assert not lost.exists()
    assert kept.read_bytes() == newer
    site.remove(machine)


@on_ext4
def test_a_saved_state_that_appears_meanwhile_is_never_woken_on_other_disks(
    site: Site, reverted: Machine
) -> None:
    """The revert is refused, and the guest goes on from its state on the disks that are its."""
    with site.points.held(
        lambda: site.client.snapshots.revert(reverted.id), "materialise:written"
    ) as operation:
        reverted.guest.domain.managedSave()

    assert site.refused(operation) == "managed_save_present"
    reverted.guest.start()
    reverted.guest.run("echo 3 > /proc/sys/vm/drop_caches")
    assert reverted.read() == {"after"}


@on_xfs
def test_a_disk_that_another_domain_uses_is_not_replaced(site: Site, stopped: Machine) -> None:
    """A twin on the same file keeps it: the revert, and a copy, are refused."""
    stopped.write("before")
    site.done(site.client.snapshots.take(stopped.id))
    twin = stopped.guest.xml
    twin.find("name").text = f"{stopped.name}-twin"  # type: ignore[union-attr]
    twin.remove(twin.find("uuid"))  # type: ignore[arg-type]
    domain = stopped.guest.connection.createXML(ElementTree.tostring(twin, encoding="unicode"))
    try:
        revert = site.refused(site.client.snapshots.revert(stopped.id))
        image = site.refused(site.client.images.create(stopped.id))
    finally:
        domain.destroy()

    assert (revert, image) == ("disk_in_use", "disk_in_use")
    assert stopped.read() == {"before"}


@pytest.mark.parametrize("site", ["xfs", "ext4"], indirect=True)
def test_a_freeze_of_its_owners_is_left(site: Site) -> None:
    """Somebody else copies the disks just then: no copy thaws the guest, nor what undoes one."""
    machine = site.machine(["qcow2"], "running")
    machine.write("frozen")
    machine.guest.agent("guest-fsfreeze-freeze")
    held = "stream:begun" if site.way == "stream" else "reflink:shared"
    try:
        taken = site.done(site.client.snapshots.take(machine.id))["result"]["consistency"]
        refused = site.refused(site.client.images.create(machine.id, quiesce="require"))
        states = []
        for quiesce in ("auto", "never"):
            with site.points.held(
                partial(site.client.images.create, machine.id, quiesce=quiesce), held
            ) as operation:
                site.client.operations.cancel(operation["id"])
            states.append(site.ended(operation)["state"])
        left = machine.guest.agent("guest-fsfreeze-status")
    finally:
        machine.guest.agent("guest-fsfreeze-thaw")
    site.remove(machine)

    assert left == "frozen"
    assert (taken, refused, states) == ("crash", "quiesce_failed", ["cancelled"] * 2)


@on_ext4
def test_a_freeze_of_its_owners_during_a_stream_is_left(site: Site) -> None:
    """Ours was over by then: what undoes the copy thaws nobody's."""
    machine = site.machine(["qcow2"], "running")
    machine.write("streamed")
    with site.points.held(lambda: site.client.images.create(machine.id), "stream:copied") as made:
        machine.guest.agent("guest-fsfreeze-freeze")
        site.client.operations.cancel(made["id"])
    ended = site.ended(made)
    left = machine.guest.agent("guest-fsfreeze-status")
    machine.guest.agent("guest-fsfreeze-thaw")
    site.remove(machine)

    assert (ended["state"], left) == ("cancelled", "frozen")


@on_xfs
def test_a_guest_that_halted_for_want_of_room_runs_after_a_revert(site: Site) -> None:
    """QEMU stopped it on a write that found none, which is no pause of its owner's."""
    machine = site.machine(["qcow2", "raw"], "running")
    machine.write("before")
    site.done(site.client.snapshots.take(machine.id))
    fills = "sleep 2; dd if=/dev/urandom of=/data/much bs=1M count=64 oflag=direct"
    machine.guest.agent("guest-exec", path="/bin/sh", arg=["-c", fills])
    ballast = filesystems.fill(site.folder)
    try:
        wait_for(lambda: machine.state() == "paused", "it halts")
    finally:
        ballast.unlink()

    reverted = site.done(site.client.snapshots.revert(machine.id))

    assert (reverted["result"]["state"], machine.state()) == ("running", "running")
    assert machine.read() == {"before"}
    site.remove(machine)


@on_xfs
def test_a_transient_domain_is_not_reverted(site: Site) -> None:
    """Stopping it would be its end: it is refused, and runs on."""
    machine = site.machine(["qcow2"], "running")
    site.done(site.client.snapshots.take(machine.id))
    definition = machine.guest.domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
    machine.guest.domain.undefine()

    code = site.refused(site.client.snapshots.revert(machine.id))
    state = machine.guest.state()
    machine.guest.connection.defineXML(definition)
    site.remove(machine)

    assert (code, state) == ("server_transient", "running")


@on_xfs
def test_a_hot_plugged_disk_comes_back_with_the_copy(site: Site) -> None:
    """What the running server really had is in the copy and in its definition."""
    machine = site.machine(["qcow2"], "running")
    plugged = make_disk(machine.disks[0].parent, "raw", "blank", name=f"{machine.name}-hot.raw")
    with plugged.open("r+b") as file:
        file.write(b"plugged")
    machine.guest.domain.attachDeviceFlags(
        f"<disk type='file' device='disk'><driver name='qemu' type='raw'/>"
        f"<source file='{plugged}'/><target dev='vdx' bus='virtio'/></disk>",
        libvirt.VIR_DOMAIN_AFFECT_LIVE,
    )
    site.done(site.client.snapshots.take(machine.id))
    site.done(site.client.snapshots.revert(machine.id))
    machine.guest.wait_ready()
    targets = {node.get("dev") for node in machine.guest.xml.iterfind("devices/disk/target")}
    status, inside = machine.guest.run("head -c 7 /dev/vdb")
    site.remove(machine)

    assert {"vda", "vdx"} <= targets
    assert (status, inside) == (0, "plugged")


@on_xfs
def test_a_renamed_domain_is_restored_under_its_new_name(site: Site, stopped: Machine) -> None:
    """`virsh domrename` does not stand in the way of the image made before it."""
    stopped.write("before")
    image = site.done(site.client.images.create(stopped.id))["result"]["image"]
    stopped.write("after")
    stopped.guest.domain.rename(f"{stopped.name}-new", 0)
    stopped.guest.name += "-new"

    site.done(site.client.images.restore(image))

    assert stopped.read() == {"before"}


@on_xfs
def test_undoing_the_restore_of_a_lost_disk_is_no_mix(site: Site) -> None:
    """The disk that was lost is lost again, the other one is as it was before the restore."""
    machine, image, newer = with_a_lost_disk(site)
    lost, kept = machine.disks
    restored = site.done(site.client.images.restore(image))

    site.done(site.client.operations.undo(restored["id"]))

    assert not lost.exists()
    assert kept.read_bytes() == newer
    wait_for(lambda: not list(kept.parent.glob(f".triptych-{restored['id']}")), "no leftovers")
    site.remove(machine)
