"""Servers whose disks QEMU encrypts: only the server has the key."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import libvirt
import pytest

from lab.guest import Guest
from lab.libvirtd import Hypervisor
from lab.qemu_img import KEY, SECRET, as_encrypted, encrypted
from shared.disks.copied import CopiedDisk
from shared.disks.engine import capture
from shared.disks.materialise import materialise
from shared.hypervisor.connection import connect
from shared.hypervisor.domains import Domain, find_by_name
from shared.hypervisor.errors import DiskNotCopyable
from shared.hypervisor.watchdog import Watchdog

pytestmark = pytest.mark.vm


@pytest.fixture
def disk(xfs: Path) -> Path:
    (xfs / "encrypted").mkdir(exist_ok=True)
    return encrypted(xfs / "encrypted" / "luks.qcow2")


@pytest.fixture
def server(hypervisor: Hypervisor, disk: Path) -> Iterator[Guest]:
    """A server that is off, its one disk encrypted; libvirt has the key."""
    with Guest.create(hypervisor, disk.parent, disks=[str(disk)]) as made:
        plain = made.domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
        made.connection.defineXML(as_encrypted(plain, disk))
        secret = made.connection.secretDefineXML(
            f"<secret ephemeral='yes' private='no'><uuid>{SECRET}</uuid></secret>"
        )
        secret.setValue(KEY.encode())
        yield made
        secret.undefine()
    disk.unlink(missing_ok=True)


@pytest.fixture
def domain(server: Guest) -> Domain:
    return find_by_name(connect(server.hypervisor.uri), server.name)


@pytest.mark.parametrize("power", ["running", "stopped"])
def test_it_is_copied_and_put_back(
    server: Guest, domain: Domain, disk: Path, watchdog: Watchdog, folder: Path, power: str
) -> None:
    """Byte by byte; and libvirt, which has the key, starts the server on it."""
    if power == "running":
        server.start(wait=False)
    taken = capture(domain, folder, watchdog=watchdog, quiesce="never")
    assert taken.way == "reflink"
    server.destroy()
    before = disk.read_bytes()
    disk.unlink()

    (copy,) = taken.files
    stored = CopiedDisk(copy.target, copy.path, copy.format, copy.virtual_bytes, copy.bytes)
    materialise([stored], {"vda": disk})

    if power == "stopped":
        assert disk.read_bytes() == before
    server.start(wait=False)
    assert server.state() == "running"


@pytest.mark.parametrize("told", [True, False])
def test_it_is_not_streamed(
    server: Guest, domain: Domain, watchdog: Watchdog, folder: Path, disk: Path, told: bool
) -> None:
    """What would need the key is refused beforehand, also where only the image tells of it."""
    if not told:
        xml = server.domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
        start, rest = xml.split("<encryption", 1)
        server.connection.defineXML(start + rest.split("</encryption>", 1)[1])
    steps: list[str] = []
    with pytest.raises(DiskNotCopyable, match="encrypted"):
        capture(domain, folder, watchdog=watchdog, way="stream", before=steps.append)
    assert (steps, list(folder.iterdir())) == ([], [])
