"""Connections to PostgreSQL on which neither end waits for ever.

TCP notices a peer that is gone, but not one that is there and does nothing: a paused container
or a suspended VM still acknowledges every packet. So what is asked has a time to be answered in,
after which the connection is given up. The server is told the same of us: else a worker that was
cut off within a transaction would hold its locks for the two hours that Linux waits.
"""

import time
from datetime import datetime
from typing import Any

import psycopg

READ_ONLY = "25006"
"""SQLSTATE of a statement that writes where none may (`read_only_sql_transaction`)."""
STATEMENT_PATIENCE = 10.0
"""Seconds for the answer to one statement, a wait for another's lock included."""
PING_PATIENCE = 3.0
"""The same for the question that tells, before its use, whether a pooled connection lives."""

NO_ENDLESS_WAIT = {"connect_timeout": 3, "keepalives_idle": 10, "tcp_user_timeout": 15_000}
"""libpq's settings: seconds, the last one milliseconds."""

SERVER_SIDE = {
    "tcp_keepalives_idle": "10",
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "3",
    "tcp_user_timeout": "15s",
    "idle_in_transaction_session_timeout": "60s",
}
"""What PostgreSQL is asked to do about this client, should it fall silent."""


class BoundedConnection(psycopg.Connection[Any]):
    """Gives up, and is closed, where an answer takes longer than `patience` (None: never)."""

    patience: float | None = STATEMENT_PATIENCE
    hurried = False

    def wait(self, gen: Any, interval: float = 0.1, timeout: float | None = None) -> Any:
        if timeout is not None or self.patience is None:
            return super().wait(gen, interval, timeout)
        bound = PING_PATIENCE if self.hurried else self.patience
        deadline = time.monotonic() + bound
        try:
            return super().wait(gen, interval, bound)
        except psycopg.OperationalError as error:
            if time.monotonic() < deadline or error.sqlstate:
                raise  # it did answer, or is gone; or a pipeline was aborted by an error in it
            self.pgconn.finish()  # what it answers later is not for the next statement
            raise psycopg.OperationalError(f"no answer within {bound:g} s") from error


def introduce(connection: BoundedConnection) -> None:
    """Tell the server SERVER_SIDE."""
    told = [f"set_config('{name}', '{value}', false)" for name, value in SERVER_SIDE.items()]
    connection.execute(f"SELECT {', '.join(told)}")
    connection.commit()


def clock(connection: BoundedConnection) -> datetime:
    """The server's clock, if it answers soon; raises psycopg.Error. Outside of transactions."""
    connection.hurried = True
    within, connection.autocommit = connection.autocommit, True
    try:
        row = connection.execute("SELECT clock_timestamp()").fetchone()
    finally:
        connection.hurried = False
        if not connection.closed:
            connection.autocommit = within
    assert row is not None  # noqa: S101  a SELECT without FROM
    told: datetime = row[0]
    return told
