"""The database: one engine per process, short transactions.

SQLite (WAL, `BEGIN IMMEDIATE`, synchronous FULL: a journal row is on disk before
the step it describes, unless a power cut undoes that step itself) is the embedded default;
PostgreSQL the deployment's.
"""

import argparse
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import (
    URL,
    Connection,
    DateTime,
    Engine,
    TypeDecorator,
    create_engine,
    event,
    make_url,
    text,
)
from sqlalchemy.exc import InvalidatePoolError, OperationalError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement
from sqlmodel import Session

from shared.settings import settings

if TYPE_CHECKING:  # a tenth of a worker's start, and no worker needs it
    from alembic.config import Config


class UTCDateTime(TypeDecorator[datetime]):
    """An aware datetime; SQLite drops the zone, so every value is kept and given as UTC."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Any) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a naive datetime would change its meaning in the database")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Any) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


NOTABLE = timedelta(seconds=1)
"""Clocks that differ by less agree: the round trip to the database takes its time too."""
_ahead = timedelta(0)
"""How far the database's clock is ahead of this machine's, as last seen."""


def now() -> datetime:
    """The time by the database's clock: a host whose own is wrong writes what is true."""
    return by_database_clock(datetime.now(UTC))


def by_database_clock(moment: datetime) -> datetime:
    """A moment that this machine's clock told, as the database's would have."""
    return moment + _ahead


def _compare_clocks(asked: datetime, told: datetime) -> None:
    """Learn from an answer that has just come how far the two clocks are apart."""
    global _ahead
    ahead = told - (asked + (datetime.now(UTC) - asked) / 2)
    _ahead = ahead if abs(ahead) > NOTABLE else timedelta(0)


POOL_PATIENCE = 5
"""Seconds to wait for a connection while all are in use."""
SQLITE_PATIENCE = 30
"""Seconds to wait for SQLite's one writer."""
_MOST_CONNECTIONS = 15
"""Of one process; kept once opened, since opening one costs more than most transactions."""
_FRESH, _LATELY = 2.0, 10.0
"""Seconds since a connection was used, and since it was asked, for which it is trusted."""


@cache
def engine() -> Engine:
    url = make_url(settings().database_url.get_secret_value())
    return _sqlite(url) if url.get_backend_name() == "sqlite" else _postgresql(url)


