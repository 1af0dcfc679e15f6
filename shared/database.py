"""The database: one engine per process, short transactions.

SQLite (WAL, `BEGIN IMMEDIATE`, synchronous FULL: a journal row is on disk before
the step it describes) is the embedded default; PostgreSQL the deployment's.
"""

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from sqlalchemy import URL, DateTime, Engine, TypeDecorator, create_engine, event, make_url, text
from sqlalchemy.exc import InvalidatePoolError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement
from sqlmodel import Session

from shared.settings import settings


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


def now() -> datetime:
    return datetime.now(UTC)


_NO_ENDLESS_WAIT = {"connect_timeout": 5, "keepalives_idle": 10, "tcp_user_timeout": 15_000}
"""libpq's settings: a database that falls silent is an error soon, not after a quarter hour.
Seconds, the last one milliseconds."""
_MOST_CONNECTIONS = 15
"""Of one process; kept once opened, since opening one costs more than most transactions."""
_FRESH = 2.0
"""Seconds."""


@cache
def engine() -> Engine:
    url = make_url(settings().database_url.get_secret_value())
    if url.get_backend_name() != "sqlite":
        return _postgresql(url)
    if url.database:
        Path(url.database).parent.mkdir(parents=True, exist_ok=True)
    made = create_engine(url, connect_args={"timeout": 30, "check_same_thread": False})

    @event.listens_for(made, "connect")
    def _pragmas(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # we begin transactions ourselves, below
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(made, "begin")
    def _begin(connection: Any) -> None:
        deferred = connection.get_execution_options().get("read_only")
        connection.exec_driver_sql("BEGIN" if deferred else "BEGIN IMMEDIATE")

    return made


def _postgresql(url: URL) -> Engine:
    """An engine that asks a connection whether it lives only where it has been idle for a
    while: one that was used a moment ago need not pay for a question with each use."""
    made = create_engine(
        url, pool_size=_MOST_CONNECTIONS, max_overflow=0, connect_args=_NO_ENDLESS_WAIT
    )

    @event.listens_for(made, "connect")
    @event.listens_for(made, "checkin")
    def _in_use(_connection: Any, record: Any) -> None:
        record.info["used"] = time.monotonic()

    @event.listens_for(made, "checkout")
    def _ask(connection: Any, record: Any, _fairy: Any) -> None:
        if time.monotonic() - record.info["used"] < _FRESH:
            return
        try:
            made.dialect.do_ping(connection)
        except made.dialect.loaded_dbapi.Error as error:
            raise InvalidatePoolError from error

    return made


@contextmanager
def transaction() -> Iterator[Session]:
    """A session that commits at the end of the block and rolls back on any error."""
    with Session(engine(), expire_on_commit=False) as session, session.begin():
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
    value = session.connection().scalar(text("SELECT clock_timestamp()"))
    assert isinstance(value, datetime)  # noqa: S101
    return value.astimezone(UTC)


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


def migrations() -> Config:
    """What Alembic's commands are given."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    return config


def migrate() -> None:
    """Bring the schema to the newest revision."""
    command.upgrade(migrations(), "head")


def main() -> None:
    """`python -m shared.database [downgrade REVISION]`; without arguments to the newest one."""
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
