"""Schedules: per server one daily and one weekly (I3), which explain themselves (I6)."""

from difflib import get_close_matches
from functools import cache
from typing import Annotated, Any, Literal
from zoneinfo import ZoneInfoNotFoundError, available_timezones

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field, field_validator
from sqlalchemy import select
from sqlmodel import Session

from services.api import examples, shapes, waiting
from services.api.problems import FieldError, invalid, refusals
from services.api.work import NameOrId, RequestBody, settled
from shared import errors, events, lookups
from shared.database import now, reading, transaction
from shared.models import Operation, Schedule, ScheduleRun, Server
from shared.operations.cancel import cancel
from shared.rotation import due_next
from shared.runs import come, offset, plan, skip, unrecorded
from shared.slots import next_slot, upcoming

router = APIRouter(prefix="/servers/{server}/schedules/{kind}", tags=["schedules"])

Kind = Literal["daily", "weekly"]
HOUR = 3600
CATCH_UP = {"daily": 6 * HOUR, "weekly": 24 * HOUR}
KEPT_TOGETHER = 50
ABOUT = (errors.ServerNotFound, errors.AmbiguousName, errors.ScheduleNotFound)


@cache
def _zones() -> frozenset[str]:
    return frozenset(available_timezones() - {"localtime", "Factory"})


class Plan(RequestBody):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"at": "03:00", "timezone": "Europe/London", "keep": 7},
                {"at": "04:30", "timezone": "UTC", "weekday": "sun", "keep": 4},
            ]
        }
    )

    at: str = Field(pattern=r"^([01][0-9]|2[0-3]):[0-5][0-9]$", description="local time, `HH:MM`")
    timezone: str = Field(max_length=64, description="IANA name, e.g. `Europe/London`")
    weekday: Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"] | None = Field(
        None, description="required for weekly, refused for daily"
    )
    keep: int = Field(7, ge=1, le=50, description="daily and weekly together at most 50")
    require: Literal["complete", "verified"] = Field(
        "complete",
        description="verified: each image is read and checked once before it counts and older ones "
        "go; one that does not pass is not kept, and its run has failed",
    )
    enabled: bool = True
    catch_up: int | None = Field(
        None,
        ge=60,  # less, and beat's next tick would already be too late
        le=7 * 24 * HOUR,
        description="seconds a missed slot may be late and still run; 6 h daily, 24 h weekly",
    )

    @field_validator("timezone")
    @classmethod
    def _known(cls, value: str) -> str:
        if value in _zones():
            return value
        by_lower = {zone.lower(): zone for zone in _zones()}
        near = get_close_matches(value.lower(), by_lower, n=1, cutoff=0.6)
        hint = f" Did you mean {by_lower[near[0]]!r}?" if near else ""
        raise ValueError(
            f"there is no time zone {value!r}; give an IANA name such as 'Europe/London'.{hint}"
        )


class PutQuery(BaseModel):
    """Unknown parameters are refused: with a misspelt `dry_run` it would be set after all."""

    model_config = ConfigDict(extra="forbid")

    dry_run: bool = Field(False, description="answer as if it were set, and change nothing")


@router.put(
    "",
    summary="Set a schedule",
    responses=examples.shown(examples.SCHEDULE)
    | {
        201: {
            "description": "Created",
            "model": shapes.Schedule,
            "content": {"application/json": {"example": examples.SCHEDULE}},
        }
    }
    | refusals(errors.ServerNotFound, errors.AmbiguousName),
)
def put(
    request: Request,
    response: Response,
    server: NameOrId,
    kind: Kind,
    body: Plan,
    asked: Annotated[PutQuery, Query()],
) -> shapes.Schedule:
    """Sets the whole schedule: 201 when it is new, 200 when it replaces one.

    What is left out has its default. The images that the schedule made before stay in it. Where
    `keep` is lowered none goes at once: `goes_next` names those that do when the next run has
    succeeded. With `?dry_run=true` it does so (200) before anything is set.
    """
    _refuse_wrong_weekday(kind, body)
    if asked.dry_run:
        return _previewed(server, kind, body)
    made, is_new = settled(lambda session: _put(session, server, kind, body))
    request.app.state.relay.kick()
    if is_new:
        response.status_code = 201
        response.headers["Location"] = request.url.path
    return made


def _previewed(server: str, kind: Kind, body: Plan) -> shapes.Schedule:
    with transaction() as session:
        made, _ = _put(session, server, kind, body)
        session.rollback()
        return made


def _refuse_wrong_weekday(kind: Kind, body: Plan) -> None:
    if kind == "weekly" and body.weekday is None:
        message = "a weekly schedule needs a weekday, mon to sun"
    elif kind == "daily" and body.weekday is not None:
        message = "a daily schedule runs every day; leave the weekday out, or set the weekly one"
    else:
        return
    raise invalid([FieldError(field="weekday", message=message)])


