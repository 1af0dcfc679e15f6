"""The journal: every step that touches the world is written down before it is taken.

Entries are data (an action's name and JSON arguments), so that any worker of the host can
undo what a dead one began. Actions are idempotent and tolerate that the step they undo
never happened.
"""

from collections.abc import Callable
from typing import Any, Literal

import structlog
from sqlalchemy import delete, func, select, update
from sqlmodel import Session

from shared import faults
from shared.database import reading, transaction
from shared.models import JournalEntry
from shared.operations.claim import held

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


def write(session: Session, operation_id: str, side: Side, name: str, /, **arguments: Any) -> None:
    if name not in _ACTIONS:
        raise KeyError(f"no journal action {name!r}")
    session.add(
        JournalEntry(operation_id=operation_id, side=side, action=name, arguments=arguments)
    )


def clear(session: Session, operation_id: str, side: Side) -> None:
    session.execute(
        delete(JournalEntry).where(
            JournalEntry.operation_id == operation_id,  # type: ignore[arg-type]
            JournalEntry.side == side,  # type: ignore[arg-type]
        )
    )


def strike(session: Session, operation_id: str, *actions: str) -> None:
    """Take the undo entries of these actions off the list."""
    session.execute(
        delete(JournalEntry).where(
            JournalEntry.operation_id == operation_id,  # type: ignore[arg-type]
            JournalEntry.side == "undo",  # type: ignore[arg-type]
            JournalEntry.action.in_(actions),  # type: ignore[attr-defined]
        )
    )


def leave(session: Session, operation_id: str, entries: list[int]) -> None:
    """Make undo entries that could not be carried out a part of what is left to do."""
    session.execute(
        update(JournalEntry)
        .where(
            JournalEntry.operation_id == operation_id,  # type: ignore[arg-type]
            JournalEntry.seq.in_(entries),  # type: ignore[union-attr]
        )
        .values(side="redo")
    )


def last(operation_id: str) -> int:
    """The newest undo entry's number, 0 when there is none."""
    with reading() as session:
        query = select(func.max(JournalEntry.seq)).where(
            JournalEntry.operation_id == operation_id  # type: ignore[arg-type]
        )
        return session.scalar(query) or 0


def pending(operation_id: str, side: Side, after: int = 0) -> list[JournalEntry]:
    """The entries of one side in the order to play them: undo backwards, redo forwards."""
    with reading() as session:
        order = JournalEntry.seq.desc() if side == "undo" else JournalEntry.seq  # type: ignore[union-attr]
        query = select(JournalEntry).where(
            JournalEntry.operation_id == operation_id,  # type: ignore[arg-type]
            JournalEntry.side == side,  # type: ignore[arg-type]
            JournalEntry.seq > after,  # type: ignore[arg-type,operator]
        )
        return list(session.scalars(query.order_by(order)))  # type: ignore[arg-type]


def act(entry: JournalEntry) -> None:
    """Carry out an entry. Raises what its action raises."""
    _ACTIONS[entry.action](**entry.arguments)


def play(operation_id: str, owner: str, side: Side, after: int = 0) -> None:
    """Carry out the entries of one side and strike each off.

    Raises LeaseLost, before the next action, when the operation is no longer `owner`'s, and
    what an action raises; the entries not yet struck off remain for the next try.
    """
    for entry in pending(operation_id, side, after):
        with transaction() as session:
            held(session, operation_id, owner)
        log.info("journal.play", operation=operation_id, side=side, action=entry.action)
        faults.point(f"{side}:{entry.action}")
        act(entry)
        faults.point(f"{side}:{entry.action}:done")
        with transaction() as session:
            session.execute(delete(JournalEntry).where(JournalEntry.seq == entry.seq))  # type: ignore[arg-type]
