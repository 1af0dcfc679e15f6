"""What the tests of operations and schedules stand on: databases, a broker, rows, fake work.

The databases and the broker are real and private. Only the handlers, and the actions of the
journal, stand in for those that would touch a hypervisor.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import pytest
from operations.servers import Broker, Postgres
from operations.waiting import wait_for  # noqa: F401
from sqlalchemy import event, select, update

from shared import broker, database, mounted
from shared.celery_app import publisher
from shared.commands import Command, TakeSnapshot
from shared.database import now, transaction
from shared.models import Event, Host, JournalEntry, Operation, OutboxMessage, Server
from shared.operations import journal, runner
from shared.operations.context import Outcome
from shared.operations.submit import submit
from shared.settings import settings
from shared.vault import Vault

HOST = "kvm-1"
NOBODY_LISTENS = "redis://127.0.0.1:1/0"
CACHED = (settings, database.engine, broker.redis_client, publisher)
Result = TypeVar("Result")


class Killed(BaseException):
    """Stands for SIGKILL where a subprocess would only make the test slower."""


def forget_caches() -> None:
    for each in CACHED:
        each.cache_clear()


def at_once(*calls: Callable[[], Result]) -> list[Result]:
    """The results of the calls, made from a thread each."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return [each.result() for each in [pool.submit(call) for call in calls]]


# Databases


@contextmanager
def listening() -> Iterator[list[str]]:
    """Every statement that the database is sent meanwhile."""
    sent: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        sent.append(statement)

    event.listen(database.engine(), "before_cursor_execute", note)
    try:
        yield sent
    finally:
        event.remove(database.engine(), "before_cursor_execute", note)


def migrated(url: str) -> None:
    """Give the database the schema of the migrations."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRIPTYCH_DATABASE_URL", url)
        forget_caches()
        database.migrate()
        database.engine().dispose()
    forget_caches()


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("template") / "empty.db"
    migrated(f"sqlite:///{file}")
    return file


@pytest.fixture(scope="session")
def postgres_template(postgres: Postgres) -> str:
    migrated(postgres.create("empty"))
    return "empty"


@pytest.fixture(params=["sqlite", "postgresql"])
def any_database(request: pytest.FixtureRequest) -> str:
    """For `world`: the test runs on each of the two."""
    return str(request.param)


@pytest.fixture
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A migrated, empty database of this test's own: SQLite unless `any_database` asks."""
    wanted = "sqlite"
    if "any_database" in request.fixturenames:
        wanted = request.getfixturevalue("any_database")
    if wanted == "postgresql":
        template = request.getfixturevalue("postgres_template")
        cluster: Postgres = request.getfixturevalue("postgres")
        return cluster.create(f"t{uuid4().hex}", template)
    shutil.copy(request.getfixturevalue("sqlite_template"), tmp_path / "triptych.db")
    return f"sqlite:///{tmp_path}/triptych.db"


# The broker


@pytest.fixture
def redis_broker(redis_server: Broker) -> Broker:
    """An empty broker; without this fixture nothing listens at the broker's address."""
    redis_server.client.flushall()
    return redis_server


# The world


@dataclass
class Played:
    """One action of the journal that was carried out."""

    action: str
    step: str


