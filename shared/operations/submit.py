"""From a command to an operation: the row and its wake-up in one transaction."""

import hashlib
import json

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlmodel import Session

from shared import errors, farms
from shared.commands import Command, CreateClones, RetryFarm
from shared.models import Operation
from shared.operations import drain
from shared.operations.admission import Admitted, admit
from shared.operations.outbox import wake


def submit(
    session: Session,
    command: Command,
    *,
    requested_by: str,
    idempotency_key: str | None = None,
) -> Operation:
    """Return the operation that does `command`; after the commit, call `outbox.flush()`.

    The same `idempotency_key` with the same command gives the operation it gave before
    (E4); with another command raises IdempotencyKeyReused. Raises what admission raises.
    """
    try:
        with session.begin_nested():
            return _submit(session, command, requested_by, idempotency_key)
    except IntegrityError:
        # Another request with this key, or for a clone of this name, was first; now it is seen.
        return _submit(session, command, requested_by, idempotency_key)


def _submit(
    session: Session, command: Command, requested_by: str, idempotency_key: str | None
) -> Operation:
    if idempotency_key is not None:
        query = select(Operation).where(Operation.idempotency_key == idempotency_key)  # type: ignore[arg-type]
        if earlier := session.scalars(query).one_or_none():
            if earlier.request_hash != _hash(command):
                raise errors.IdempotencyKeyReused(
                    f"This Idempotency-Key belongs to operation {earlier.id}, which was asked for "
                    "with another request. Nothing was started; send a new key.",
                    operation=earlier.id,
                )
            return earlier
    server, admitted = admit(command, session)
    if not isinstance(command, drain.GOES_ON):
        drain.refuse_new_work(session, server.host)
    operation = queue(session, Admitted(server, admitted), requested_by, idempotency_key, command)
    if isinstance(admitted, CreateClones):
        farms.plan(session, operation, admitted)
    if isinstance(admitted, RetryFarm):
        farms.plan_again(session, operation, admitted.farm)
    session.flush()
    return operation


def queue(
    session: Session,
    admitted: Admitted,
    requested_by: str,
    idempotency_key: str | None,
    asked: Command | None = None,
) -> Operation:
    """Add the operation and its wake-up, not yet flushed, so that many of them are few statements.

    For a caller that has had the command admitted, whose key is new, and who holds the host
    (`drain`); others use `submit`. `asked` is the command as it came, where that was another.
    """
    server, command = admitted
    operation = Operation(
        kind=command.kind,
        service=command.service,
        host=server.host,
        server_id=server.id,
        command=command.model_dump(mode="json"),
        requested_by=requested_by,
        idempotency_key=idempotency_key,
        request_hash=_hash(asked or command),
    )
    session.add(operation)
    wake(session, operation)
    return operation


def _hash(command: Command) -> str:
    document = json.dumps([command.kind, command.model_dump(mode="json")], sort_keys=True)
    return hashlib.sha256(document.encode()).hexdigest()
