"""`triptych schedule`: a server's daily and weekly images."""

from collections.abc import Callable
from typing import Annotated

import typer

from triptych.cli.grammar import Require, ScheduleKind, ServerName, Weekday, Yes, command, group
from triptych.cli.render import distance, duration, moment, plain, table
from triptych.cli.session import Session, print_json, session_of, usage
from triptych.problem import Problem
from triptych.types import GoingImage, Run, Runs, Schedule
from triptych.types import ScheduleKind as TypedKind

NAME = "schedule"
app = group("Schedules: images of a server every day or every week, the oldest going.")

Kind = Annotated[ScheduleKind, typer.Argument(metavar="KIND", help="daily or weekly.")]
MaybeKind = Annotated[
    ScheduleKind | None,
    typer.Argument(metavar="[KIND]", help="daily or weekly; both if left out."),
]


@command(
    app,
    "set",
    "triptych schedule set web1 daily --at 03:00 --timezone Europe/London --keep 7",
    "triptych schedule set web1 weekly --at 04:00 --weekday sun --keep 4",
    "triptych schedule set web1 daily --at 03:00 --keep 3 --dry-run",
)
def set_schedule(
    ctx: typer.Context,
    server: ServerName,
    kind: Kind,
    at: Annotated[str, typer.Option(metavar="HH:MM", help="Local time, 24 hours.")],
    timezone: Annotated[
        str, typer.Option(metavar="ZONE", help="Time zone of --at, by its IANA name.")
    ] = "UTC",
    keep: Annotated[
        int, typer.Option(min=1, max=50, metavar="N", help="How many images to keep, 1 to 50.")
    ] = 7,
    weekday: Annotated[
        Weekday | None, typer.Option(help="Day of a weekly schedule.", show_default=False)
    ] = None,
    catch_up: Annotated[
        int | None,
        typer.Option(
            min=60,
            max=604800,
            metavar="SECONDS",
            help="How late a missed run may still start, in seconds.",
            show_default="6 h daily, 24 h weekly",
        ),
    ] = None,
    require: Annotated[
        Require,
        typer.Option(
            help="What an image must be before it counts and older ones go: complete, or also "
            "verified, for which it is read once more."
        ),
    ] = Require.complete,
    disable: Annotated[
        bool, typer.Option("--disable", help="Keep the schedule, but let it rest.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Only show what it would be and which images would go."),
    ] = False,
    yes: Yes = False,
) -> None:
    """Set a server's daily or weekly schedule; it replaces the one there was.

    Where it would keep fewer images, those that go with its next run are named and it asks first.
    """
    if kind is ScheduleKind.weekly and weekday is None:
        raise usage("weekday_missing", "A weekly schedule needs its day, e.g. --weekday sun.")
    if kind is ScheduleKind.daily and weekday is not None:
        raise usage("weekday_unfit", "A daily schedule has no --weekday; leave it out.")
    session = session_of(ctx)

    def put(dry_run: bool = False) -> Schedule:
        return session.client.schedules.set(
            server,
            kind.value,
            at=at,
            timezone=timezone,
            keep=keep,
            weekday=weekday.value if weekday else None,
            require="verified" if require is Require.verified else None,
            enabled=not disable,
            catch_up=catch_up,
            dry_run=dry_run,
        )

    if dry_run:
        found = put(dry_run=True)
        session.emit(found, lambda: session.say(f"Would be set: {_preview(found, server)}"))
        return
    if not yes and (more := _more_go(session, server, kind.value, keep, put)):
        question = f"Kept are {keep}, so {_images(more)} more with the next run: {_names(more)}."
        session.confirm(lambda: f"{question} Set it?", yes)
    found = put()
    session.emit(found, lambda: session.say(_sentence(found, server)))


@command(app, "show", "triptych schedule show web1")
def show(ctx: typer.Context, server: ServerName, kind: MaybeKind = None) -> None:
    """Show a server's schedules and when each runs next."""
    session = session_of(ctx)
    if kind:
        found = session.client.schedules.get(server, kind.value)
        session.emit(found, lambda: session.say(_sentence(found, server)))
        return
    schedules = session.client.schedules.list(server)
    session.emit_list(
        schedules,
        lambda: session.say("\n".join(_sentence(each, server) for each in schedules)),
        f"{server} has no schedules. Set one: triptych schedule set {server} daily --at 03:00",
    )


