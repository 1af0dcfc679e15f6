"""Linked clones that are reverted and restored: what their rows say, and what their base waits
for."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from farms.farmed import Farmed, Made
from sqlalchemy import select

from services.snapshotter import snapshots  # noqa: F401  registers the handlers
from shared.commands import DeleteClone, RevertSnapshot, TakeSnapshot, UndoRevert
from shared.database import now, reading
from shared.disks import images
from shared.models import Clone, Operation
from shared.operations import runner
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
