"""Servers without an image as new as their schedules promise: listed, paged, measured."""

from datetime import timedelta
from typing import Any

import pytest
from api_world import World
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import select

from services.api.protection import PERIOD, TOLERANCE, unprotected
from shared.database import engine, now, reading
from shared.models import Image, Schedule, Server

HOUR = timedelta(hours=1)
DAY = timedelta(days=1)
DAILY = DAY + 6 * HOUR + 2 * HOUR
"""What a daily schedule promises, with its default catch-up window."""


@pytest.fixture(autouse=True)
def _each_database(any_database: str) -> None:
    """Every test here runs on both."""


def scheduled(world: World, server: Server, kind: str = "daily", **fields: Any) -> Schedule:
    given = {
        "at": "03:00",
        "timezone": "UTC",
        "keep": 7,
        "catch_up_s": 6 * 3600 if kind == "daily" else 24 * 3600,
        "created_at": now() - 100 * DAY,
        **fields,
    }
    return world.add(Schedule(server_id=server.id, kind=kind, **given))


def imaged(world: World, server: Server, age: timedelta, **fields: Any) -> Image:
    return world.image(server, f"i{age.total_seconds()}", created_at=now() - age, **fields)


def listed(api: TestClient, **asked: Any) -> list[str]:
    response = api.get("/v1/servers", params={"unprotected": "true", **asked})
    assert response.status_code == 200, response.text
    return [each["name"] for each in response.json()["items"]]


def test_a_server_that_never_got_its_image(api: TestClient, world: World, server: Server) -> None:
    """Its schedule has had its time."""
    scheduled(world, server)
    assert listed(api) == ["web-1"]


def test_promised_nothing(api: TestClient, world: World, server: Server) -> None:
    """A server without a schedule, or whose schedule rests, is not listed, however old its image
    is; nor is a forgotten one."""
    imaged(world, server, 400 * DAY)
    scheduled(world, world.server("resting"), enabled=False)
    scheduled(world, world.server("forgotten", forgotten_at=now()))
    assert listed(api) == []


@pytest.mark.parametrize(
    ("age", "lacks"),
    [(DAILY - timedelta(minutes=1), []), (DAILY + timedelta(minutes=1), ["web-1"])],
)
def test_the_promise_of_a_daily_schedule(
    api: TestClient, world: World, server: Server, age: timedelta, lacks: list[str]
) -> None:
    """A day, the catch-up window, and two hours for the work: to the minute."""
    scheduled(world, server)
    imaged(world, server, age)
    assert listed(api) == lacks


def test_the_promise_of_a_weekly_schedule(api: TestClient, world: World, server: Server) -> None:
    """Eight days and two hours; where there is a daily one as well, that promises more."""
    scheduled(world, server, "weekly", weekday="sun")
    imaged(world, server, 8 * DAY + HOUR)
    assert listed(api) == []
    scheduled(world, server)
    assert listed(api) == ["web-1"]


def test_a_wider_window_promises_less(api: TestClient, world: World, server: Server) -> None:
    """The schedule's own catch-up window counts."""
    scheduled(world, server, catch_up_s=48 * 3600)
    imaged(world, server, 3 * DAY + HOUR)
    assert listed(api) == []


def test_a_schedule_that_was_just_set(api: TestClient, world: World, server: Server) -> None:
    """Has as long to keep its promise as it promises."""
    scheduled(world, server, created_at=now() - DAILY + timedelta(minutes=1))
    assert listed(api) == []
    scheduled(world, world.server("older"), created_at=now() - DAILY - timedelta(minutes=1))
    assert listed(api) == ["older"]


@pytest.mark.parametrize(
    ("fields", "lacks"),
    [
        ({"origin": "manual"}, []),
        ({"origin": "promoted", "pinned": True}, []),
        ({"state": "damaged"}, ["web-1"]),
        ({"state": "missing"}, ["web-1"]),
        ({"deleted_at": now()}, ["web-1"]),
    ],
)
def test_good_images(
    api: TestClient, world: World, server: Server, fields: dict[str, Any], lacks: list[str]
) -> None:
    """Any whole image of the server, by whom ever it was made."""
    scheduled(world, server)
    imaged(world, server, HOUR, **fields)
    assert listed(api) == lacks


