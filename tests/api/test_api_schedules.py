"""Schedules: set, explained, ended."""

from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import pytest
from api_world import Refused, World
from fastapi.testclient import TestClient
from sqlalchemy import select

from shared.database import now, reading, transaction
from shared.models import Image, Schedule, ScheduleRun, Server

DAILY = "/v1/servers/web-1/schedules/daily"
WEEKLY = "/v1/servers/web-1/schedules/weekly"


def moment(text: str) -> datetime:
    return datetime.fromisoformat(text.replace("Z", "+00:00"))


def test_set_daily(api: TestClient, server: Server) -> None:
    """A new daily schedule is 201, has the documented defaults and its next run."""
    response = api.put(DAILY, json={"at": "03:00", "timezone": "Asia/Tokyo"})
    made = response.json()
    assert (response.status_code, response.headers["location"]) == (201, DAILY)
    next_run = moment(made.pop("next_run_at"))
    start = moment(made.pop("next_start_at"))
    assert made == {
        "kind": "daily",
        "at": "03:00",
        "weekday": None,
        "timezone": "Asia/Tokyo",
        "keep": 7,
        "require": "complete",
        "enabled": True,
        "catch_up": 6 * 3600,
        "failures_in_row": 0,
        "goes_next": [],
    }
    assert (next_run.hour, next_run.minute) == (18, 0)
    assert now() < next_run <= now() + timedelta(days=1)
    assert timedelta(0) <= start - next_run < timedelta(minutes=15)


def test_set_weekly(api: TestClient, server: Server) -> None:
    """A weekly one runs on its weekday, with a day to catch up."""
    body = {"at": "04:30", "timezone": "UTC", "weekday": "sun", "keep": 4}
    made = api.put(WEEKLY, json=body).json()
    next_run = moment(made["next_run_at"])
    assert (
        next_run.weekday(),
        next_run.hour,
        next_run.minute,
        made["catch_up"],
    ) == (6, 4, 30, 24 * 3600)
    assert made == api.get(WEEKLY).json()


def test_replace(api: TestClient, server: Server) -> None:
    """Setting again is 200 and replaces the whole: what is left out has its default."""
    api.put(DAILY, json={"at": "03:00", "timezone": "UTC", "keep": 9, "catch_up": 60})
    response = api.put(DAILY, json={"at": "04:00", "timezone": "UTC"})
    found = response.json()
    assert (
        response.status_code,
        found["at"],
        found["keep"],
        found["catch_up"],
    ) == (200, "04:00", 7, 6 * 3600)
    assert moment(found["next_run_at"]).hour == 4


def test_change_of_keep_does_not_lose_a_slot(api: TestClient, server: Server) -> None:
    """I5: a slot that is due and not yet claimed stays due when only `keep` changes."""
    body = {"at": "03:00", "timezone": "UTC"}
    api.put(DAILY, json=body)
    due = now().replace(microsecond=0) - timedelta(seconds=5)
    with transaction() as session:
        session.scalars(select(Schedule)).one().next_run_at = due
    assert due == moment(api.put(DAILY, json={**body, "keep": 3}).json()["next_run_at"])


@pytest.fixture
def kept(api: TestClient, world: World, server: Server) -> list[Image]:
    """Five images of a daily schedule that keeps five, oldest first."""
    api.put(DAILY, json={"at": "03:00", "timezone": "UTC", "keep": 5})
    with reading() as session:
        schedule = session.scalars(select(Schedule)).one()
    return [
        world.image(
            server,
            f"day-{number}",
            origin="daily",
            schedule_id=schedule.id,
            created_at=now() - timedelta(days=9 - number),
        )
        for number in range(5)
    ]


def names(answer: Any) -> list[str]:
    return [each["name"] for each in answer.json()["goes_next"]]


def test_what_goes_next(api: TestClient, kept: list[Image]) -> None:
    """The schedule says which image its next run will replace, and how big that is."""
    (going,) = api.get(DAILY).json()["goes_next"]
    assert (going["id"], going["name"], going["bytes"]) == (kept[0].id, "day-0", 1 << 30)
    assert moment(going["created_at"]) == kept[0].created_at


