"""The database: one engine per process, short transactions.

SQLite (WAL, `BEGIN IMMEDIATE`, synchronous FULL: a journal row is on disk before
the step it describes) is the embedded default; PostgreSQL the deployment's.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
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
from sqlmodel import Session

from shared import postgres
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


@cache
def engine() -> Engine:
    url = make_url(settings().database_url.get_secret_value())
    return _sqlite(url) if url.get_backend_name() == "sqlite" else _postgresql(url)


def _postgresql(url: URL) -> Engine:
    made = create_engine(
        url,
        pool_pre_ping=True,
        pool_timeout=POOL_PATIENCE,
        connect_args=postgres.NO_ENDLESS_WAIT,
    )

    @event.listens_for(made, "do_connect")
    def _connect(_dialect: Any, _record: Any, arguments: Any, named: Any) -> Any:
        return postgres.BoundedConnection.connect(*arguments, **named)

    @event.listens_for(made, "connect")
    def _introduce(connection: Any, _record: Any) -> None:
        asked = datetime.now(UTC)
        _compare_clocks(asked, postgres.introduce(connection))

    return made


def _sqlite(url: URL) -> Engine:
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


@contextmanager
def transaction() -> Iterator[Session]:
    """A session that commits at the end of the block and rolls back on any error."""
    with Session(engine(), expire_on_commit=False) as session, session.begin():
        yield session


@contextmanager
def reading() -> Iterator[Session]:
    """A session that only reads: it never waits for SQLite's single writer."""
    with Session(
        engine().execution_options(read_only=True), expire_on_commit=False, autoflush=False
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


def migrations() -> Config:
    """What Alembic's commands are given."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    return config


def unhurried(connection: Connection) -> None:
    """Let statements on this connection take as long as they do; for migrations."""
    if connection.dialect.name == "postgresql":
        connection.connection.driver_connection.patience = None  # type: ignore[union-attr]


def migrate() -> None:
    """Bring the schema to the newest revision."""
    command.upgrade(migrations(), "head")


if __name__ == "__main__":
    migrate()