@command(app, "runs", "triptych schedule runs web1 daily")
def runs(ctx: typer.Context, server: ServerName, kind: MaybeKind = None) -> None:
    """Show the next runs and the last ones with their outcome."""
    session = session_of(ctx)
    kinds = [kind] if kind else _kinds(session, server)
    answers = {each.value: session.client.schedules.runs(server, each.value) for each in kinds}
    if session.as_json:
        print_json(answers[kind.value] if kind else answers)
    elif not answers:
        session.note(f"{server} has no schedules.")
    else:
        _show_runs(session, answers)


@command(app, "delete", "triptych schedule delete web1 weekly --yes")
def delete(ctx: typer.Context, server: ServerName, kind: Kind, yes: Yes = False) -> None:
    """Delete a schedule. The images it made stay."""
    session = session_of(ctx)
    session.confirm(lambda: f"Delete the {kind.value} schedule of {server}? Its images stay.", yes)
    session.client.schedules.delete(server, kind.value)
    session.emit(
        {"server": server, "kind": kind.value, "deleted": True},
        lambda: session.say(f"The {kind.value} schedule of {server} is deleted; images stay."),
    )


def _more_go(
    session: Session, server: str, kind: TypedKind, keep: int, put: Callable[..., Schedule]
) -> list[GoingImage]:
    """The images that go with the next run if fewer are kept, and else would not."""
    try:
        before = session.client.schedules.get(server, kind)
    except Problem as problem:
        if problem.status != 404:
            raise
        return []  # it is new, or the API says what is wrong when it is set
    if keep >= before["keep"]:
        return []
    known = {each["id"] for each in before.get("goes_next") or []}
    return [each for each in put(dry_run=True).get("goes_next") or [] if each["id"] not in known]


def _images(images: list[GoingImage]) -> str:
    return "1 image goes" if len(images) == 1 else f"{len(images)} images go"


def _names(images: list[GoingImage]) -> str:
    return ", ".join(f"{each['name']} ({moment(each['created_at'])})" for each in images)


def _preview(schedule: Schedule, server: str) -> str:
    going = schedule.get("goes_next") or []
    goes = f"{_images(going)}: {_names(going)}" if going else "no image goes"
    return f"{_sentence(schedule, server)} With the next run {goes}."


def _kinds(session: Session, server: str) -> list[ScheduleKind]:
    return [ScheduleKind(each["kind"]) for each in session.client.schedules.list(server)]


def _sentence(schedule: Schedule, server: str) -> str:
    day = f" on {schedule['weekday']}" if schedule.get("weekday") else ""
    zone = schedule.get("timezone")
    text = (
        f"{server} {schedule.get('kind')}{day} at {schedule.get('at')} {zone}, "
        f"keeping {schedule.get('keep')}"
    )
    if schedule.get("require") == "verified":
        text += " verified ones"
    if not schedule.get("enabled", True):
        return f"{text}: disabled."
    if next_run := schedule.get("next_run_at"):
        start = schedule.get("next_start_at") or next_run
        text += f"; next run {moment(next_run, zone)} ({distance(start)})"
        if start != next_run:
            text += f", starting {moment(start, zone)}"
    failures = schedule.get("failures_in_row") or 0
    return f"{text}; {failures} FAILED IN A ROW." if failures else f"{text}."


def _show_runs(session: Session, answers: dict[str, Runs]) -> None:
    rows: list[list[str]] = []
    for kind, answer in answers.items():
        upcoming = sorted(answer.get("upcoming") or [], key=_slot, reverse=True)
        past = sorted(answer.get("items") or [], key=_slot, reverse=True)
        for run in (*upcoming, *past):
            state = run.get("state") or "scheduled"
            remark = distance(_slot(run)) if state == "scheduled" else _remark(run)
            rows.append([kind, moment(_slot(run)), state, plain("image", run.get("image")), remark])
    table(session.out, ["schedule", "slot", "state", "image", "remark"], rows)


def _slot(run: Run) -> str:
    return run.get("slot") or ""


def _remark(run: Run) -> str:
    late = run.get("lateness_s") or 0
    parts = [run.get("reason") or "", f"{duration(late)} late" if late >= 60 else ""]
    return "; ".join(part for part in parts if part) or "–"
