"""The state of a server's virtual TPM goes with its disks: a disk that is locked by it is worth
nothing beside the state of another instant."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import libvirt
import pytest
from live_site import Machine, Site, wait_for

from lab.guest import Guest, attach

pytestmark = [pytest.mark.vm, pytest.mark.parametrize("site", ["xfs"], indirect=True)]

TPM = "<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>"
FORGET = libvirt.VIR_DOMAIN_UNDEFINE_TPM


def state_of(site: Site, guest: Guest) -> Path:
    """Where swtpm keeps the state of its TPM."""
    return site.hypervisor.swtpm / guest.domain.UUIDString() / "tpm2" / "tpm2-00.permall"


def certificate(state: Path) -> bytes:
    """A part of one that is in the state of a TPM that libvirt has had made properly: its issuer,
    and the key that no other TPM has."""
    data = state.read_bytes()
    at = data.index(b"swtpm-localca")
    return data[at : at + 400]


def write(path: Path, data: bytes) -> None:
    """As swtpm does: a new file, which takes the old one's name."""
    fresh = path.with_name("TMP2-00.permall")
    fresh.write_bytes(data)
    shutil.chown(fresh, path.owner(), path.group())
    fresh.chmod(0o600)
    fresh.rename(path)


@pytest.fixture
def locked(site: Site) -> Iterator[Machine]:
    """A stopped server with a TPM that swtpm made, and that has been in use."""
    made = site.machine(["raw"], "stopped", devices=TPM)
    made.guest.start(wait=False).destroy()
    yield made
    if made.state() != "missing":
        site.remove(made)


def test_a_revert_brings_the_state_of_its_instant(site: Site, locked: Machine) -> None:
    """With the disks, swtpm's owner and mode; undo puts back what was replaced. What a promotion
    makes of the snapshot holds it too."""
    state = state_of(site, locked.guest)
    old, owner = state.read_bytes(), state.owner()
    locked.write("old")
    taken = site.done(site.client.snapshots.take(locked.id))
    assert taken["result"]["left_out"] == []
    write(state, b"new")
    locked.write("new")

    reverted = site.done(site.client.snapshots.revert(locked.id))

    assert (locked.read(), state.read_bytes()) == ({"old"}, old)
    assert (state.owner(), state.stat().st_mode & 0o777) == (owner, 0o600)
    site.done(site.client.operations.undo(reverted["id"]))
    assert (locked.read(), state.read_bytes()) == ({"new"}, b"new")
    assert [each.name for each in state.parent.iterdir() if each.is_dir()] == []

    site.done(site.client.snapshots.promote(locked.id))
    folder = site.copy_of("image", locked)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (folder / manifest["tpm"]).read_bytes() == old
    assert manifest["tpm"] in manifest["digests"]


def test_a_restore_brings_it_back_with_its_server(site: Site, locked: Machine) -> None:
    """Undefining a domain drops its TPM, which an image brings back in such a way that the server
    starts with it. Undo leaves it: there was none before."""
    state = state_of(site, locked.guest)
    old, owner = state.read_bytes(), state.owner()
    image = site.done(site.client.images.create(locked.id))["result"]["image"]
    locked.guest.domain.undefineFlags(FORGET)
    assert not state.parent.parent.exists()

    restored = site.done(site.client.images.restore(image))

    assert state.read_bytes() == old
    modes = [each.stat().st_mode & 0o777 for each in (state, state.parent, state.parent.parent)]
    assert modes == [0o600, 0o700, 0o711]
    locked.guest.start(wait=False)
    assert locked.state() == "running"
    assert state.owner() == owner
    locked.guest.destroy()
    used = state.read_bytes()
    site.done(site.client.operations.undo(restored["id"]))
    assert state.read_bytes() == used


def test_a_restore_that_fails_leaves_no_directory(site: Site, locked: Machine) -> None:
    """What was made for the state of a domain that was gone goes again."""
    state = state_of(site, locked.guest)
    image = site.done(site.client.images.create(locked.id))["result"]["image"]
    xml = locked.guest.domain.XMLDesc()
    locked.guest.domain.undefineFlags(FORGET)

    site.points.arm(("defined", "raise"))
    assert site.ended(site.client.images.restore(image))["state"] == "failed"

    assert site.points.reached
    assert not state.parent.parent.exists()
    locked.guest.connection.defineXML(xml)


@pytest.fixture
def lost(site: Site, locked: Machine) -> Path:
    """Where the TPM's state of that server was, which it has lost since its image."""
    site.done(site.client.images.create(locked.id))
    state = state_of(site, locked.guest)
    assert certificate(state)
    shutil.rmtree(state.parent.parent)
    return state


def restore(site: Site, machine: Machine) -> Any:
    return site.client.images.restore(site.client.servers.get(machine.id)["newest_image"])


def test_a_server_that_is_started_while_disks_are_copied_has_a_whole_tpm(
    site: Site, locked: Machine, lost: Path
) -> None:
    """The directory of its state is not there before the server is off: libvirt makes it."""
    with site.points.held(lambda: restore(site, locked), "materialise:written") as operation:
        assert not lost.parent.parent.exists()
        locked.guest.start(wait=False)
        own = certificate(lost)
    restored = site.done(operation)

    assert certificate(lost) != own
    assert locked.state() == "running"
    locked.guest.destroy()
    site.done(site.client.operations.undo(restored["id"]))
    assert certificate(lost) == own


