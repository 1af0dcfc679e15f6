"""Ends what a restored backup of the database holds as queued or running, gives its farms their
time anew, and touches nothing.

    python -m shared.operations.abandon      # after the restore, before any worker starts

Such an operation has mostly ended since the backup was made. To do a revert again days later,
or to undo one from an old journal, would put old disks in the place of those in use. What is
past its commit is left to the workers: it only has something to remove. The end of a farm may
have been put off since, and beat would delete it at once, which nothing undoes.
"""

from datetime import timedelta
from typing import Any

from sqlalchemy import delete, select
from sqlmodel import Session

from shared import errors, farms
from shared.database import database_now, transaction
from shared.models import Farm, Operation, OutboxMessage
from shared.operations import journal
from shared.operations.finish import finish

LEAST = timedelta(days=1)
"""What a farm has at least from now on."""


def abandon(session: Session) -> list[Operation]:
    """Fail every unfinished operation; raises ServerBusy while a worker is at one."""
    row: Any = Operation
    unfinished = select(Operation).where(
        row.state.in_(("queued", "running")), row.committed.is_(False)
    )
    found = list(session.scalars(unfinished.order_by(row.seq)))
    for each in found:
        if each.lease_expires_at and each.lease_expires_at > database_now(session):
            raise errors.ServerBusy(
                f"A worker is at operation {each.id}. Nothing was changed; stop all workers first."
            )
    for each in found:
        verdict = errors.DatabaseRestored(
            f"It was {each.state} when the backup of the database was made, which has been "
            "restored since. It may have been carried out or not; nothing was done now. Look at "
            "the server, and ask again if need be."
        )
        journal.clear(session, each.id, "undo")
        finish(session, each, "failed", {"code": verdict.code, "message": verdict.detail})
    session.execute(delete(OutboxMessage))  # wake-ups of the past, and those of `finish`
    return found


def postpone(session: Session) -> list[Farm]:
    """Have each farm that is to end live for as long as it was made for, and a day at least, from
    now on."""
    row: Any = Farm
    ending = select(Farm).where(row.deleted_at.is_(None), row.expires_at.is_not(None))
    found = list(session.scalars(ending.order_by(row.created_at)))
    for each in found:
        hours = max(each.expires_in_h or 0.0, LEAST / timedelta(hours=1))
        farms.let_end(each, hours, database_now(session))
    return found


def main() -> None:
    try:
        with transaction() as session:
            abandoned = abandon(session)
            postponed = postpone(session)
    except errors.ServerBusy as error:
        raise SystemExit(error.detail) from error
    for each in abandoned:
        print(f"failed: {each.id} {each.kind}")
    print(f"{len(abandoned)} unfinished operations.")
    for farm in postponed:
        print(f"farm {farm.name} ends on {farm.expires_at:%Y-%m-%d %H:%M} UTC")


if __name__ == "__main__":
    main()