def _put(session: Session, reference: str, kind: Kind, body: Plan) -> tuple[shapes.Schedule, bool]:
    row: Any = Schedule
    server = lookups.server(session, reference)
    # One at a time per server, so that two requests cannot exceed the sum together.
    session.get(Server, server.id, with_for_update=True)
    both = {
        each.kind: each
        for each in session.scalars(select(Schedule).where(row.server_id == server.id))
    }
    _refuse_too_many(both, kind, body.keep)
    schedule = both.get(kind)
    is_new = schedule is None
    timing = (body.at, body.weekday, body.timezone)
    if schedule is None:
        schedule = Schedule(
            server_id=server.id, kind=kind, at="", timezone="", keep=0, catch_up_s=0
        )
    before = (schedule.at, schedule.weekday, schedule.timezone)
    moment, planned = now(), schedule.next_run_at
    keeps_its_slot = planned is not None and body.enabled and before == timing
    if planned and planned <= moment and not keeps_its_slot:
        what = "changed" if body.enabled else "disabled"
        try:
            missed, _ = come(schedule, moment)
        except ZoneInfoNotFoundError:  # of the others nobody knows when they were
            missed = [planned]
        missed = unrecorded(session, schedule, missed)
        skip(session, schedule, missed, f"the schedule was {what} before this run began")
    schedule.at, schedule.weekday, schedule.timezone = timing
    schedule.keep, schedule.require, schedule.enabled = body.keep, body.require, body.enabled
    schedule.catch_up_s = CATCH_UP[kind] if body.catch_up is None else body.catch_up
    if not body.enabled:
        plan(schedule, None)
    elif keeps_its_slot:  # one that is due now would be lost else
        plan(schedule, planned)
    else:
        plan(schedule, next_slot(kind, body.at, body.weekday, body.timezone, moment))
    session.add(schedule)
    session.flush()
    shown = _shown(session, schedule)
    told = shown.model_dump(mode="json", exclude={"goes_next"})
    events.emit(session, "schedule.set", server.id, schedule=told)
    return shown, is_new


def _shown(session: Session, schedule: Schedule) -> shapes.Schedule:
    return shapes.Schedule.of(schedule, due_next(session, schedule))


def _refuse_too_many(both: dict[str, Schedule], kind: Kind, keep: int) -> None:
    for other in both.values():
        if other.kind != kind and other.keep + keep > KEPT_TOGETHER:
            left = KEPT_TOGETHER - other.keep
            room = f"this one may keep up to {left}" if left else "lower that first"
            message = (
                f"daily and weekly together keep at most {KEPT_TOGETHER} images; the {other.kind} "
                f"schedule keeps {other.keep}, so {room}"
            )
            raise invalid([FieldError(field="keep", message=message)])


@router.get(
    "",
    summary="Show a schedule",
    responses=examples.shown(examples.SCHEDULE) | refusals(*ABOUT),
)
def show(server: NameOrId, kind: Kind) -> shapes.Schedule:
    """The schedule, its next run, the images that go then, and how many runs in a row failed."""
    with reading() as session:
        return _shown(session, lookups.schedule(session, lookups.server(session, server), kind))


@router.delete("", status_code=204, summary="End a schedule", responses=refusals(*ABOUT))
def delete(request: Request, server: NameOrId, kind: Kind) -> None:
    """Ends the schedule and drops the record of its runs; the images it made stay.

    A run that has not begun is cancelled; one that is under way still makes its image.
    """
    settled(lambda session: _delete(session, server, kind))
    request.app.state.relay.kick()


def _delete(session: Session, reference: str, kind: Kind) -> None:
    server = lookups.server(session, reference)
    schedule = lookups.schedule(session, server, kind)
    run: Any = ScheduleRun
    work: Any = Operation
    queued = (
        select(work.id)
        .join(ScheduleRun, run.operation_id == work.id)
        .where(run.schedule_id == schedule.id, work.state == "queued")
        .with_for_update(skip_locked=True, of=Operation)  # a worker is just beginning that one
    )
    unbegun = list(session.scalars(queued))
    session.delete(schedule)
    session.flush()  # first, so that no run of it has failed by this
    for operation_id in unbegun:
        cancel(session, operation_id)
    events.emit(session, "schedule.ended", server.id, kind=kind)


@router.get(
    "/runs",
    summary="Explain a schedule",
    responses=examples.shown(examples.RUNS) | refusals(*ABOUT),
)
def runs(server: NameOrId, kind: Kind) -> shapes.Runs:
    """The next ten slots, and the last fifty with what became of each and why.

    A run that is `scheduled` among the last ones has its operation, which waits; the reason says
    for what, where that is known.
    """
    run: Any = ScheduleRun
    operation: Any = Operation
    with reading() as session:
        schedule = lookups.schedule(session, lookups.server(session, server), kind)
        query = (
            select(ScheduleRun, Operation)
            .outerjoin(Operation, operation.id == run.operation_id)
            .where(run.schedule_id == schedule.id)
            .order_by(run.slot.desc())
            .limit(50)
        )
        found = [(each, work) for each, work in session.execute(query)]
        works = waiting.shown(session, [work for _, work in found if work])
        reasons = {work.id: work.waiting for work in works}
        items = [
            shapes.Run.of(each, work, reasons[work.id] if work else None) for each, work in found
        ]
    return shapes.Runs(upcoming=_upcoming(schedule), items=items)


def _upcoming(schedule: Schedule) -> list[shapes.Run]:
    if not schedule.enabled:
        return []
    after, later = now(), offset(schedule)
    try:
        slots = upcoming(schedule.kind, schedule.at, schedule.weekday, schedule.timezone, after, 10)
    except ZoneInfoNotFoundError:
        reason = (
            f"The time zone {schedule.timezone!r} is not known any more to this installation, so "
            "no run can start. Set the schedule with another one, or bring back the zone's data."
        )
        slot = schedule.next_run_at or after
        return [shapes.Run(slot=slot, state="scheduled", reason=reason)]
    if schedule.next_run_at and schedule.next_run_at <= after:  # due, and not yet claimed
        slots = [schedule.next_run_at, *slots[:9]]
    return [shapes.Run(slot=slot, state="scheduled", start_at=slot + later) for slot in slots]
