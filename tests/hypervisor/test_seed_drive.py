"""The drive of a cloud-init seed, whose file goes with the clone that it was made for."""

from __future__ import annotations

from pathlib import Path

import pytest
from lxml import etree

from lab.guest import Guest, make_disk
from lab.libvirtd import Hypervisor
from shared.hypervisor.seed_drive import with_seed

DRIVES = {"virtio": ("vda", "disk"), "sata": ("sda", "cdrom")}
"""By its bus, the name of the guest's first disk, and what the drive is."""


@pytest.mark.vm
@pytest.mark.parametrize("bus", DRIVES)
def test_a_domain_whose_seed_is_gone_starts(
    hypervisor: Hypervisor, workspace: Path, bus: str
) -> None:
    """Without the seed, and with it again once it is there: the definition keeps the drive."""
    name, device = DRIVES[bus]
    seed = workspace / "a-seed.iso"
    blank = str(make_disk(workspace, "raw", "blank"))
    with Guest.create(hypervisor, workspace, disks=[blank]) as made:
        root = etree.fromstring(made.domain.XMLDesc())
        (disk,) = root.iterfind("devices/disk")
        target, address = disk.find("target"), disk.find("address")
        assert target is not None
        assert address is not None
        target.attrib.update({"dev": name, "bus": bus})
        disk.remove(address)
        made.connection.defineXML(with_seed(etree.tostring(root, encoding="unicode"), seed))

        made.start(wait=False)
        assert made.state() == "running"
        assert str(seed) not in made.domain.XMLDesc()
        made.destroy()
        make_disk(workspace, "raw", "blank", name=seed.name)
        made.start(wait=False)
        drives = etree.fromstring(made.domain.XMLDesc()).iterfind("devices/disk[readonly]")
        (source,) = (each.find("source") for each in drives if each.get("device") == device)
        assert source is not None
        assert source.get("file") == str(seed)
