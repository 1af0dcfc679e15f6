"""A database or a broker that is there and does not answer; a clock that differs from theirs."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
import redis
from operations.servers import Broker, Postgres
from operations.spine import World
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from shared import broker, database
from shared.database import database_now, engine, now, reading, transaction
from shared.postgres import BoundedConnection

ON_POSTGRESQL = pytest.mark.usefixtures("any_database")


@pytest.fixture
def any_database() -> str:
    """Of the two, the one that is another process."""
    return "postgresql"


def _backend() -> int:
    """The process that serves the next connection of the pool."""
    with reading() as session:
        return int(session.connection().execute(text("SELECT pg_backend_pid()")).scalar_one())


@contextmanager
def stopped(process: int) -> Iterator[None]:
    """It stands still: the kernel takes what is sent to it, and nothing comes back."""
    os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process, signal.SIGCONT)


@ON_POSTGRESQL
def test_a_statement_without_an_answer_is_an_error(
    world: World, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is given up in time with its connection, and the next one has another."""
    with transaction() as session:
        pid = int(session.connection().execute(text("SELECT pg_backend_pid()")).scalar_one())
        backend = postgres.process(pid)
        with (
            stopped(backend),
            monkeypatch.context() as patch,
            pytest.raises(OperationalError, match=r"no answer within 0\.5 s"),
        ):
            patch.setattr(BoundedConnection, "patience", 0.5)
            session.execute(text("SELECT 1"))
        session.rollback()

    assert _backend() != pid


@ON_POSTGRESQL
def test_a_pooled_connection_that_fell_silent_is_replaced(
    world: World, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The question before its use finds out, and whoever asked for it does not notice."""
    monkeypatch.setattr("shared.postgres.PING_PATIENCE", 0.5)
    monkeypatch.setattr(database, "_FRESH", 0)
    silent = _backend()
    with stopped(postgres.process(silent)):
        assert _backend() != silent


@ON_POSTGRESQL
def test_an_error_that_the_server_tells_is_no_silence(world: World) -> None:
    """The connection is kept, and the error is the server's own."""
    pid = _backend()
    with pytest.raises(OperationalError, match="statement timeout"), transaction() as session:
        session.execute(text("SET LOCAL statement_timeout = 10"))
        session.execute(text("SELECT pg_sleep(1)"))

    assert _backend() == pid


@ON_POSTGRESQL
def test_an_error_among_many_statements_is_no_silence(world: World) -> None:
    """What is sent in one go is aborted by an error in it; the connection is good after it."""
    with transaction() as session:
        pid = int(session.connection().execute(text("SELECT pg_backend_pid()")).scalar_one())
        for attempt in range(20):
            connection: Any = session.connection().connection.driver_connection
            with connection.cursor() as cursor:
                cursor.execute("CREATE TEMP TABLE one (number integer UNIQUE)")
                cursor.execute("SAVEPOINT before")
                with pytest.raises(psycopg.errors.UniqueViolation):
                    cursor.executemany("INSERT INTO one VALUES (%s)", [[attempt]] * 300)
                assert not connection.closed
                cursor.execute("ROLLBACK TO before")
                cursor.execute("DROP TABLE one")

    assert _backend() == pid


@ON_POSTGRESQL
def test_the_server_forgets_a_client_that_fell_silent(world: World) -> None:
    """A host that is cut off within a transaction does not hold its locks for hours."""
    with reading() as session:
        shown = session.connection().execute(text("SHOW idle_in_transaction_session_timeout"))

    assert shown.scalar_one() == "1min"


@ON_POSTGRESQL
@pytest.mark.parametrize("hours", [1, -1])
def test_times_are_by_the_databases_clock(
    world: World, monkeypatch: pytest.MonkeyPatch, hours: int
) -> None:
    """Whatever this machine's clock says, once the database was heard."""

    class Wrong(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
            return datetime.now(tz) + timedelta(hours=hours)

    monkeypatch.setattr(database, "_ahead", timedelta(0))  # and put back at the end
    monkeypatch.setattr(database, "datetime", Wrong)
    assert abs(now() - datetime.now(UTC)) > timedelta(minutes=59)
    engine().dispose()
    _backend()  # a new connection
    assert abs(now() - datetime.now(UTC)) < timedelta(minutes=1)

    monkeypatch.setattr(database, "_ahead", timedelta(0))
    with transaction() as session:  # as with each renewal of a lease
        database_now(session)
    assert abs(now() - datetime.now(UTC)) < timedelta(minutes=1)


def test_clocks_that_agree_are_left_alone(world: World) -> None:
    """What a round trip takes is no difference between two clocks."""
    told = datetime.now(UTC) + timedelta(milliseconds=900)
    database._compare_clocks(datetime.now(UTC), told)

    assert database._ahead == timedelta(0)


def test_a_silent_broker_is_asked_once(world: World, redis_broker: Broker) -> None:
    """The client's own ten tries would be half a minute, in which a health check gives up."""
    assert broker.redis_client().ping()
    began = time.monotonic()
    with stopped(redis_broker.process(1)), pytest.raises(redis.TimeoutError):
        broker.redis_client().ping()

    assert time.monotonic() - began < 10


def test_a_connection_that_the_broker_closed_is_opened_anew(
    world: World, redis_broker: Broker
) -> None:
    """Redis was restarted while nobody asked it anything: the next one does not notice."""
    assert broker.redis_client().ping()
    redis_broker.client.client_kill_filter(skipme=True, _type="normal")

    assert broker.redis_client().ping()
