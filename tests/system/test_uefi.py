"""The UEFI variables of a server go with its disks, also where libvirt is to choose the firmware:
one before 9.2 does so at each start, and its definition of a server that is off names none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import libvirt
import pytest
from live_site import Machine, Site

from lab.guest import attach
from shared.hypervisor.definition import NVRAM_FOLDER

pytestmark = [pytest.mark.vm, pytest.mark.parametrize("site", ["xfs"], indirect=True)]

OURS = b"what its owner set"


def variables_of(site: Site, name: str) -> Path:
    """Where libvirt keeps them, as seen from outside."""
    return site.hypervisor.swtpm.parent / "qemu" / "nvram" / f"{name}_VARS.fd"


def rewrite(variables: Path, data: bytes) -> None:
    with variables.open("r+b") as file:
        file.seek(variables.stat().st_size - 4096)
        file.write(data.ljust(32))


def written(variables: Path) -> bytes:
    return variables.read_bytes()[-4096:].split(b"\0")[0][:32].strip()


@pytest.fixture
def uefi(site: Site) -> Iterator[Machine]:
    """A stopped server with UEFI, whose variables libvirt made at its first start."""
    made = site.machine(["raw"], "stopped")
    definition = made.guest.xml
    system: Any = definition.find("os")
    system.set("firmware", "efi")
    for node in [*system.findall("kernel"), *system.findall("initrd"), *system.findall("cmdline")]:
        system.remove(node)
    made.guest.domain.connect().defineXML(ElementTree.tostring(definition, "unicode"))
    made.guest.start(wait=False).destroy()
    # The workers are not where the lab's libvirtd has its own /var/lib/libvirt.
    seen = Path(NVRAM_FOLDER) / variables_of(site, made.name).name
    linked = not seen.exists()
    if linked:
        seen.parent.mkdir(parents=True, exist_ok=True)
        seen.symlink_to(variables_of(site, made.name))
    try:
        rewrite(variables_of(site, made.name), OURS)
        yield made
        if made.state() != "missing":
            site.remove(made)
    finally:
        if linked:
            seen.unlink()


@pytest.mark.parametrize("power", ["running", "stopped"])
def test_a_revert_brings_the_variables_of_its_instant(
    site: Site, uefi: Machine, power: str
) -> None:
    """A server that runs on as it did, or is off as it was; undo puts back what was replaced."""
    variables = variables_of(site, uefi.name)
    if power == "running":
        uefi.guest.start(wait=False)
    site.done(site.client.snapshots.take(uefi.id))
    rewrite(variables, b"later")

    reverted = site.done(site.client.snapshots.revert(uefi.id))

    assert written(variables) == OURS
    assert uefi.state() == power
    site.done(site.client.operations.undo(reverted["id"]))
    assert written(variables) == b"later"
    uefi.guest.destroy()


def test_a_restore_brings_them_back_with_their_server(site: Site, uefi: Machine) -> None:
    """Copied while it was off, undefined with all that it had, and restored, it starts with what
    was set."""
    variables = variables_of(site, uefi.name)
    image = site.done(site.client.images.create(uefi.id))["result"]["image"]
    uefi.guest.domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_NVRAM)
    assert not variables.exists()

    site.done(site.client.images.restore(image))

    assert written(variables) == OURS
    attach(site.hypervisor, uefi.name).start(wait=False).destroy()
    assert written(variables) == OURS


def test_a_clone_has_a_copy_of_its_own(site: Site, uefi: Machine) -> None:
    """Written by the clone, the source's stay as they are; deleted with the clone."""
    made = site.done(site.client.clones.create(uefi.id, name=f"{uefi.name}-c", start=False))
    (told,) = made["result"]["clones"]
    clone = attach(site.hypervisor, told["name"])
    own = Path(clone.xml.findtext("os/nvram") or "")
    assert "nvram" in told["identity"]["renewed"]

    clone.start(wait=False).destroy()

    assert written(own) == OURS
    rewrite(own, b"the clone's")
    assert written(variables_of(site, uefi.name)) == OURS
    site.done(site.client.clones.delete(told["id"]))
    assert not own.exists()


def test_variables_that_cannot_be_read_are_named(site: Site, uefi: Machine) -> None:
    """The copy is made without them, and says so."""
    seen = Path(NVRAM_FOLDER) / variables_of(site, uefi.name).name
    away = seen.rename(seen.with_suffix(".away"))
    try:
        (left_out,) = site.done(site.client.snapshots.take(uefi.id))["result"]["left_out"]
        made = site.done(site.client.clones.create(uefi.id, name=f"{uefi.name}-n", start=False))
    finally:
        away.rename(seen)
    assert left_out["target"] == "nvram"
    assert f"{seen}: No such file" in left_out["reason"]
    (told,) = made["result"]["clones"]
    assert left_out in told["identity"]["left_out"]
    assert made["result"]["consistency"] == "crash"
    site.done(site.client.clones.delete(told["id"]))
