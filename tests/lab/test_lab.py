"""The lab keeps its own promises: real guests, readable from outside, and no traces."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from lab import filesystems, kvm, offline
from lab.guest import Guest, attach
from lab.libvirtd import Hypervisor, LabUnavailable, libvirtd

pytestmark = pytest.mark.vm


def test_what_is_written_inside_is_read_inside_and_from_the_disk(guest: Guest) -> None:
    """A file written through the agent is there inside, and on the disk after shutdown."""
    guest.write("/data/word", "kept\n")

    assert guest.read("/data/word") == "kept\n"
    assert guest.run("exit 3") == (3, "")
    assert guest.agent("guest-fsfreeze-freeze") >= 2
    assert guest.agent("guest-fsfreeze-thaw") >= 2

    guest.shutdown()

    root, data = guest.disks
    assert offline.read_file(data, "/word") == "kept\n"
    assert offline.fsck(root).clean
    assert offline.fsck(data).clean
    assert offline.check(root).clean


def test_a_disk_changed_offline_boots_with_the_change(guest: Guest) -> None:
    """A host name written to the stopped guest's qcow2 is the one it boots with."""
    guest.shutdown()

    offline.write_file(guest.disks[0], "/etc/hostname", "renamed\n")

    assert guest.start().run("hostname") == (0, "renamed\n")


def test_removing_a_guest_leaves_nothing(hypervisor: Hypervisor, workspace: Path) -> None:
    """Definition, disks and console log are gone."""
    with Guest.create(hypervisor, workspace) as guest:
        guest.start(wait=False)

    assert attach(hypervisor, guest.name).state() == "missing"
    assert not list(workspace.iterdir())


def test_guests_survive_a_stop_of_our_own_libvirtd(hypervisor: Hypervisor, workspace: Path) -> None:
    """After a stop and after a kill of libvirtd the same guest runs on, its memory in place."""
    with contextlib.ExitStack() as stack:
        if not hypervisor.ours:
            try:
                hypervisor = stack.enter_context(libvirtd(own=True))
            except LabUnavailable as reason:
                pytest.skip(str(reason))
        guest = stack.enter_context(Guest.create(hypervisor, workspace)).start()
        guest.run("echo alive >/run/mark")
        for kill in (False, True):
            hypervisor.stop(kill=kill)
            hypervisor.start()

            assert guest.state() == "running"
            assert guest.wait_ready().read("/run/mark") == "alive\n"


@pytest.mark.skipif(not filesystems.can_mount(), reason="needs the right to mount")
@pytest.mark.parametrize("make", [filesystems.xfs, filesystems.btrfs, filesystems.ext4])
def test_a_file_system_mounted_later_is_seen_by_libvirtd(
    make: Callable[[int], AbstractContextManager[Path]], hypervisor: Hypervisor
) -> None:
    """A guest runs from a file system that was mounted after libvirtd's start."""
    with (
        make(512 * filesystems.MIB) as directory,
        Guest.create(hypervisor, directory, disks=["raw"]) as guest,
    ):
        assert guest.start().run("true")[0] == 0

    assert not directory.exists()


def test_kvm_stays_open_when_another_lab_of_this_process_ends(hypervisor: Hypervisor) -> None:
    """A lab that ends does not take `/dev/kvm` from one that goes on, in one process either."""
    if kvm.DEVICE.exists():
        with kvm.opened_for(hypervisor.qemu_user):
            pass

    assert not kvm.DEVICE.exists() or kvm.accessible(hypervisor.qemu_user)