def test_required_to_be_verified(api: TestClient, world: World, server: Server) -> None:
    """A schedule that requires it promises a verified one."""
    scheduled(world, server, require="verified")
    imaged(world, server, HOUR)
    assert listed(api) == ["web-1"]
    imaged(world, server, 20 * HOUR, verified_result="passed")
    assert listed(api) == []


def test_paged_like_the_rest(api: TestClient, world: World) -> None:
    """Three pages of two, each with the cursor of the next; the protected ones are not among
    them, and are what `false` lists."""
    names = [f"web-{number}" for number in range(5)]
    for name in names:
        scheduled(world, world.server(name))
        fine = world.server(f"fine-{name}")
        scheduled(world, fine)
        imaged(world, fine, HOUR)
    found, pages, after = [], 0, None
    while pages == 0 or after:
        asked = {"unprotected": "true", "limit": 2, **({"after": after} if after else {})}
        page = api.get("/v1/servers", params=asked).json()
        found += [each["name"] for each in page["items"]]
        pages, after = pages + 1, page["next"]
    assert (found, pages) == (names, 3)
    assert listed(api, unprotected="false") == [f"fine-{name}" for name in names]


def test_as_metric(api: TestClient, world: World, server: Server) -> None:
    """1 for each server that lacks it, 0 for the others: their sum is how many."""
    scheduled(world, server)
    world.server("fine")
    families = text_string_to_metric_families(api.get("/metrics").text)
    (family,) = [each for each in families if each.name == "triptych_server_unprotected"]
    found = {each.labels["server"]: each.value for each in family.samples}
    assert found == {"web-1": 1, "fine": 0}


def test_found_by_index(api: TestClient, statements: list[str], any_database: str) -> None:
    """On SQLite, which says it: of each server one look into the schedules, and of each of these
    one into the images."""
    if any_database != "sqlite":
        return
    listed(api)
    (query,) = [each for each in statements if "schedule" in each]
    with engine().connect() as connection:
        given = (None,) * query.count("?")
        plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {query}", given)
        steps = [step.detail for step in plan]
    assert any("image_whole (server_id=? AND created_at>?)" in each for each in steps), steps
    assert not [each for each in steps if each.startswith(("SCAN schedule", "SCAN image"))]


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    schedules=st.lists(
        st.tuples(
            st.sampled_from(["daily", "weekly"]),
            st.booleans(),
            st.sampled_from([60, 6 * 3600, 7 * 86400]),
            st.sampled_from(["complete", "verified"]),
            st.integers(0, 500),
        ),
        max_size=2,
        unique_by=lambda each: each[0],
    ),
    images=st.lists(
        st.tuples(st.integers(0, 500), st.sampled_from(["complete", "damaged"]), st.booleans()),
        max_size=4,
        unique_by=lambda each: each[0],
    ),
)
def test_agrees_with_the_definition(world: World, schedules: list[Any], images: list[Any]) -> None:
    """Whatever a server's schedules and images are; computed once more in Python, with ages in
    hours, half an hour away from any bound."""
    moment = now()
    server = world.server("any")
    half = HOUR / 2
    for kind, enabled, catch_up, require, set_ago in schedules:
        scheduled(
            world,
            server,
            kind,
            enabled=enabled,
            catch_up_s=catch_up,
            require=require,
            created_at=moment - set_ago * HOUR - half,
        )
    for age, state, passed in images:
        world.image(
            server,
            f"i{age}",
            created_at=moment - age * HOUR - half,
            state=state,
            verified_result="passed" if passed else None,
        )

    def broken(kind: str, enabled: bool, catch_up: int, require: str, set_ago: int) -> bool:
        allowed = PERIOD[kind] + timedelta(seconds=catch_up) + TOLERANCE
        good = [
            age
            for age, state, passed in images
            if state == "complete" and (passed or require == "complete")
        ]
        due = set_ago * HOUR + half >= allowed
        return enabled and due and not any(age * HOUR + half < allowed for age in good)

    with reading() as session:
        query = select(Server.id).where(unprotected(moment), Server.id == server.id)  # type: ignore[call-overload]
        found = session.scalars(query).all()
    assert bool(found) == any(broken(*each) for each in schedules)
