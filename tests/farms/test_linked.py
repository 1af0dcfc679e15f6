"""Linked clones that are reverted and restored: what their rows say, and what their base waits
for."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any
from xml.etree import ElementTree

import pytest
from farms.farmed import Farmed, Made, outcomes, plug
from sqlalchemy import select

from services.snapshotter import snapshots  # noqa: F401  registers the handlers
from shared import faults, forgetting, linked, recovery
from shared.commands import DeleteClone, DeleteFarm, RevertSnapshot, TakeSnapshot, UndoRevert
from shared.database import now, reading, transaction
from shared.disks import images
from shared.disks.overlays import create_overlay
from shared.hypervisor.errors import LibvirtBusy
from shared.models import Clone, Operation, Server
from shared.operations import journal, runner
from shared.operations.tasks import forget_due

pytestmark = pytest.mark.vm


def linked_to(made: Made) -> list[str]:
    with reading() as session:
        return session.get_one(Clone, made.clone.id).linked_to


def reverted(farmed: Farmed, made: Made) -> Operation:
    operation = farmed.world.submit(RevertSnapshot(server=made.server.id))
    runner.run(operation)
    ended = farmed.world.row(operation)
    assert ended.state == "succeeded", ended.error
    return ended


def forget(farmed: Farmed, operation: Operation) -> None:
    """Have the time to undo it be over."""
    row: Any = Operation
    farmed.world.change(operation.id, undo_until=now() - timedelta(seconds=1))
    forget_due()
    with reading() as session:
        queued = list(session.scalars(select(row.id).where(row.state == "queued")))
    for each in queued:
        runner.run(each)


def test_reverted_clone_is_not_linked_and_its_base_goes_after_the_undo(farmed: Farmed) -> None:
    """It stands on its own disks; undone, on the base again. The base stays for what a revert set
    aside, and goes when that can be put back no more and no clone is left that needs it."""
    _, (kept, other), base = farmed.linked_farm(2)
    overlay = kept.guest.disks[1]
    farmed.done(TakeSnapshot(server=kept.server.id))
    assert linked_to(kept) == [str(base)]

    revert = reverted(farmed, kept)

    assert linked_to(kept) == []
    assert images.chain(overlay, "qcow2") == []
    assert linked_to(other) == [str(base)]

    runner.run(farmed.world.submit(UndoRevert(operation=revert.id)))

    assert linked_to(kept) == [str(base)]
    assert images.chain(overlay, "qcow2") == [base]

    revert = reverted(farmed, kept)
    deleted = farmed.world.submit(DeleteClone(clone=other.clone.id))
    runner.run(deleted)
    assert farmed.world.row(deleted).state == "succeeded"
    assert base.exists()

    forget(farmed, revert)
    assert not base.exists()
    assert overlay.exists()
    assert kept.guest.state() == "stopped"


def test_base_stays_for_what_a_kept_clone_s_revert_set_aside(farmed: Farmed) -> None:
    """It was forgotten and registered as a server of its own before; undone, it stands on the base
    again."""
    farm, (kept, _), base = farmed.linked_farm(2)
    with transaction() as session:
        server = session.get_one(Server, kept.server.id)
        forgetting.forget(session, server, now())
        server.forgotten_at = None
    farmed.done(TakeSnapshot(server=kept.server.id))

    revert = reverted(farmed, kept)
    deleted = farmed.world.submit(DeleteFarm(farm=farm.id))
    runner.run(deleted)

    assert farmed.world.row(deleted).state == "succeeded"
    assert base.exists()
    runner.run(farmed.world.submit(UndoRevert(operation=revert.id)))
    assert images.chain(kept.guest.disks[1], "qcow2") == [base]
    revert = reverted(farmed, kept)
    forget(farmed, revert)
    assert not base.exists()


def test_what_stands_on_a_base_is_no_matter_of_its_name(farmed: Farmed) -> None:
    """A disk that a deleted clone left behind keeps the base, also once an image of that clone was
    restored, whose own disks stand alone."""
    _, (gone, _), base = farmed.linked_farm(2)
    left = farmed.disks / "data.img"
    create_overlay(base, "raw", left)
    with transaction() as session:
        clone = session.get_one(Clone, gone.clone.id)
        clone.state, clone.files = "deleted", [str(left)]
    found = linked.clone_of(gone.server.id)
    definition = gone.guest.domain.XMLDesc(2).replace(str(gone.guest.disks[1]), str(gone.disk))

    links = linked.links_of(found, definition)

    assert links
    assert (links.was, links.now) == ([str(base)], [str(base)])


def test_base_goes_with_a_reverted_clone_that_was_the_last(farmed: Farmed) -> None:
    """What its reverts set aside goes with it, and with that the base; the one that another stands
    on stays when an undo is forgotten."""
    _, (first, last), base = farmed.linked_farm(2)
    for each in (first, last):
        farmed.done(TakeSnapshot(server=each.server.id))
    forget(farmed, reverted(farmed, first))
    assert base.exists()

    reverted(farmed, last)
    assert linked_to(last) == []
    for each in (first, last):
        runner.run(farmed.world.submit(DeleteClone(clone=each.clone.id)))

    assert not base.exists()
    farmed.is_tidy()


def test_base_stays_for_a_disk_that_stands_on_a_clone_s(farmed: Farmed) -> None:
    """The last clone's owner made an overlay on its disk, which stays with all that is below it."""
    farm, (_, last), base = farmed.linked_farm(2)
    overlay = last.guest.disks[1]
    theirs = farmed.disks / "theirs.qcow2"
    create_overlay(overlay, "qcow2", theirs)
    plug(last.guest, theirs, "vdc", "qcow2")

    ended = farmed.done(DeleteFarm(farm=farm.id))

    assert last.guest.state() == "missing"
    assert images.chain(theirs, "qcow2") == [overlay, base]
    left = [each for told in outcomes(ended).values() for each in told["left"]]
    assert {each["path"] for each in left} == {str(theirs), str(overlay), str(base)}


