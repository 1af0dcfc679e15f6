"""The database under the project: migrations, many processes, processes that fork."""

import os
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from operations.spine import HOST, Postgres, World, forget_caches, migrated, outputs, python
from sqlalchemy import func, inspect, select
from sqlmodel import SQLModel

from shared import database
from shared.database import engine, reading, transaction
from shared.models import Event, Server

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
