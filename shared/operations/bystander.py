"""What the living of a host do for the dead: give a guest back at once, and see to it that the
operation is taken up again.

Every worker watches the files by which the attempts of its host, of all three services, show
that they live (presence). When a process dies, SIGKILL of its whole container included, the
guest that it held is resumed or thawed within a second by whichever of the others sees it first,
from the journal; and its service is woken, which else would wait for a lease to run out.
"""

import threading

import structlog
from sqlalchemy import select

from shared import errors
from shared.database import reading, transaction
from shared.models import Operation
from shared.operations import journal, presence
from shared.operations.claim import held
from shared.operations.outbox import flush_if_possible, wake

log = structlog.get_logger()

EVERY_S = 0.25
AT_ONCE = ("resume_domain", "thaw_domain")
"""Undo actions that do not wait for a successor; it carries them out once more."""


class Bystander(threading.Thread):
    """Looks after those who died, while its process lives."""

    def __init__(self) -> None:
        super().__init__(name="bystander", daemon=True)
        self._stopped = threading.Event()

    def stop(self) -> None:
        self._stopped.set()

    def run(self) -> None:
        dead: set[str] = set()
        while not self._stopped.wait(EVERY_S):
            dead |= presence.dead()
            try:
                for owner in list(dead):
                    attend(owner)
                    dead.discard(owner)
            except Exception as error:  # database or libvirt are away: tried again
                log.warning("bystander.waits", reason=str(error))


def attend(owner: str) -> None:
    """Give back the guest that a dead owner held, and wake whoever goes on with its work."""
    row = Operation
    with reading() as session:
        query = select(row).where(row.owner == owner, row.state == "running")  # type: ignore[arg-type]
        left = list(session.scalars(query))
    for operation in left:
        log.warning("operation.worker_died", operation=operation.id, kind=operation.kind)
        entries = journal.pending(operation.id, "undo")
        try:
            with transaction() as session:
                # Nobody takes it over meanwhile, and then holds the guest for a reason.
                current = held(session, operation.id, owner)
                for entry in entries:
                    if entry.action in AT_ONCE:
                        journal.act(entry)
                wake(session, current)
        except errors.LeaseLost:
            continue
    if left:
        flush_if_possible()
