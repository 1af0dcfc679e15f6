"""The OpenAPI document is whole, and true."""

from typing import Any

import pytest
from fastapi import FastAPI

from services.api import examples, shapes
from services.api.auth import GUARDED
from services.api.problems import MEDIA_TYPE, catalogue

METHODS = ("get", "post", "put", "patch", "delete")


@pytest.fixture
def document(app: FastAPI) -> dict[str, Any]:
    return app.openapi()


def operations(document: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [
        (f"{method.upper()} {path}", item[method])
        for path, item in document["paths"].items()
        for method in METHODS
        if method in item
    ]


def test_every_route_of_the_contract(document: dict[str, Any]) -> None:
    """What the contract lists for the nouns of this version is there, and nothing else."""
    server, image, operation = "/servers/{server}", "/images/{image}", "/operations/{operation}"
    schedule = server + "/schedules/{kind}"
    expected = {
        "GET /hosts",
        "GET /hosts/{host}",
        "GET /hosts/{host}/domains",
        *(f"POST /hosts/{{host}}/{way}" for way in ("drain", "resume")),
        "GET /servers",
        "POST /servers",
        *(f"{method} {server}" for method in ("GET", "DELETE")),
        *(f"{method} {server}/snapshot" for method in ("GET", "POST", "DELETE")),
        *(f"POST {server}/snapshot/{work}" for work in ("revert", "promote", "clones")),
        *(f"{method} {server}/images" for method in ("GET", "POST")),
        f"POST {server}/clones",
        "GET /images",
        *(f"{method} {image}" for method in ("GET", "PATCH", "DELETE")),
        *(f"POST {image}/{work}" for work in ("restore", "verify", "clones")),
        "GET /clones",
        *(f"{method} /clones/{{clone}}" for method in ("GET", "DELETE")),
        "GET /farms",
        *(f"{method} /farms/{{farm}}" for method in ("GET", "PATCH", "DELETE")),
        *(f"POST /farms/{{farm}}/{work}" for work in ("start", "stop", "retry")),
        *(f"{method} {schedule}" for method in ("GET", "PUT", "DELETE")),
        f"GET {schedule}/runs",
        "GET /operations",
        f"GET {operation}",
        *(f"POST {operation}/{work}" for work in ("cancel", "undo")),
        "GET /events",
        "GET /events/stream",
    }
    found = {name for name, _ in operations(document)}
    assert {name.replace(" ", " /v1") for name in expected} | {
        "GET /healthz",
        "GET /readyz",
        "GET /problems/{code}",
        "GET /metrics",
    } == found


def test_every_operation_is_explained(document: dict[str, Any]) -> None:
    """Each has a summary, a description, an id and a noun."""
    for name, operation in operations(document):
        assert operation["summary"], name
        assert len(operation["description"]) > 20, name
        assert operation["tags"], name
    ids = [operation["operationId"] for _, operation in operations(document)]
    assert len(ids) == len(set(ids))


def test_every_operation_has_examples(document: dict[str, Any]) -> None:
    """Each answer has an example, and so has each body that is asked for."""
    schemas = document["components"]["schemas"]
    for name, operation in operations(document):
        good = {code: each for code, each in operation["responses"].items() if code < "300"}
        assert good, name
        for code, response in good.items():
            if code != "204":
                assert all("example" in each for each in response["content"].values()), (name, code)
        if body := operation.get("requestBody"):
            reference = body["content"]["application/json"]["schema"]["$ref"]
            assert schemas[reference.split("/")[-1]]["examples"] is not None, name


def test_every_operation_names_its_refusals(document: dict[str, Any]) -> None:
    """Each lists its problems by code, and those of /v1 what any of them may answer."""
    for name, operation in operations(document):
        codes = set()
        for status, response in operation["responses"].items():
            for code, example in (
                response["content"][MEDIA_TYPE]["examples"].items()
                if (MEDIA_TYPE in response.get("content", {}))
                else ()
            ):
                assert (code, int(status)) == (example["value"]["code"], example["value"]["status"])
                codes.add(code)
        assert codes <= set(catalogue()), name
        if " /v1/" in name:
            common = {"unauthorized", "invalid_request", "internal_error", "database_unavailable"}
            assert common <= codes, name
        for noun in ("server", "image", "operation", "host", "clone"):
            if f"{{{noun}}}" in name:
                assert f"{noun}_not_found" in codes, name


def test_says_where_the_token_is_needed(document: dict[str, Any]) -> None:
    """In /v1 and for the metrics."""
    for name, operation in operations(document):
        guarded = name.split()[1].startswith(GUARDED)
        assert guarded == bool(operation.get("security")), name


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    """No schema is referred to that is not there (problems are added by hand)."""
    schemas = document["components"]["schemas"]

    def references(node: Any) -> list[str]:
        if isinstance(node, dict):
            own = [node["$ref"]] if isinstance(node.get("$ref"), str) else []
            return own + [each for value in node.values() for each in references(value)]
        if isinstance(node, list):
            return [each for value in node for each in references(value)]
        return []

    names = {each.removeprefix("#/components/schemas/") for each in references(document)}
    assert "Problem" in names
    assert names <= set(schemas)


@pytest.mark.parametrize(
    ("shape", "example"),
    [
        (shapes.Host, examples.HOST),
        (shapes.Domain, examples.DOMAIN),
        (shapes.Server, examples.SERVER),
        (shapes.Forgotten, examples.FORGOTTEN),
        (shapes.Snapshot, examples.SNAPSHOT),
        (shapes.Image, examples.IMAGE),
        (shapes.Clone, examples.CLONE),
        (shapes.Schedule, examples.SCHEDULE),
        (shapes.Runs, examples.RUNS),
        (shapes.Operation, examples.OPERATION),
        (shapes.Operation, examples.RUNNING),
        (shapes.Operation, examples.DONE),
        (shapes.Operation, examples.CANCELLED),
        (shapes.Event, examples.EVENT),
        (shapes.Health, examples.HEALTH),
        (shapes.Health, examples.READINESS),
        (shapes.Health, examples.UNREADY),
        (shapes.ProblemKind, examples.PROBLEM_KIND),
    ],
)
def test_examples_are_true(shape: Any, example: dict[str, Any]) -> None:
    """Each example is what the API would answer, field for field."""
    assert example == shape.model_validate(example).model_dump(mode="json")
