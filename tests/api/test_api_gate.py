"""Who comes in, and what a refusal looks like."""

from collections.abc import Callable
from typing import Any

import pytest
from api_world import TOKEN, Refused, World
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy.exc import OperationalError

from services.api import images
from services.api.app import create_app
from shared.settings import settings


@pytest.mark.parametrize(
    "path",
    ["/v1/servers", "/v1/operations/x", "/v1/events", "/v1/nowhere", "/v1", "/metrics"],
)
def test_no_token(stranger: TestClient, refused: Refused, path: str) -> None:
    """Nothing under /v1, nor the metrics, answers without a token, not even that it is not."""
    response = stranger.get(path)
    refused(response, 401, "unauthorized")
    assert response.headers["www-authenticate"].startswith("Bearer")


@pytest.mark.parametrize(
    "header", ["Bearer wrong", "Bearer", "Basic " + TOKEN, TOKEN, f"Bearer {TOKEN}x", "Bearer ü"]
)
def test_wrong_token(stranger: TestClient, refused: Refused, header: str) -> None:
    """Another token, or the right one in another form, is refused."""
    headers = {"Authorization": header.encode("latin-1")}
    refused(stranger.get("/v1/servers", headers=headers), 401, "unauthorized")


def test_strangers_body_is_not_parsed(stranger: TestClient, refused: Refused) -> None:
    """A stranger with a broken body learns of the missing token, not of the body."""
    response = stranger.post(
        "/v1/servers", content="{", headers={"Content-Type": "application/json"}
    )
    refused(response, 401, "unauthorized")


def test_scheme_is_case_insensitive(stranger: TestClient) -> None:
    """RFC 9110: `bearer` is `Bearer`."""
    response = stranger.get("/v1/servers", headers={"Authorization": f"bearer {TOKEN}"})
    assert response.status_code == 200


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/docs", "/openapi.json"])
def test_open_paths(stranger: TestClient, path: str) -> None:
    """Health and the documentation need no token."""
    assert stranger.get(path).status_code == 200


@pytest.mark.parametrize("token", [None, "", "  "])
def test_no_token_configured(monkeypatch: pytest.MonkeyPatch, token: str | None) -> None:
    """Without a token of its own, the API refuses to start and says what to set."""
    if token is None:
        monkeypatch.delenv("TRIPTYCH_TOKEN")
    else:
        monkeypatch.setenv("TRIPTYCH_TOKEN", token)
    settings.cache_clear()
    with pytest.raises(SystemExit, match="TRIPTYCH_TOKEN"):
        create_app()


def test_unknown_address(api: TestClient, refused: Refused) -> None:
    """An unknown address is a problem that names it."""
    problem = refused(api.get("/v1/serverz"), 404, "not_found")
    assert "GET /v1/serverz" in problem["detail"]


def test_wrong_method(api: TestClient, refused: Refused) -> None:
    """A method that an address does not know is 405, with those that it does."""
    response = api.put("/v1/servers")
    refused(response, 405, "method_not_allowed")
    assert "allow" in response.headers


def test_slash_in_a_name(api: TestClient, server: Any, world: World, refused: Refused) -> None:
    """`web-1%2Fsnapshot` is a strange name, never the snapshot of web-1."""
    world.snapshot(server)
    refused(api.delete("/v1/servers/web-1%2Fsnapshot"), 404, "not_found")
    assert api.get("/v1/operations").json()["items"] == []


def test_name_of_300_characters(api: TestClient, world: World, refused: Refused) -> None:
    """A name that long is refused before it is looked up."""
    problem = refused(api.get("/v1/servers/" + "x" * 300), 422, "invalid_request")
    assert problem["errors"][0]["field"] == "server"


def test_broken_json(api: TestClient, refused: Refused) -> None:
    """A body that is no JSON is named as such."""
    headers = {"Content-Type": "application/json"}
    problem = refused(
        api.post("/v1/servers", content='{"host": ', headers=headers), 422, "invalid_request"
    )
    assert "not valid JSON" in problem["detail"]