def test_dry_run(api: TestClient, world: World, kept: list[Image], any_database: str) -> None:
    """Keeping fewer: what would go is told, in the order in which it goes, and nothing is set, not
    even an event written; then it is set, and goes with the next run alone."""
    lower = {"at": "04:00", "timezone": "UTC", "keep": 2}
    before = api.get(DAILY).json()
    told = len(api.get("/v1/events", params={"limit": 200}).json()["items"])

    preview = api.put(DAILY, json=lower, params={"dry_run": "true"})
    assert (preview.status_code, preview.json()["keep"]) == (200, 2)
    assert moment(preview.json()["next_run_at"]).hour == 4
    assert names(preview) == ["day-0", "day-1", "day-2", "day-3"]
    assert before == api.get(DAILY).json()
    assert told == len(api.get("/v1/events", params={"limit": 200}).json()["items"])

    assert names(api.put(DAILY, json=lower)) == names(preview)
    assert len(api.get("/v1/servers/web-1/images").json()["items"]) == 5


def test_pinned_images_stay_in_the_preview(api: TestClient, kept: list[Image]) -> None:
    """What is pinned upon the preview is no longer in it."""
    api.patch(f"/v1/images/{kept[0].id}", json={"pinned": True})
    lower = {"at": "03:00", "timezone": "UTC", "keep": 3}
    preview = api.put(DAILY, json=lower, params={"dry_run": "true"})
    assert names(preview) == ["day-1", "day-2"]


def test_dry_run_of_a_new_schedule(api: TestClient, server: Server, refused: Refused) -> None:
    """It is 200, not 201, and there is no schedule afterwards; what is refused is refused."""
    body = {"at": "03:00", "timezone": "UTC"}
    response = api.put(DAILY, json=body, params={"dry_run": "true"})
    assert (response.status_code, "location" in response.headers) == (200, False)
    refused(api.get(DAILY), 404, "schedule_not_found")
    bad = api.put(DAILY, json={**body, "keep": 51}, params={"dry_run": "true"})
    refused(bad, 422, "invalid_request")


def test_misspelt_dry_run(api: TestClient, server: Server, refused: Refused) -> None:
    """Nothing is set for real because of a spelling mistake."""
    response = api.put(DAILY, json={"at": "03:00", "timezone": "UTC"}, params={"dryrun": "true"})
    refused(response, 422, "invalid_request")
    refused(api.get(DAILY), 404, "schedule_not_found")


def test_require(api: TestClient, server: Server) -> None:
    """Set, shown, and like every field back to its default when it is left out."""
    body = {"at": "03:00", "timezone": "UTC"}
    assert api.put(DAILY, json={**body, "require": "verified"}).json()["require"] == "verified"
    assert api.get(DAILY).json()["require"] == "verified"
    assert api.put(DAILY, json=body).json()["require"] == "complete"


def test_disable(api: TestClient, server: Server) -> None:
    """A disabled schedule has no next run, and one when it is enabled again."""
    body = {"at": "03:00", "timezone": "UTC"}
    off = api.put(DAILY, json={**body, "enabled": False}).json()
    assert (off["enabled"], off["next_run_at"]) == (False, None)
    assert api.get(f"{DAILY}/runs").json()["upcoming"] == []
    assert api.put(DAILY, json=body).json()["next_run_at"]


