"""The API on a real SQLite file, with no broker and no workers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from api_world import TOKEN, Refused, World
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlmodel import SQLModel

from services.api.app import create_app
from shared import broker, database
from shared.celery_app import publisher
from shared.models import Server
from shared.settings import settings

CACHED = (settings, database.engine, broker.redis_client, publisher)


@pytest.fixture(autouse=True)
def configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Settings of this test alone; the broker's port is one where nothing listens."""
    monkeypatch.setenv("TRIPTYCH_TOKEN", TOKEN)
    monkeypatch.setenv("TRIPTYCH_DATABASE_URL", f"sqlite:///{tmp_path}/triptych.db")
    monkeypatch.setenv("TRIPTYCH_BROKER_URL", "redis://127.0.0.1:1/0")
    for each in CACHED:
        each.cache_clear()
    yield
    database.engine().dispose()
    for each in CACHED:
        each.cache_clear()


@pytest.fixture
def app(configured: None) -> FastAPI:
    SQLModel.metadata.create_all(database.engine())
    return create_app()


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