def _sqlite(url: URL) -> Engine:
    if url.database:
        Path(url.database).parent.mkdir(parents=True, exist_ok=True)
    made = create_engine(url, connect_args={"timeout": SQLITE_PATIENCE, "check_same_thread": False})

    @event.listens_for(made, "connect")
    def _pragmas(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # we begin transactions ourselves, below
        _write_ahead(connection)
        connection.execute("PRAGMA foreign_keys=ON")

    @event.listens_for(made, "begin")
    def _begin(connection: Any) -> None:
        options = connection.get_execution_options()
        if options.get("read_only"):
            connection.exec_driver_sql("BEGIN")
            return
        synced = "FULL" if options.get("durable", True) else "NORMAL"
        connection.connection.driver_connection.execute(f"PRAGMA synchronous={synced}")
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return made


def _write_ahead(connection: Any) -> None:
    """Use a write-ahead log. While others change to it too SQLite refuses at once, whatever time
    it was given to wait ("Result Codes", SQLITE_BUSY)."""
    deadline = time.monotonic() + SQLITE_PATIENCE
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def _postgresql(url: URL) -> Engine:
    """An engine that asks a connection whether it lives, and what its clock says, only where it
    has been idle for a while: one that was used a moment ago need not pay for each use."""
    from shared import postgres  # a twentieth of a worker's start, and SQLite's need it not

    made = create_engine(
        url,
        pool_size=_MOST_CONNECTIONS,
        max_overflow=0,
        pool_timeout=POOL_PATIENCE,
        connect_args=postgres.NO_ENDLESS_WAIT,
    )

    @event.listens_for(made, "do_connect")
    def _connect(_dialect: Any, _record: Any, arguments: Any, named: Any) -> Any:
        return postgres.BoundedConnection.connect(*arguments, **named)

    @event.listens_for(made, "connect")
    def _introduce(connection: Any, record: Any) -> None:
        postgres.introduce(connection)
        _ask(connection, record)

    @event.listens_for(made, "handle_error")
    def _standby(failure: Any) -> Exception | None:
        """A server that does not take writes (any more) is away: the next one that is asked may be
        the one that does, as after a failover."""
        if getattr(failure.original_exception, "sqlstate", None) != postgres.READ_ONLY:
            return None
        failure.is_disconnect = True
        return OperationalError(failure.statement, None, failure.original_exception)

    @event.listens_for(made, "checkin")
    def _in_use(_connection: Any, record: Any) -> None:
        record.info["used"] = time.monotonic()

    @event.listens_for(made, "checkout")
    def _check(connection: Any, record: Any, _fairy: Any) -> None:
        moment, info = time.monotonic(), record.info
        if moment - info["used"] < _FRESH and moment - info["asked"] < _LATELY:
            return
        try:
            _ask(connection, record)
        except made.dialect.loaded_dbapi.Error as error:
            raise InvalidatePoolError from error

    return made


def _ask(connection: Any, record: Any) -> None:
    from shared import postgres

    asked = datetime.now(UTC)
    _compare_clocks(asked, postgres.clock(connection))
    record.info["used"] = record.info["asked"] = time.monotonic()


@contextmanager
def transaction(*, durable: bool = True) -> Iterator[Session]:
    """A session that commits at the end of the block and rolls back on any error.

    What is not `durable` survives the death of any process, but on SQLite perhaps no power cut,
    which takes commits from the last one backwards. That is for what means nothing once guests
    and workers are off too; it saves a sync of the disk.
    """
    bind = engine() if durable else engine().execution_options(durable=False)
    with Session(bind, expire_on_commit=False) as session, session.begin():
        yield session


@contextmanager
def reading() -> Iterator[Session]:
    """A session that only reads: it never waits for SQLite's single writer.

    On PostgreSQL each query stands alone, as it does at READ COMMITTED in any case; that saves
    a BEGIN and a ROLLBACK over the wire.
    """
    options: dict[str, Any] = {"read_only": True}
    if engine().dialect.name != "sqlite":
        options["isolation_level"] = "AUTOCOMMIT"
    with Session(
        engine().execution_options(**options), expire_on_commit=False, autoflush=False
    ) as session:
        yield session


def database_now(session: Session) -> datetime:
    """The database's clock: leases are compared on one clock, however the hosts' differ."""
    if session.get_bind().dialect.name == "sqlite":
        value = session.connection().scalar(text("SELECT strftime('%Y-%m-%d %H:%M:%f', 'now')"))
        return datetime.fromisoformat(str(value)).replace(tzinfo=UTC)
    asked = datetime.now(UTC)
    told: datetime = session.connection().execute(text("SELECT clock_timestamp()")).scalar_one()
    _compare_clocks(asked, told)
    return told.astimezone(UTC)


class from_now(FunctionElement[datetime]):
    """So many seconds from now on the same clock, as a value that a statement writes."""

    type = UTCDateTime()
    inherit_cache = True


@compiles(from_now)
def _from_now(element: from_now, compiler: Any, **options: Any) -> str:
    return f"clock_timestamp() + make_interval(secs => {compiler.process(element.clauses)})"


@compiles(from_now, "sqlite")
def _from_now_sqlite(element: from_now, compiler: Any, **options: Any) -> str:
    seconds = compiler.process(element.clauses)
    return f"strftime('%Y-%m-%d %H:%M:%f000', 'now', {seconds} || ' seconds')"


class earlier(FunctionElement[datetime]):
    """A moment less so many seconds, of which either may be a column's."""

    type = UTCDateTime()
    inherit_cache = True


@compiles(earlier)
def _earlier(element: earlier, compiler: Any, **options: Any) -> str:
    moment, seconds = (compiler.process(each, **options) for each in element.clauses)
    return f"{moment} - make_interval(secs => {seconds})"


@compiles(earlier, "sqlite")
def _earlier_sqlite(element: earlier, compiler: Any, **options: Any) -> str:
    moment, seconds = (compiler.process(each, **options) for each in element.clauses)
    return f"strftime('%Y-%m-%d %H:%M:%f000', {moment}, -({seconds}) || ' seconds')"


def migrations() -> "Config":
    """What Alembic's commands are given."""
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    return config


def unhurried(connection: Connection) -> None:
    """Let statements on this connection take as long as they do; for migrations."""
    if connection.dialect.name == "postgresql":
        connection.connection.driver_connection.patience = None  # type: ignore[union-attr]


def migrate() -> None:
    """Bring the schema to the newest revision."""
    from alembic import command

    command.upgrade(migrations(), "head")


def main() -> None:
    """`python -m shared.database [downgrade REVISION]`; without arguments to the newest one."""
    from alembic import command

    parser = argparse.ArgumentParser(prog="shared.database", description=migrate.__doc__)
    parser.add_argument("action", nargs="?", choices=["upgrade", "downgrade"], default="upgrade")
    parser.add_argument("revision", nargs="?", help="-1 is the one before (default: the newest)")
    # A revision may begin with a minus; no option of ours does.
    asked, rest = parser.parse_known_args()
    revision = asked.revision or next(iter(rest), None)
    if asked.action == "upgrade":
        command.upgrade(migrations(), revision or "head")
    elif revision:
        command.downgrade(migrations(), revision)
    else:
        parser.error("say to which revision: -1 is the one before the present one")


if __name__ == "__main__":
    main()
