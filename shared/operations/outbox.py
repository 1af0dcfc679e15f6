"""Wake-ups leave through the outbox: written with the operation, sent after the commit.

A crash between the two loses nothing: whoever flushes next sends what is left. A message
may go out twice; the claim makes the second one harmless.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import structlog
from sqlalchemy import delete, select
from sqlmodel import Session

from shared import events
from shared.broker import redis_client
from shared.celery_app import publisher
from shared.commands import BY_KIND, queue_of
from shared.database import engine, now, reading, transaction
from shared.models import Operation, OutboxMessage

log = structlog.get_logger()

BATCH = 100


def wake(session: Session, operation: Operation) -> None:
    """Put a wake-up for the operation's worker into the outbox."""
    operation.woken_at = now()
    session.add(
        OutboxMessage(
            task=BY_KIND[operation.kind].task,
            queue=queue_of(operation.service, operation.host),
            arguments={"operation_id": operation.id},
        )
    )


def flush() -> int:
    """Send every message in the outbox; returns how many. Raises when the broker is away."""
    sent = 0
    while True:
        with _batch() as batch:
            if batch:
                redis_client().ping()  # fails at once where Celery's own retries take seconds
            for message in batch:
                publisher().send_task(
                    message.task,
                    kwargs=message.arguments,
                    queue=message.queue,
                    task_id=str(uuid4()),
                )
        sent += len(batch)
        if len(batch) < BATCH:  # what was added since is sent by whoever added it
            return sent


@contextmanager
def _batch() -> Iterator[list[OutboxMessage]]:
    """The oldest messages, deleted when the block ends well.

    On PostgreSQL without those that somebody else is sending. SQLite has no locks but the one
    that all writers need, which nobody may hold while a broker takes its time: there two who
    flush at once may both send.
    """
    row: Any = OutboxMessage
    query = select(OutboxMessage).order_by(row.seq).limit(BATCH).with_for_update(skip_locked=True)
    locks = engine().dialect.name != "sqlite"
    with transaction() if locks else reading() as session:
        batch = list(session.scalars(query))
        yield batch
        if batch and locks:
            _delete(session, batch)
    if batch and not locks:
        with transaction(durable=False) as session:
            _delete(session, batch)


def _delete(session: Session, batch: list[OutboxMessage]) -> None:
    row: Any = OutboxMessage
    session.execute(delete(OutboxMessage).where(row.seq.in_([each.seq for each in batch])))


def flush_if_possible() -> bool:
    """Send what there is; a broker that is away only means later."""
    try:
        flush()
        while events.relay() == events.BATCH:
            pass
    except Exception as error:
        log.warning("outbox.waiting", reason=str(error))
        return False
    return True


class Relay(threading.Thread):
    """Flushes soon after `kick()`, and again every `retry` seconds while the broker is away.

    It keeps the API's answers free of the broker: a request is accepted while Redis is
    down, and its operation starts when Redis is back.
    """

    def __init__(self, retry: float = 1.0, idle: float = 15.0) -> None:
        super().__init__(name="outbox-relay", daemon=True)
        self._kicked = threading.Event()
        self._stopped = threading.Event()
        self._retry, self._idle = retry, idle

    def kick(self) -> None:
        self._kicked.set()

    def stop(self) -> None:
        self._stopped.set()
        self._kicked.set()

    def run(self) -> None:
        while not self._stopped.is_set():
            self._kicked.clear()
            all_sent = flush_if_possible()
            self._kicked.wait(self._idle if all_sent else self._retry)
