"""When the base of linked clones goes: with the last of them."""

import threading
from typing import Any

from operations.spine import World, at_once
from sqlalchemy import select

from shared import linked
from shared.database import now, transaction
from shared.models import Clone

BASE = "/srv/vms/triptych-base-op_1-vda.raw"
OTHER = "/srv/vms/triptych-base-op_2-vda.raw"


def clone(world: World, name: str, operation: str, *linked_to: str, **fields: Any) -> Clone:
    made = Clone(
        operation_id=operation,
        host="kvm-1",
        name=name,
        source_kind="server",
        source_id="srv_1",
        linked_to=list(linked_to),
        **{"state": "ready", **fields},
    )
    world.add(made)
    return made


def released(*names: str) -> list[str]:
    """Delete these clones; the bases that are to be removed then."""
    row: Any = Clone
    with transaction() as session:
        gone = list(session.scalars(select(Clone).where(row.name.in_(names))))
        for each in gone:
            each.state = "deleted"
        return linked.release(session, gone, {path for each in gone for path in each.linked_to})


def test_a_base_goes_with_its_last_clone(world: World, any_database: str) -> None:
    """Other farms, clones that were never made and those that stand alone do not count."""
    for name in ("a", "b", "c"):
        clone(world, name, "op_1", BASE)
    clone(world, "failed", "op_1", state="failed")
    clone(world, "other", "op_2", OTHER)
    clone(world, "alone", "op_3")

    assert released("a") == []
    assert released("alone") == []
    assert released("b", "c", "other") == [BASE, OTHER]


def test_a_base_is_kept_for_an_undo(world: World, any_database: str) -> None:
    """A clone that was reverted stands on it no more; what that set aside does, whatever becomes
    of the server, until it cannot be put back any more."""
    server = world.server()
    clone(world, "a", "op_1", server_id=server.id)
    clone(world, "b", "op_1", BASE)
    revert = world.snapshot_of(server)
    world.change(revert, undo={linked.STOOD_ON: [BASE]}, undo_until=now())

    assert released("b") == []
    with transaction() as session:
        assert linked.release_dropped(session, server.id, [BASE]) == []
    world.change(revert, undo=None, undo_until=None)
    with transaction() as session:
        steps = linked.release_dropped(session, server.id, [BASE])
    assert steps == [("remove_base", {"path": BASE})]


def test_the_last_two_clones_removed_at_once(world: World, any_database: str) -> None:
    """Whoever comes second removes what both stood on."""
    operation = world.snapshot_of(world.server())
    for name in ("a", "b"):
        clone(world, name, operation, BASE)
    both = threading.Barrier(2)

    def remove(name: str) -> list[str]:
        both.wait(10)
        return released(name)

    told = at_once(lambda: remove("a"), lambda: remove("b"))
    assert sorted(told, key=len) == [[], [BASE]]
