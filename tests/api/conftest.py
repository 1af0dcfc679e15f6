"""The API on a real SQLite file, with no broker and no workers."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from api_world import TOKEN, Refused, World
from fastapi import FastAPI
from fastapi.testclient import TestClient

from services.api.app import create_app
from shared import broker, database
from shared.celery_app import publisher
from shared.models import Server
from shared.settings import settings

CACHED = (settings, database.engine, broker.redis_client, publisher)


def _forget_caches() -> None:
    for each in CACHED:
        each.cache_clear()


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database file with the schema of the migrations, to copy."""
    file = tmp_path_factory.mktemp("api") / "empty.db"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRIPTYCH_DATABASE_URL", f"sqlite:///{file}")
        _forget_caches()
        database.migrate()
        database.engine().dispose()
    _forget_caches()
    return file


@pytest.fixture(autouse=True)
def configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Settings of this test alone; the broker's port is one where nothing listens."""
    monkeypatch.setenv("TRIPTYCH_TOKEN", TOKEN)
    monkeypatch.setenv("TRIPTYCH_DATABASE_URL", f"sqlite:///{tmp_path}/triptych.db")
    monkeypatch.setenv("TRIPTYCH_BROKER_URL", "redis://127.0.0.1:1/0")
    _forget_caches()
    yield
    database.engine().dispose()
    _forget_caches()


@pytest.fixture(scope="session")
def built() -> FastAPI:
    """One application for all tests: it keeps nothing but its token."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRIPTYCH_TOKEN", TOKEN)
        _forget_caches()
        made = create_app()
    _forget_caches()
    return made


@pytest.fixture
def app(built: FastAPI, configured: None, migrated: Path, tmp_path: Path) -> FastAPI:
    """The application on an empty database of this test's own."""
    shutil.copy(migrated, tmp_path / "triptych.db")
    return built


@pytest.fixture
def stranger(app: FastAPI) -> TestClient:
    """Somebody without a token."""
    return TestClient(app, raise_server_exceptions=False)


@pytest.fixture
def api(app: FastAPI) -> TestClient:
    return TestClient(
        app, headers={"Authorization": f"Bearer {TOKEN}"}, raise_server_exceptions=False
    )


@pytest.fixture
def world(app: FastAPI) -> World:
    made = World()
    made.host()
    return made


@pytest.fixture
def server(world: World) -> Server:
    domain = world.domain()
    return world.server(domain_uuid=domain.uuid)


@pytest.fixture
def refused() -> Refused:
    """Asserts that an answer is a whole problem of that status and code; returns it."""

    def check(response: Any, status: int, code: str) -> dict[str, Any]:
        problem: dict[str, Any] = response.json()
        assert (status, code) == (response.status_code, problem.get("code")), problem
        assert response.headers["content-type"] == "application/problem+json"
        assert problem["type"] == f"/problems/{code}"
        assert problem["status"] == status
        assert problem["title"]
        assert problem["detail"].endswith((".", "`"))
        return problem

    return check