@pytest.mark.parametrize(
    ("kind", "change", "field"),
    [
        ("daily", {"keep": 0}, "keep"),
        ("daily", {"keep": 51}, "keep"),
        ("daily", {"keep": "7"}, "keep"),
        ("daily", {"at": "3:00"}, "at"),
        ("daily", {"at": "24:00"}, "at"),
        ("daily", {"at": "03:60"}, "at"),
        ("daily", {"at": "03:00:00"}, "at"),
        ("daily", {"at": "03:00\n"}, "at"),
        ("daily", {"at": None}, "at"),
        ("daily", {"timezone": "Mars/Olympus"}, "timezone"),
        ("daily", {"timezone": "../../etc/passwd"}, "timezone"),
        ("daily", {"timezone": ""}, "timezone"),
        ("daily", {"weekday": "mon"}, "weekday"),
        ("weekly", {}, "weekday"),
        ("weekly", {"weekday": "monday"}, "weekday"),
        ("daily", {"catch_up": -1}, "catch_up"),
        ("daily", {"catch_up": 10**9}, "catch_up"),
        ("daily", {"enabled": "yes"}, "enabled"),
        ("daily", {"require": "proven"}, "require"),
        ("daily", {"require": None}, "require"),
        ("daily", {"colour": "red"}, "colour"),
        ("hourly", {}, "kind"),
    ],
)
def test_bad_schedule(
    api: TestClient,
    server: Server,
    refused: Refused,
    kind: str,
    change: dict[str, Any],
    field: str,
) -> None:
    """Each bad field is refused by name, and no schedule is made."""
    body = {"at": "03:00", "timezone": "UTC", **change}
    response = api.put(f"/v1/servers/web-1/schedules/{kind}", json=body)
    problem = refused(response, 422, "invalid_request")
    assert [field] == [each["field"] for each in problem["errors"]]
    with reading() as session:
        assert session.scalars(select(Schedule)).first() is None


def test_misspelt_time_zone(api: TestClient, server: Server, refused: Refused) -> None:
    """An unknown zone is answered with the one that was probably meant."""
    response = api.put(DAILY, json={"at": "03:00", "timezone": "europe/londn"})
    problem = refused(response, 422, "invalid_request")
    assert "'europe/londn'" in problem["detail"]
    assert "Did you mean 'Europe/London'?" in problem["detail"]


def test_keep_together(api: TestClient, server: Server, refused: Refused) -> None:
    """I3: daily and weekly together keep at most 50; the refusal says how many are left."""
    daily = {"at": "03:00", "timezone": "UTC", "keep": 47}
    weekly = {"at": "04:00", "timezone": "UTC", "weekday": "sun"}
    assert api.put(DAILY, json=daily).status_code == 201
    problem = refused(api.put(WEEKLY, json={**weekly, "keep": 4}), 422, "invalid_request")
    assert "up to 3" in problem["detail"]
    assert api.put(WEEKLY, json={**weekly, "keep": 3}).status_code == 201
    assert api.put(DAILY, json=daily).status_code == 200
    refused(api.put(DAILY, json={**daily, "keep": 48}), 422, "invalid_request")


def test_full_schedule_leaves_no_room(api: TestClient, server: Server, refused: Refused) -> None:
    """With 50 kept by one, the other cannot be; and the sentence does not offer 0."""
    api.put(DAILY, json={"at": "03:00", "timezone": "UTC", "keep": 50})
    weekly = {"at": "04:00", "timezone": "UTC", "weekday": "sun", "keep": 1}
    problem = refused(api.put(WEEKLY, json=weekly), 422, "invalid_request")
    assert "lower that first" in problem["detail"]


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
def test_unknown_server(api: TestClient, refused: Refused, method: str) -> None:
    """No schedule on a server that is not registered."""
    body = {"at": "03:00", "timezone": "UTC"} if method == "PUT" else None
    refused(api.request(method, DAILY, json=body), 404, "server_not_found")


@pytest.mark.parametrize(("method", "path"), [("GET", ""), ("DELETE", ""), ("GET", "/runs")])
def test_no_schedule(
    api: TestClient, server: Server, refused: Refused, method: str, path: str
) -> None:
    """A schedule that was not set is 404."""
    refused(api.request(method, DAILY + path), 404, "schedule_not_found")


def test_end(api: TestClient, world: World, server: Server, refused: Refused) -> None:
    """Ending a schedule drops its runs and keeps its images."""
    api.put(DAILY, json={"at": "03:00", "timezone": "UTC"})
    with reading() as session:
        schedule = session.scalars(select(Schedule)).one()
    world.add(ScheduleRun(schedule_id=schedule.id, slot=now(), state="skipped"))
    image = world.image(server, origin="daily", schedule_id=schedule.id)
    assert api.delete(DAILY).status_code == 204
    refused(api.get(DAILY), 404, "schedule_not_found")
    assert api.get(f"/v1/images/{image.id}").status_code == 200
    with reading() as session:
        assert session.scalars(select(ScheduleRun)).first() is None


