"""The API on a real database, SQLite unless a test asks for both; no broker, no workers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from api_world import TOKEN, Refused, World
from fastapi import FastAPI
from fastapi.testclient import TestClient
from operations.spine import (  # noqa: F401
    any_database,
    database_url,
    forget_caches,
    listening,
)

from services.api.app import create_app
from shared import database
from shared.models import Server


@pytest.fixture(autouse=True)
def configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Settings of this test alone; the broker's port is one where nothing listens."""
    monkeypatch.setenv("TRIPTYCH_TOKEN", TOKEN)
    monkeypatch.setenv("TRIPTYCH_DATABASE_URL", f"sqlite:///{tmp_path}/triptych.db")
    monkeypatch.setenv("TRIPTYCH_BROKER_URL", "redis://127.0.0.1:1/0")
    forget_caches()
    yield
    database.engine().dispose()
    forget_caches()


@pytest.fixture(scope="session")
def built() -> FastAPI:
    """One application for all tests: it keeps nothing but its token."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRIPTYCH_TOKEN", TOKEN)
        forget_caches()
        made = create_app()
    forget_caches()
    return made


@pytest.fixture
def app(
    built: FastAPI,
    configured: None,
    database_url: str,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> FastAPI:
    """The application on an empty database of this test's own."""
    monkeypatch.setenv("TRIPTYCH_DATABASE_URL", database_url)
    forget_caches()
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


@pytest.fixture
def statements(world: World) -> Iterator[list[str]]:
    """Every statement that the database is sent from here on."""
    with listening() as sent:
        yield sent
