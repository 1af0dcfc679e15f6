"""The database under the project: migrations, many processes, processes that fork."""

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from operations.spine import HOST, Postgres, World, forget_caches, migrated, outputs, python
from sqlalchemy import MetaData, create_engine, func, inspect, select, text
from sqlalchemy.exc import OperationalError
from sqlmodel import SQLModel

from shared import database
from shared.database import engine, reading, transaction
from shared.models import Event, Farm, Host, Server
from shared.operations import patience
from shared.operations.drain import drain
from shared.operations.patience import patiently

MIGRATE = "from shared.database import migrate; migrate()"


@pytest.fixture(params=["sqlite", "postgresql"])
def empty(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A database without any table."""
    url = f"sqlite:///{tmp_path}/empty.db"
    if request.param == "postgresql":
        cluster: Postgres = request.getfixturevalue("postgres")
        url = cluster.create(f"e{os.urandom(8).hex()}")
    monkeypatch.setenv("TRIPTYCH_DATABASE_URL", url)
    forget_caches()
    return url


def test_migrations_give_the_models_schema(empty: str) -> None:
    """Autogenerate finds nothing to add: no table, column, index, type or constraint."""
    database.migrate()
    with engine().connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        difference = compare_metadata(context, SQLModel.metadata)
    assert difference == []
    engine().dispose()


def test_migrations_give_the_models_conditions(empty: str) -> None:
    """The conditions of the partial indexes, which autogenerate does not compare."""
    database.migrate()
    found = inspect(engine())
    dialect = engine().dialect.name
    for table in SQLModel.metadata.tables.values():
        partial = {
            str(index.name): str(index.dialect_options[dialect]["where"])
            for index in table.indexes
            if index.dialect_options[dialect].get("where") is not None
        }
        there = {
            each["name"]: each.get("dialect_options", {}).get(f"{dialect}_where")
            for each in found.get_indexes(table.name)
        }
        for name, condition in partial.items():
            assert there[name] is not None, name
            if dialect == "sqlite":
                assert str(there[name]) == condition
    engine().dispose()


def test_migrating_twice_changes_nothing(empty: str) -> None:
    """The second time finds the schema as it is."""
    database.migrate()
    database.migrate()
    engine().dispose()


DAY = datetime(2026, 3, 10, 3, 0, tzinfo=UTC)
WAY: dict[str, Any] = {"consistency": "crash", "way": "reflink", "bytes": 1 << 40}
MADE: dict[str, Any] = {"source": {"kind": "image", "id": "img_1"}, "name": "qa", "count": 1}
ROWS: dict[str, dict[str, Any]] = {
    "host": {"name": "kvm-1", "created_at": DAY, "last_seen_at": DAY, "facts": {"reflink": True}},
    "domain": {"host": "kvm-1", "uuid": "u-1", "name": "web", "state": "running", "vcpus": 2}
    | {"memory_bytes": 1 << 31, "disks": [{"target": "vda"}]},
    "server": {"id": "srv_1", "name": "web", "host": "kvm-1", "domain_uuid": "u-1"}
    | {"created_at": DAY},
    "operation": {"seq": 1, "id": "op_1", "kind": "clone.create", "service": "cloner"}
    | {"host": "kvm-1", "server_id": "srv_1", "command": MADE, "attempt": 0}
    | {"requested_by": "test", "state": "queued", "phase": "queued", "progress": 0}
    | {"bytes_done": 0, "bytes_total": 0, "committed": False, "created_at": DAY, "woken_at": DAY},
    "snapshot": {"id": "snp_1", "server_id": "srv_1", "taken_at": DAY, "expires_at": DAY, **WAY}
    | {"with_memory": False, "description": "before"},
    "image": {"id": "img_1", "name": "first", "server_id": "srv_1", "created_at": DAY, **WAY}
    | {"description": "", "pinned": True, "origin": "manual", "state": "complete", "left_out": []},
    "clone": {"id": "cln_1", "operation_id": "op_1", "host": "kvm-1", "name": "qa"}
    | {"server_id": "srv_1", "source_kind": "image", "source_id": "img_1", "created_at": DAY}
    | {"with_memory": False, "identity": {}, "state": "ready"},
    "schedule": {"id": "sch_1", "server_id": "srv_1", "kind": "daily", "at": "03:00", "keep": 7}
    | {"timezone": "UTC", "enabled": True, "catch_up_s": 60, "failures_in_row": 0}
    | {"created_at": DAY},
}
"""A row of each table that an earlier version may have left, in the order of their references."""


def stored() -> dict[str, dict[str, Any]]:
    """The one row of each table, with the columns that the table has now."""
    tables = MetaData()
    with engine().connect() as connection:
        tables.reflect(connection)
        return {
            name: dict(connection.execute(select(tables.tables[name])).mappings().one())
            for name in ROWS
        }


def test_rows_outlive_the_migrations(empty: str) -> None:
    """From the first revision to the newest, back again and forth, no row is lost or changed."""
    command.upgrade(database.migrations(), "0001")
    tables = MetaData()
    with engine().begin() as connection:
        tables.reflect(connection)
        for name, values in ROWS.items():
            connection.execute(tables.tables[name].insert().values(values))
    before = stored()

    database.migrate()
    unmeasured = {"unique_bytes": None, "measured_at": None}
    later = {"host": {"draining_since": None, "vault_id": None}}
    later |= {"snapshot": unmeasured, "image": unmeasured}
    later["schedule"] = {"require": "complete", "start_at": None}
    later |= {"server": {"held_by": None}, "journal": {"unit": None}}
    later["clone"] = {"farm_id": "frm_1", "files": None, "linked_to": []}
    assert {table: {**row, **later.get(table, {})} for table, row in before.items()} == stored()
    with transaction() as session:
        drain(session, "kvm-1")
        farm = session.get_one(Farm, "frm_1")
        assert (
            farm.name,
            farm.command,
            farm.server_id,
            farm.operation_id,
        ) == ("qa", MADE, "srv_1", "op_1")
        assert (farm.due_at, farm.deleted_at) == (None, None)

    command.downgrade(database.migrations(), "0001")
    assert before == stored()
    database.migrate()
    with reading() as session:
        assert session.get_one(Host, "kvm-1").draining_since is None
        if session.get_bind().dialect.name == "sqlite":
            assert session.connection().exec_driver_sql("PRAGMA foreign_key_check").all() == []
    engine().dispose()


def test_processes_that_migrate_at_once(empty: str) -> None:
    """One does it, the others wait and find it done."""
    outputs([python(MIGRATE) for _ in range(2)])
    assert "operation" in inspect(engine()).get_table_names()
    engine().dispose()


def test_sqlite_file_is_as_the_code_relies_on(tmp_path: Path) -> None:
    """Foreign keys in force, a write-ahead log, and each commit on disk before it is one."""
    url = f"sqlite:///{tmp_path}/checked.db"
    migrated(url)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRIPTYCH_DATABASE_URL", url)
        forget_caches()
        with engine().connect() as connection:
            assert connection.exec_driver_sql("PRAGMA integrity_check").scalar() == "ok"
            assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1
            assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
            assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2
        for durable, synced in ((False, 1), (True, 2), (False, 1)):
            with transaction(durable=durable) as session:
                found = session.connection().exec_driver_sql("PRAGMA synchronous").scalar()
            assert synced == found
        with transaction() as session:
            assert session.connection().exec_driver_sql("PRAGMA synchronous").scalar() == 2
        engine().dispose()
    forget_caches()


WRITE = """
import sys
from shared.database import transaction
from shared.events import emit
for n in range(40):
    with transaction() as session:
        emit(session, "test.written", sys.argv[1])
"""


def test_many_processes_write_and_none_is_refused(world: World) -> None:
    """SQLite has one writer at a time: the others wait, and nobody reads 'database is locked'."""
    outputs([python(WRITE, str(n)) for n in range(4)])
    with reading() as session:
        assert session.scalar(select(func.count()).select_from(Event)) == 160


def test_readers_do_not_wait_for_the_writer(world: World) -> None:
    """While one writes, others read what was before."""
    with transaction() as writing:
        writing.add(Server(name="new", host=HOST, domain_uuid="x"))
        writing.flush()
        with reading() as session:
            assert list(session.scalars(select(Server))) == []


def test_rolled_back_on_any_error(world: World, any_database: str) -> None:
    """An error inside the block takes all of it back."""
    with pytest.raises(KeyboardInterrupt), transaction() as session:
        session.add(Server(name="new", host=HOST, domain_uuid="x"))
        session.flush()
        raise KeyboardInterrupt
    with reading() as session:
        assert list(session.scalars(select(Server))) == []


def _end_all_connections(cluster: Postgres) -> None:
    """As a restart of the database does."""
    administrator = create_engine(cluster.url("postgres"))
    with administrator.connect() as connection:
        ended = "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = :name"
        connection.execute(text(ended), {"name": engine().url.database})
    administrator.dispose()


@pytest.mark.parametrize("any_database", ["postgresql"], indirect=True)
def test_connections_that_ended_are_replaced(
    world: World, any_database: str, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unnoticed where they were idle; else one transaction fails, and the next one does not."""
    for bound in ("_FRESH", "_LATELY"):
        monkeypatch.setattr(database, bound, 3600)
    with reading() as one, reading() as two:
        assert one.scalar(select(1)) == two.scalar(select(1)), "two connections"
    _end_all_connections(postgres)
    with pytest.raises(OperationalError):
        world.server("in use")
    world.server("after it")

    monkeypatch.setattr(database, "_FRESH", 0)
    _end_all_connections(postgres)
    world.server("after idleness")


@pytest.mark.parametrize("any_database", ["postgresql"], indirect=True)
def test_server_that_takes_no_writes_is_waited_for(
    world: World, any_database: str, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the old one of a failover; the connection to it is not used again."""
    monkeypatch.setattr(patience, "RETRY", 0.05)
    administrator = create_engine(postgres.url("postgres"), isolation_level="AUTOCOMMIT")
    name = engine().url.database

    def set_to(value: str) -> None:
        with administrator.connect() as connection:
            sql = f"ALTER DATABASE {name} SET default_transaction_read_only = {value}"
            connection.execute(text(sql))

    set_to("on")
    engine().dispose()
    with pytest.raises(OperationalError, match="read-only"):
        world.server("too early")
    tries: list[int] = []

    def write() -> None:
        tries.append(1)
        if len(tries) == 2:
            set_to("off")
        world.server("in the end")

    patiently(lambda: None, write)
    administrator.dispose()
    assert len(tries) >= 2


SPAWNED = """
import multiprocessing, os
from shared.database import engine, transaction
from shared.events import emit

def child():
    with transaction() as session:
        emit(session, "test.child", str(os.getpid()))

if __name__ == "__main__":
    with transaction() as session:
        emit(session, "test.parent", None)
    process = multiprocessing.get_context("spawn").Process(target=child)
    process.start(); process.join()
    with transaction() as session:
        emit(session, "test.parent", None)
    raise SystemExit(process.exitcode)
"""


def test_spawned_child_has_its_own_connections(
    world: World, any_database: str, tmp_path: Path
) -> None:
    """As Celery's pool starts them: what a child does with the database leaves its parent's
    connections whole."""
    import subprocess
    import sys

    script = tmp_path / "spawned.py"
    script.write_text(SPAWNED)
    root = str(Path(__file__).resolve().parents[2])
    subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": root},
        check=True,
        timeout=60,
    )
    with reading() as session:
        assert session.scalar(select(func.count()).select_from(Event)) == 3