@pytest.mark.parametrize("at", ["stopped", "swap:linked", "committing"])
def test_a_server_that_is_started_again_has_a_whole_tpm(
    site: Site, locked: Machine, lost: Path, at: str
) -> None:
    """Where a restore fails, its directory is gone again before that. The server ran without a
    TPM, and was to have one with its next start."""
    xml = locked.guest.xml
    connection, definition = locked.guest.connection, locked.guest.domain.XMLDesc()
    xml.find("devices").remove(xml.find("devices/tpm"))  # type: ignore[union-attr, arg-type]
    connection.defineXML(ElementTree.tostring(xml, encoding="unicode"))
    locked.guest.start(wait=False)
    connection.defineXML(definition)
    site.points.arm((at, "raise"))

    assert site.ended(restore(site, locked))["state"] == "failed"

    assert site.points.reached
    assert locked.state() == "running"
    assert certificate(lost) != certificate(site.copy_of("image", locked) / "tpm.permall")
    locked.guest.destroy()


def test_a_server_that_is_started_anew_has_a_whole_tpm(
    site: Site, locked: Machine, lost: Path
) -> None:
    """Its owner had started it on what a restore that failed was about to take away again."""
    site.points.arm(("committing", "raise"), ("undo:swap_back", "wait"))
    operation = restore(site, locked)
    wait_for(lambda: site.points.reached, "it comes to putting back")
    locked.guest.start(wait=False)
    first = certificate(lost)
    site.points.go()

    assert site.ended(operation)["state"] == "failed"
    assert locked.state() == "running"
    assert certificate(lost) != first
    locked.guest.destroy()


def test_a_tpm_that_came_meanwhile_is_not_taken_away(
    site: Site, locked: Machine, lost: Path
) -> None:
    """The owner started the server before the restore had made a directory for its TPM."""
    with site.points.held(lambda: restore(site, locked), "journalled:swap_back") as operation:
        locked.guest.start(wait=False)
        own = certificate(lost)

    assert site.refused(operation) == "server_changed"
    assert locked.state() == "running"
    assert certificate(lost) == own
    locked.guest.destroy()


def test_the_state_is_that_of_the_held_instant(site: Site, locked: Machine) -> None:
    """What swtpm wrote after the copy was begun, and before the disks' instant, is in it."""
    state = state_of(site, locked.guest)
    with site.points.held(
        lambda: site.client.snapshots.take(locked.id), "reflink:opened"
    ) as operation:
        write(state, b"written meanwhile")
    site.done(operation)

    copy = site.copy_of("snapshot", locked) / "tpm.permall"
    assert copy.read_bytes() == b"written meanwhile"
    assert copy.stat().st_mode & 0o777 == 0o400


def test_a_clone_has_a_tpm_of_its_own(site: Site, locked: Machine) -> None:
    """It is empty at first: two machines with the same keys, one of them with counters that were
    turned back, would be no TPM to either. The result names it."""
    site.done(site.client.snapshots.take(locked.id))

    made = site.done(
        site.client.clones.create(
            locked.id, source_kind="snapshot", name="own-tpm", start=False, identity="keep"
        )
    )

    (told,) = made["result"]["clones"]
    assert [each["target"] for each in told["identity"]["left_out"]] == ["tpm"]
    with attach(site.hypervisor, "own-tpm") as clone:
        own = state_of(site, clone)
        assert not own.parent.parent.exists()
        clone.start(wait=False)
        assert own.read_bytes() != state_of(site, locked.guest).read_bytes()


def test_a_state_that_cannot_be_read_is_named(site: Site, locked: Machine) -> None:
    """A directory that is not there, as in a container without the mount, does not keep the disks
    from being copied. Where a copy holds the state it is not restored without it."""
    image = site.done(site.client.images.create(locked.id))["result"]["image"]
    directory = site.hypervisor.swtpm
    away = directory.rename(directory.with_name("swtpm-away"))
    try:
        taken = site.done(site.client.snapshots.take(locked.id))
        locked.write("new")
        assert site.refused(site.client.images.restore(image)) == "tpm_folder_missing"
    finally:
        away.rename(directory)

    (left_out,) = taken["result"]["left_out"]
    assert left_out["target"] == "tpm"
    assert f"{state_of(site, locked.guest)}: No such file" in left_out["reason"]
    assert locked.read() == {"new"}
    old = state_of(site, locked.guest).read_bytes()
    site.done(site.client.snapshots.revert(locked.id))  # it holds none, and leaves this one
    assert state_of(site, locked.guest).read_bytes() == old


def test_memory_and_state_are_of_one_instant(site: Site) -> None:
    """A revert with memory loads the TPM from QEMU's stream; the file says the same."""
    machine = site.machine(["raw"], "running", devices=TPM)
    machine.write("old")
    site.done(site.client.snapshots.take(machine.id, with_memory=True))
    copy = site.copy_of("snapshot", machine) / "tpm.permall"
    old = copy.read_bytes()
    machine.guest.destroy()
    state = state_of(site, machine.guest)
    write(state, b"new")

    site.done(site.client.snapshots.revert(machine.id))

    assert machine.state() == "running"
    assert state.read_bytes() == copy.read_bytes() == old
    site.remove(machine)