def test_base_goes_with_the_last_two_that_go_at_the_same_time(
    farmed: Farmed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second has seen the first's domain on the base, and commits when the first has, whose
    domain is there still: that is no reason to leave the base."""
    _, made, base = farmed.linked_farm(2)
    first, second = (farmed.world.submit(DeleteClone(clone=each.clone.id)) for each in made)
    looked, committed = ([threading.Event(), threading.Event()] for _ in range(2))
    shut = {"journalled:give_back": looked, "committed": committed}

    def point(name: str) -> None:
        if gate := shut.pop(name, None):  # whoever comes first
            gate[0].set()
            assert gate[1].wait(60)

    monkeypatch.setattr(faults, "point", point)
    with ThreadPoolExecutor(2) as pool:
        try:
            later = pool.submit(runner.run, second)
            assert looked[0].wait(60)
            earlier = pool.submit(runner.run, first)
            assert committed[0].wait(60)
            looked[1].set()
            later.result()
            assert made[0].guest.state() == "stopped"
        finally:
            looked[1].set()
            committed[1].set()
        earlier.result()

    ended = [farmed.world.row(each) for each in (first, second)]
    assert [told["left"] for each in ended for told in outcomes(each).values()] == [[], []]
    assert not base.exists()
    farmed.is_tidy()


def test_base_waits_for_a_domain_that_is_to_go(farmed: Farmed) -> None:
    """Where another operation is still to undefine a domain on it, and its disk is there, the base
    is neither left nor taken from under it."""
    _, (made,), base = farmed.linked_farm(1)
    operation = farmed.world.submit(DeleteClone(clone=made.clone.id))
    with transaction() as session:
        journal.write(session, operation, "redo", "undefine_domain", uuid=made.server.domain_uuid)

    with pytest.raises(LibvirtBusy, match=made.guest.name):
        recovery.remove_base(str(base))

    assert base.exists()
    made.guest.domain.undefine()
    recovery.remove_base(str(base))
    assert not base.exists()


@pytest.mark.parametrize("how", ["another disk stands on it", "a link is there", "it was moved"])
def test_base_stays_for_a_disk_of_a_clone_that_went_before(farmed: Farmed, how: str) -> None:
    """What a deletion left of a clone is left with all that it needs, also by a later one."""
    farm, (first, _), base = farmed.linked_farm(2)
    left = first.guest.disks[1]
    theirs = farmed.disks / "theirs.qcow2"
    if how != "another disk stands on it":
        left.rename(theirs)
    if how == "a link is there":
        left.symlink_to(theirs)
    elif how == "it was moved":
        definition = first.guest.xml
        sources = definition.findall("devices/disk/source")
        (mine,) = [each for each in sources if each.get("file") == str(left)]
        mine.set("file", str(theirs))
        first.guest.connection.defineXML(ElementTree.tostring(definition, "unicode"))
    else:
        create_overlay(left, "qcow2", theirs)
        plug(first.guest, theirs, "vdc", "qcow2")
    farmed.done(DeleteClone(clone=first.clone.id))

    farmed.done(DeleteFarm(farm=farm.id))

    assert base in images.chain(theirs, "qcow2")
