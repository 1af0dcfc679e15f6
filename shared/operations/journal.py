"""The journal: every step that touches the world is written down before it is taken.

Entries are data (an action's name and JSON arguments), so that any worker of the host can
undo what a dead one began. Actions are idempotent and tolerate that the step they undo
never happened.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal

import structlog
from sqlalchemy import delete, select, update
from sqlmodel import Session

from shared import faults
from shared.database import reading, transaction
from shared.models import JournalEntry
from shared.operations.claim import held
from shared.turns import MOST_CALLS, side_by_side

log = structlog.get_logger()

Side = Literal["undo", "redo"]
Step = tuple[str, dict[str, Any]]
"""An action's name and its arguments."""

_ACTIONS: dict[str, Callable[..., None]] = {}


def action(function: Callable[..., None]) -> Callable[..., None]:
    """Register an undo or redo action under its function's name."""
    if function.__name__ in _ACTIONS:
        raise ValueError(f"journal action {function.__name__!r} is registered twice")
    _ACTIONS[function.__name__] = function
    return function


def write(
    session: Session,
    operation_id: str,
    side: Side,
    name: str,
    unit: str | None = None,
    /,
    **arguments: Any,
) -> None:
    if name not in _ACTIONS:
        raise KeyError(f"no journal action {name!r}")
    session.add(
        JournalEntry(
            operation_id=operation_id, side=side, action=name, arguments=arguments, unit=unit
        )
    )


def clear(session: Session, operation_id: str, side: Side) -> None:
    row: Any = JournalEntry
    _delete(session, row.operation_id == operation_id, row.side == side)


def _delete(session: Session, *conditions: Any) -> None:
    """Without looking for the entries among what the session holds: nobody asks it for them."""
    gone = delete(JournalEntry).where(*conditions)
    session.execute(gone, execution_options={"synchronize_session": False})


def strike(session: Session, operation_id: str, *actions: str, unit: str | None = None) -> None:
    """Take the undo entries of these actions off the list; of one unit, or of the operation."""
    row: Any = JournalEntry
    chosen = [row.operation_id == operation_id, row.side == "undo", row.action.in_(actions)]
    if unit is not None:
        chosen.append(row.unit == unit)
    _delete(session, *chosen)


def leave(session: Session, operation_id: str, units: list[str]) -> None:
    """Make the undo entries of units that could not be undone a part of what is left to do."""
    session.execute(
        update(JournalEntry)
        .where(
            JournalEntry.operation_id == operation_id,  # type: ignore[arg-type]
            JournalEntry.unit.in_(units),  # type: ignore[union-attr]
        )
        .values(side="redo")
    )


def left_to_do(session: Session, action: str) -> list[dict[str, Any]]:
    """What this action is still to be called with, by any operation that has ended well."""
    row: Any = JournalEntry
    query = select(row.arguments).where(row.side == "redo", row.action == action)
    return list(session.scalars(query))


def pending(operation_id: str, side: Side, unit: str | None = None) -> list[JournalEntry]:
    """The entries of one side, or of one unit, in the order in which they were written."""
    row: Any = JournalEntry
    query = select(JournalEntry).where(row.operation_id == operation_id, row.side == side)
    if unit is not None:
        query = query.where(row.unit == unit)
    with reading() as session:
        return list(session.scalars(query.order_by(row.seq)))


def act(entry: JournalEntry) -> None:
    """Carry out an entry. Raises what its action raises."""
    _ACTIONS[entry.action](**entry.arguments)


def play(operation_id: str, owner: str, side: Side, unit: str | None = None) -> None:
    """Carry out the entries of one side, or of one unit, and strike each off.

    Undo goes backwards, redo forwards; the units come first and side by side, each of them
    backwards. What a unit left to do holds up nothing else. Raises LeaseLost, before the next
    action, when the operation is no longer `owner`'s, and what an action raises; the entries not
    yet struck off remain for the next try.
    """
    parts: dict[str | None, list[JournalEntry]] = {None: []}
    for entry in pending(operation_id, side, unit):
        parts.setdefault(entry.unit, []).append(entry)
    own = parts.pop(None)
    works = [partial(_play_all, reversed(entries), owner) for entries in parts.values()]
    failures = [each for each in side_by_side(works, MOST_CALLS) if each is not None]
    if side == "redo":
        _play_all(own, owner)
    if failures:
        raise failures[0]
    if side == "undo":
        _play_all(reversed(own), owner)


def _play_all(entries: Iterable[JournalEntry], owner: str) -> None:
    for entry in entries:
        _play(entry, owner)


def _play(entry: JournalEntry, owner: str) -> None:
    with transaction() as session:
        held(session, entry.operation_id, owner)
    log.info("journal.play", operation=entry.operation_id, side=entry.side, action=entry.action)
    faults.point(f"{entry.side}:{entry.action}")
    act(entry)
    faults.point(f"{entry.side}:{entry.action}:done")
    with transaction(durable=False) as session:  # it may be played again
        _delete(session, JournalEntry.seq == entry.seq)
