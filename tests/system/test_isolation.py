"""Clones of every kind of source, written to at once with it and without it (C2)."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from live_site import Machine, Site, digests

from lab import offline
from lab.guest import attach

pytestmark = pytest.mark.vm
ITS_OWN = "/root/its-own"
WRITE = f"head -c 4194304 /dev/urandom >{ITS_OWN}; sync"
TELL = f"echo 3 >/proc/sys/vm/drop_caches; sha256sum <{ITS_OWN}"


def made_by(site: Site, operation: Any, power: str) -> list[Machine]:
    """The clones of a farm, all of which were made."""
    clones = site.done(operation)["result"]["clones"]
    assert [each["state"] for each in clones] == ["ready"] * len(clones), clones
    return [
        Machine(site, attach(site.hypervisor, each["name"]), power, each["server"], words=1)
        for each in clones
    ]


def in_each(machines: list[Machine], command: str) -> list[str]:
    """What a command says in each of the guests, run in all of them at once."""

    def run(machine: Machine) -> str:
        status, said = machine.guest.run(command)
        assert status == 0, said
        return said.strip()

    with ThreadPoolExecutor(len(machines)) as pool:
        return list(pool.map(run, machines))


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("site", ["xfs"], indirect=True)
def test_nothing_reaches_a_clone_from_elsewhere(site: Site) -> None:
    """A source and its clones, from it as it ran and as it was off, from its snapshot and its
    image, are written to at once: each keeps its own, on disk too, and what is stored stays as
    it was. They boot again without any of what they were made of."""
    source = site.machine(["qcow2"], "running")
    source.guest.wait_ready()
    site.done(site.client.snapshots.take(source.id))
    image = site.done(site.client.images.create(source.id))["result"]["image"]
    stored = [site.copy_of(kind, source) for kind in ("snapshot", "image")]
    before = [digests(folder) for folder in stored]
    create = site.client.clones.create
    clones = made_by(site, create(source.id, name="iso-{n}", count=2), "running")
    clones += made_by(
        site, create(source.id, source_kind="snapshot", name="iso-of-snapshot"), "running"
    )
    clones += made_by(site, create(image, source_kind="image", name="iso-of-image"), "running")
    everybody = [source, *clones]
    for each in everybody:
        each.guest.wait_ready()

    in_each(everybody, WRITE)
    own = in_each(everybody, TELL)

    assert len(set(own)) == len(everybody)
    for each in everybody:
        each.guest.shutdown()
    clones += made_by(site, create(source.id, name="iso-of-stopped", start=False), "stopped")
    own.append(own[0])
    disks = [each.disks[0] for each in clones]
    assert all("backing-filename" not in offline.info(disk) for disk in disks)
    assert all(offline.check(disk).clean for disk in disks)
    whole = [digest(disk) for disk in disks]
    assert [digests(folder) for folder in stored] == before

    site.done(site.client.snapshots.delete(source.id))
    site.done(site.client.images.delete(image))
    site.remove(source)
    assert [digest(disk) for disk in disks] == whole
    assert not any(folder.exists() for folder in stored)

    for each in clones:
        each.guest.start(wait=False)
    for each in clones:
        each.guest.wait_ready()
    assert in_each(clones, TELL) == own[1:]
    for each in clones:
        site.remove(each)


@pytest.mark.parametrize("site", ["ext4"], indirect=True)
def test_linked_clones_stand_on_a_base_of_their_own(site: Site) -> None:
    """Where nothing can be shared: one copy for all of them, which none of them writes to and
    which their source, its deletion included, has nothing to do with."""
    source = site.machine(["qcow2"], "running")
    source.guest.wait_ready()
    operation = site.client.clones.create(source.id, name="linked-{n}", count=2, linked=True)
    clones = made_by(site, operation, "running")
    for each in clones:
        each.guest.wait_ready()
    shown = [site.client.clones.get(each.name) for each in clones]
    (base,) = {Path(path) for each in shown for path in each["linked_to"]}
    whole = digest(base)
    assert {each["way"] for each in shown} == {"overlay"}
    assert base.parent == clones[0].disks[0].parent
    assert base.stat().st_mode & 0o777 == 0o400
    assert base.stat().st_nlink == 1
    assert {offline.info(each.disks[0])["backing-filename"] for each in clones} == {base.name}

    in_each([source, *clones], WRITE)
    own = in_each([source, *clones], TELL)

    assert len(set(own)) == 3
    site.remove(source)
    assert digest(base) == whole
    copied = site.done(site.client.images.create(clones[0].id))["result"]
    (stored,) = site.copy_of("image", clones[0]).glob("vda.*")
    assert copied["way"] == "stream"
    for each in clones:
        each.guest.shutdown()
    (alone,) = made_by(
        site, site.client.clones.create(clones[1].id, name="alone", start=False), "stopped"
    )
    site.done(site.client.snapshots.take(clones[1].id))
    site.done(site.client.snapshots.revert(clones[1].id))
    for disk in (stored, alone.disks[0], clones[1].disks[0]):
        assert "backing-filename" not in offline.info(disk)
    linked = [site.client.clones.get(each.name)["linked_to"] for each in clones]
    assert linked == [[str(base)], []]
    assert digest(base) == whole
    site.remove(alone)
    for each in clones:
        each.guest.start(wait=False)
    for each in clones:
        each.guest.wait_ready()
    assert in_each(clones, TELL) == own[1:]
    for each in clones:
        site.remove(each)
    base.unlink()


@pytest.mark.parametrize("site", ["xfs"], indirect=True)
def test_clones_are_not_linked_where_independent_ones_take_no_room(
    site: Site, stopped: Machine
) -> None:
    """Asked for linked ones, they share their extents, and depend on nothing."""
    operation = site.done(
        site.client.clones.create(stopped.id, name="not-linked", start=False, linked=True)
    )
    (made,) = operation["result"]["clones"]
    assert (made["way"], made["linked_to"]) == ("reflink", [])
    assert "extents" in operation["result"]["not_linked"]
    (clone,) = [Machine(site, attach(site.hypervisor, "not-linked"), "stopped", made["server"])]
    assert "backing-filename" not in offline.info(clone.disks[0])
    site.remove(clone)