class World:
    """Rows, and work that is only pretended."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch = monkeypatch
        self.played: list[str] = []
        self.action("note", lambda step: None)
        with transaction() as session:
            session.add(Host(name=HOST))
            session.add(Host(name="kvm-2"))
        mounted.ensure()

    def server(self, name: str = "web", **fields: Any) -> Server:
        server = Server(name=name, domain_uuid=str(uuid4()), **{"host": HOST, **fields})
        with transaction() as session:
            session.add(server)
        return server

    def submit(self, command: Command, key: str | None = None) -> str:
        with transaction() as session:
            return submit(session, command, requested_by="test", idempotency_key=key).id

    def snapshot_of(self, server: Server) -> str:
        """An operation that takes a snapshot."""
        return self.submit(TakeSnapshot(server=server.id))

    def action(self, name: str, function: Callable[[str], None]) -> None:
        """An action of the journal, with the argument `step`; what is played is recorded."""

        def play(step: str) -> None:
            self.played.append(step)
            function(step)

        self._patch.setitem(journal._ACTIONS, name, play)

    def handler(self, function: runner.Handler, kind: str = TakeSnapshot.kind) -> None:
        self._patch.setitem(runner._HANDLERS, kind, function)

    def row(self, operation_id: str) -> Operation:
        with transaction() as session:
            query = select(Operation).where(Operation.id == operation_id)  # type: ignore[arg-type]
            return session.scalars(query).one()

    def change(self, operation_id: str, **values: Any) -> None:
        row: Any = Operation
        with transaction() as session:
            session.execute(update(Operation).where(row.id == operation_id).values(**values))

    def expire(self, operation_id: str, seconds: float = 1) -> None:
        """Let the lease have run out that long ago."""
        self.change(operation_id, lease_expires_at=now() - timedelta(seconds=seconds))

    def journal(self, operation_id: str) -> list[tuple[str, str]]:
        row: Any = JournalEntry
        query = select(JournalEntry).where(row.operation_id == operation_id).order_by(row.seq)
        with transaction() as session:
            return [(each.side, each.arguments["step"]) for each in session.scalars(query)]

    def woken(self) -> list[str]:
        """The operations that have a wake-up in the outbox."""
        row: Any = OutboxMessage
        with transaction() as session:
            messages = session.scalars(select(OutboxMessage).order_by(row.seq))
            return [each.arguments["operation_id"] for each in messages]

    def clear_outbox(self) -> None:
        with transaction() as session:
            for each in session.scalars(select(OutboxMessage)):
                session.delete(each)

    def events(self, type_: str) -> list[dict[str, Any]]:
        row: Any = Event
        query = select(Event).where(row.type == f"triptych.{type_}").order_by(row.seq)
        with transaction() as session:
            return [each.data for each in session.scalars(query)]

    def add(self, *rows: Any) -> None:
        with transaction() as session:
            session.add_all(rows)


def vault_of_its_own() -> Vault:
    """The host's vault, where the settings have it by now."""
    made = Vault(settings().vault)
    made.create()
    mounted.adopt()
    return made


def nothing(context: Any, command: Any) -> Outcome:
    """A handler that succeeds at once."""
    return Outcome({})


@contextmanager
def surroundings(
    patch: pytest.MonkeyPatch, folder: Path, url: str, address: str
) -> Iterator[dict[str, str]]:
    """The settings of one test alone, here and in the environment of subprocesses.

    `patch` is the test's own: of two, the one that is undone last would bring back what the other
    had set.
    """
    given = {
        "TRIPTYCH_DATABASE_URL": url,
        "TRIPTYCH_BROKER_URL": address,
        "TRIPTYCH_HOST": HOST,
        "TRIPTYCH_VAULT": str(folder / "vault"),
        "TRIPTYCH_LIBVIRT_URI": "test:///default",
        "TRIPTYCH_LEASE": "2",
        "TRIPTYCH_SCHEDULE_SPREAD": "0",
    }
    for name, value in given.items():
        patch.setenv(name, value)
    forget_caches()
    try:
        yield given
    finally:
        publisher().close()
        database.engine().dispose()
        forget_caches()


@pytest.fixture
def environment(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[dict[str, str]]:
    url = request.getfixturevalue("database_url")
    address = NOBODY_LISTENS
    if "redis_broker" in request.fixturenames:
        address = request.getfixturevalue("redis_broker").url
    with surroundings(monkeypatch, tmp_path, url, address) as given:
        yield given


@pytest.fixture
def world(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


def python(code: str, *arguments: str) -> subprocess.Popen[str]:
    """Another process of the project's, with this one's environment."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def outputs(processes: list[subprocess.Popen[str]]) -> list[str]:
    """What each wrote, once all have ended well."""
    found = [process.communicate(timeout=150) for process in processes]
    for process, (_, problem) in zip(processes, found, strict=True):
        assert process.returncode == 0, problem
    return [written for written, _ in found]