def test_body_without_content_type(api: TestClient, refused: Refused) -> None:
    """A body that does not say that it is JSON is refused with what to send."""
    response = api.post("/v1/servers", content='{"host": "a", "domain": "b"}')
    problem = refused(response, 422, "invalid_request")
    assert "application/json" in problem["detail"]


def test_huge_body(api: TestClient, refused: Refused) -> None:
    """A body over 64 KiB is not read, whether it says its length or not."""
    body = b'{"host": "%s"}' % (b"x" * 70_000)
    headers = {"Content-Type": "application/json"}
    told = api.post("/v1/servers", content=body, headers=headers)
    refused(told, 413, "request_too_large")
    untold = api.post("/v1/servers", content=iter([body]), headers=headers)
    refused(untold, 413, "request_too_large")


def test_nul_in_a_text(api: TestClient, server: Any, refused: Refused) -> None:
    """PostgreSQL cannot store NUL: refused at the edge, on every database."""
    response = api.post("/v1/servers/web-1/images", json={"description": "a\0b"})
    refused(response, 422, "invalid_request")


@pytest.mark.parametrize("noun", ["operations", "images", "events"])
def test_nul_in_a_filter(api: TestClient, server: Any, refused: Refused, noun: str) -> None:
    """Nor can it look for one."""
    problem = refused(api.get(f"/v1/{noun}?server=%00"), 422, "invalid_request")
    assert [each["field"] for each in problem["errors"]] == ["server"]


def test_unexpected_error_leaks_nothing(
    api: TestClient, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    """A crash is 500 with a reference; what crashed stays in the log."""
    monkeypatch.setattr(images.lookups, "image", _raising(RuntimeError("secret-path")))
    problem = refused(api.get("/v1/images/x"), 500, "internal_error")
    assert "secret" not in str(problem)


def test_database_away(api: TestClient, monkeypatch: pytest.MonkeyPatch, refused: Refused) -> None:
    """A database that does not answer is 503 with Retry-After, not a crash."""
    gone = OperationalError("SELECT", {}, Exception("could not connect to secret-host"))
    monkeypatch.setattr(images.lookups, "image", _raising(gone))
    response = api.get("/v1/images/x")
    problem = refused(response, 503, "database_unavailable")
    assert response.headers["retry-after"]
    assert "secret" not in str(problem)


def _raising(error: Exception) -> Callable[..., Any]:
    def function(*_: Any, **__: Any) -> Any:
        raise error

    return function


def test_problem_types_can_be_looked_up(stranger: TestClient, refused: Refused) -> None:
    """A problem's `type` is an address that answers what the code means."""
    kind = stranger.get("/problems/snapshot_exists").json()
    assert (kind["code"], kind["status"]) == ("snapshot_exists", 409)
    refused(stranger.get("/problems/nonsense"), 404, "not_found")


def test_liveness(stranger: TestClient) -> None:
    """/healthz says that the process lives."""
    assert stranger.get("/healthz").json() == {"status": "ok", "checks": {}}


def test_ready_without_broker(stranger: TestClient) -> None:
    """Without the broker the API is ready, degraded, and says what that means."""
    response = stranger.get("/readyz")
    document = response.json()
    assert (response.status_code, document["status"]) == (200, "degraded")
    assert document["checks"]["database"]["status"] == "ok"
    assert "accepted" in document["checks"]["broker"]["reason"]


def test_not_ready_without_database(configured: None) -> None:
    """Without the schema the API is not ready: 503, naming the database."""
    response = TestClient(create_app()).get("/readyz")
    assert (response.status_code, response.json()["status"]) == (503, "failed")
    assert response.json()["checks"]["database"]["status"] == "failed"


def test_starts_by_itself(configured: None) -> None:
    """With its lifespan the API makes the schema, starts the relay and ends it again."""
    app: FastAPI = create_app()
    with TestClient(app) as client:
        assert app.state.relay.is_alive()
        assert client.get("/readyz").status_code == 200
    assert not app.state.relay.is_alive()
