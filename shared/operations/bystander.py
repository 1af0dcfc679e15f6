"""What the living of a host do for the dead: give a guest back at once, and see to it that the
operation is taken up again.

Every worker watches the files by which the attempts of its host, of all three services, show
that they live (presence). When a process dies, SIGKILL of its whole container included, the
guest that it held is resumed or thawed within a second by whichever of the others sees it first,
from the journal; and its service is woken, which else would wait for a lease to run out. Where
all of them died, the first that starts again does so, whether or not the broker is there.
"""

import threading
from datetime import timedelta

import structlog
from sqlalchemy import select

from shared import mounted
from shared.database import database_now, reading, transaction
from shared.models import Operation
from shared.operations import claim, journal, presence
from shared.operations.outbox import flush_if_possible, wake
from shared.settings import settings

log = structlog.get_logger()

EVERY_S = 0.25
RETRY_S = 1.0
AT_ONCE = ("resume_domain", "release_memory", "thaw_domain")
"""Undo actions that do not wait for the successor."""


class Bystander(threading.Thread):
    """Looks after those who died, while its process lives."""

    def __init__(self) -> None:
        super().__init__(name="bystander", daemon=True)
        self._stopped = threading.Event()

    def stop(self) -> None:
        self._stopped.set()

    def run(self) -> None:
        dead: set[str] = set()
        first, pause = True, 0.0
        while not self._stopped.wait(pause):
            pause = EVERY_S
            try:
                mounted.ensure()  # there are the files of the living
                if first:
                    dead |= _left_behind()
                    first = False
                dead |= presence.dead()
            except Exception as error:  # vault or database are away
                log.warning("bystander.blind", reason=str(error))
                pause = RETRY_S
            for owner in list(dead):
                try:
                    attend(owner)
                    dead.discard(owner)
                except Exception as error:  # database or libvirt are away
                    log.warning("bystander.waits", owner=owner, reason=str(error))
                    pause = RETRY_S


def _left_behind() -> set[str]:
    """Dead owners of what is running on this host, by the rows: of their files the last may have
    been removed by one who died as well."""
    with reading() as session:
        query = select(Operation.owner).where(  # type: ignore[call-overload]
            Operation.host == settings().host,
            Operation.state == "running",
            Operation.owner.is_not(None),  # type: ignore[union-attr]
        )
        owners = list(session.scalars(query))
    return {owner for owner in owners if presence.of(owner, sweep=False) == "dead"}


def attend(owner: str) -> None:
    """Give back the guest that a dead owner held, and wake whoever goes on with its work.

    Meanwhile the operation is ours: nobody who takes it over holds the guest, for a reason of
    its own, while we give it back. Raises what the actions raise; then it is as it was.
    """
    with reading() as session:
        query = select(Operation).where(Operation.owner == owner, Operation.state == "running")  # type: ignore[arg-type]
        left = list(session.scalars(query))
    for operation in left:
        with presence.attempt(operation.service) as me:
            if claim.take_over(operation.id, me) is None:
                continue  # somebody else was faster, or the owner lives after all
            log.warning("operation.worker_died", operation=operation.id, kind=operation.kind)
            failures = []
            for entry in reversed(journal.pending(operation.id, "undo")):
                if entry.action in AT_ONCE:
                    try:
                        journal.act(entry)
                    except Exception as error:  # a thaw need not wait for what a resume waits for
                        failures.append(error)
            if failures:
                _leave(operation.id, me, owner)
                raise failures[0]
            _leave(operation.id, me, None)
    if left:
        flush_if_possible()


def _leave(operation_id: str, me: str, to: str | None) -> None:
    """Hand the operation on, to its dead owner if it is to be looked after once more."""
    with transaction() as session:
        current = claim.held(session, operation_id, me)
        current.owner, current.lease_expires_at = to, database_now(session)
        if to is None:
            journal.strike(session, operation_id, *AT_ONCE)  # a later pause is the owner's own
        else:  # whatever becomes of the vault, that one is dead
            current.lease_expires_at -= timedelta(seconds=settings().lease * (claim.STALLED + 1))
        wake(session, current)