def test_runs(api: TestClient, world: World, server: Server) -> None:
    """I6: the next ten slots a day apart, and what became of the last ones, newest first."""
    api.put(DAILY, json={"at": "03:00", "timezone": "UTC"})
    with reading() as session:
        schedule = session.scalars(select(Schedule)).one()
    day = datetime(2026, 3, 1, 3, tzinfo=UTC)
    done = world.operation(
        server, state="succeeded", started_at=day + timedelta(seconds=1.5), finished_at=now()
    )
    running = world.operation(server, state="running", started_at=day + timedelta(days=2))
    for number, fields in enumerate(
        [
            {"state": "succeeded", "operation_id": done.id, "image_id": "img_1"},
            {"state": "skipped", "reason": "missed while Triptych was down"},
            {"state": "scheduled", "operation_id": running.id},
        ]
    ):
        slot = day + timedelta(days=number)
        world.add(ScheduleRun(schedule_id=schedule.id, slot=slot, **fields))
    found = api.get(f"{DAILY}/runs").json()
    slots = [moment(each["slot"]) for each in found["upcoming"]]
    assert len(slots) == 10
    assert {timedelta(days=1)} == {later - earlier for earlier, later in pairwise(slots)}
    assert {"scheduled"} == {each["state"] for each in found["upcoming"]}
    assert [
        (each["state"], each["image"], each["reason"], each["lateness_s"])
        for each in found["items"]
    ] == [
        ("running", None, None, 0.0),
        ("skipped", None, "missed while Triptych was down", None),
        ("succeeded", "img_1", None, 1.5),
    ]


def test_a_run_that_waits_says_for_what(api: TestClient, world: World, server: Server) -> None:
    """Its slot was taken and its operation is queued: it is scheduled, and says what is ahead."""
    api.put(DAILY, json={"at": "03:00", "timezone": "UTC"})
    with reading() as session:
        schedule = session.scalars(select(Schedule)).one()
    ahead = world.operation(server, "snapshot.take", state="running", owner="kvm-1/x/y")
    queued = world.operation(server)
    world.add(
        ScheduleRun(schedule_id=schedule.id, slot=now(), state="running", operation_id=queued.id)
    )
    (run,) = api.get(f"{DAILY}/runs").json()["items"]
    assert (run["state"], run["lateness_s"]) == ("scheduled", None)
    assert ahead.id in run["reason"]


def test_the_last_fifty(api: TestClient, world: World, server: Server) -> None:
    """However many there were, the newest fifty, newest first."""
    api.put(DAILY, json={"at": "03:00", "timezone": "UTC"})
    with reading() as session:
        schedule = session.scalars(select(Schedule)).one()
    day = datetime(2026, 3, 1, 3, tzinfo=UTC)
    for number in range(53):
        slot = day + timedelta(days=number)
        world.add(ScheduleRun(schedule_id=schedule.id, slot=slot, state="skipped", reason="down"))
    slots = [moment(each["slot"]) for each in api.get(f"{DAILY}/runs").json()["items"]]
    assert slots == [day + timedelta(days=number) for number in range(52, 2, -1)]


def test_a_slot_that_is_due_is_upcoming(api: TestClient, server: Server) -> None:
    """Between its instant and beat's tick, a slot is shown and not lost."""
    api.put(DAILY, json={"at": "03:00", "timezone": "UTC"})
    due = now().replace(microsecond=0) - timedelta(seconds=5)
    start = due + timedelta(minutes=10)
    with transaction() as session:
        schedule = session.scalars(select(Schedule)).one()
        schedule.next_run_at, schedule.start_at = due, start
    found = api.get(f"{DAILY}/runs").json()["upcoming"]
    assert (10, due) == (len(found), moment(found[0]["slot"]))
    starts = {moment(each["start_at"]) - moment(each["slot"]) for each in found}
    assert starts == {timedelta(minutes=10)}
