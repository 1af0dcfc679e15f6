"""A guest on a file system that shares extents, for tests of what touches libvirt."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from testcontainers.core.container import DockerContainer
from testcontainers.core.wait_strategies import LogMessageWaitStrategy

from lab import filesystems
from lab.containers import Engine
from lab.guest import Guest
from lab.libvirtd import REPOSITORY, Hypervisor, scratch
from shared.hypervisor.connection import connect
from shared.hypervisor.domains import Domain, find_by_name
from shared.hypervisor.watchdog import Watchdog

IMAGE = "triptych/hypervisor:lab"


@pytest.fixture(scope="session", params=["machine", "debian-13"])
def hypervisor(request: pytest.FixtureRequest, hypervisor: Hypervisor) -> Iterator[Hypervisor]:
    """The machine's libvirt, and then that of Debian 13 (libvirt 11, QEMU 10) in a container."""
    if request.param == "machine":
        yield hypervisor
        return
    engine: Engine = request.getfixturevalue("engine")
    engine.ensure("debian:trixie-slim")
    dockerfile = str(REPOSITORY / "deploy/hypervisor/Dockerfile")
    engine.docker("build", "--quiet", "--tag", IMAGE, "--file", dockerfile, str(REPOSITORY))
    with scratch() as state:
        run = state / "run"
        run.mkdir()
        container = (
            DockerContainer(IMAGE)
            .with_command("python3 -m lab.demo_host --bare")
            .with_volume_mapping(str(run), "/run/libvirt", "rw")
            # The same paths inside as outside, and file systems that are mounted later.
            .with_volume_mapping(tempfile.gettempdir(), tempfile.gettempdir(), "rw")
            .with_volume_mapping(
                str(filesystems.mount_root()), str(filesystems.mount_root()), "rw,rslave"
            )
            .with_kwargs(init=True)
            .waiting_for(LogMessageWaitStrategy("ready").with_startup_timeout(120))
        )
        with container:
            yield Hypervisor(state, f"qemu+unix:///system?socket={run}/libvirt-sock")


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


@pytest.fixture
def folder(xfs: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A vault folder in the making, on the guest's file system."""
    path = xfs / "copies" / request.node.name.replace("/", "_")
    path.mkdir(parents=True)
    for directory in (path.parent, path):
        directory.chmod(0o711)
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="session")
def watchdog(hypervisor: Hypervisor) -> Iterator[Watchdog]:
    """A watchdog whose helper runs."""
    watchdog = Watchdog(hypervisor.uri, hypervisor.state_dir / "holds")
    watchdog.start()
    yield watchdog
    watchdog.close()
