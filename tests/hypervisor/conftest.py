"""A guest on a file system that shares extents, for tests of what touches libvirt."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import filesystems
from lab.guest import Guest
from lab.libvirtd import Hypervisor
from shared.hypervisor.connection import connect
from shared.hypervisor.domains import Domain, find_by_name
from shared.hypervisor.watchdog import Watchdog


@pytest.fixture(scope="session")
def xfs() -> Iterator[Path]:
    """An XFS with reflinks that QEMU's user can enter."""
    if not filesystems.can_mount():
        pytest.skip("mounting a loop device needs root")
    with filesystems.xfs(filesystems.GIB) as directory:
        yield directory


@pytest.fixture(scope="session")
def running(hypervisor: Hypervisor, xfs: Path) -> Iterator[Guest]:
    """A running guest with its agent: a qcow2 root disk and a raw one at /data, on XFS."""
    with Guest.create(hypervisor, xfs / "guest", disks=["qcow2", "raw"]) as made:
        yield made.start()


@pytest.fixture
def guest(running: Guest) -> Iterator[Guest]:
    """That guest, running before the test; and afterwards, which is part of the test."""
    assert running.state() == "running"
    yield running
    assert running.state() == "running"


@pytest.fixture
def domain(guest: Guest) -> Domain:
    """The guest as the code under test holds it."""
    return find_by_name(connect(guest.hypervisor.uri), guest.name)


@pytest.fixture(scope="session")
def watchdog(hypervisor: Hypervisor) -> Iterator[Watchdog]:
    """A watchdog whose helper runs."""
    watchdog = Watchdog(hypervisor.uri)
    watchdog.start()
    yield watchdog
    watchdog.close()
