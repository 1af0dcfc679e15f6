"""`triptych farm`: the clones that were made by one command, as one."""

from typing import Annotated

import typer

from triptych.cli.grammar import Limit, Ttl, Yes, command, group
from triptych.cli.render import distance, moment, plain, record, table
from triptych.cli.session import Session, session_of, usage
from triptych.cli.wait import finish
from triptych.types import Farm

NAME = "farm"
app = group("Farms: the clones that one command made, started, stopped and ended as one.")

FarmName = Annotated[
    str,
    typer.Argument(
        metavar="FARM", help="The pattern of its clones' names, as in 'qa-{n:03}', or its id."
    ),
]


@command(app, "list")
def list_farms(ctx: typer.Context, limit: Limit = None) -> None:
    """List the farms, what became of their clones, and when each ends."""
    session = session_of(ctx)
    farms = session.client.farms.list(limit=limit)
    session.emit_list(
        farms,
        lambda: table(
            session.out,
            ["name", "clones", "power", "from", "created", "ends", "id"],
            [
                [
                    each["name"],
                    _counts(each.get("clones")),
                    _counts(each.get("power")),
                    _source(each),
                    moment(each.get("created_at")),
                    _end(each),
                    each["id"],
                ]
                for each in farms
            ],
        ),
        "No farms yet. Make one: triptych clone create SERVER --count 10 --name 'qa-{n:03}'",
    )


@command(app, "show", "triptych farm show 'qa-{n:03}'")
def show(ctx: typer.Context, farm: FarmName) -> None:
    """Show a farm: from what it was made, when it ends, and each clone."""
    session = session_of(ctx)
    found = session.client.farms.get(farm)
    session.emit(found, lambda: _show(session, found))


@command(app, "start", "triptych farm start 'qa-{n:03}'", long_work=True)
def start(ctx: typer.Context, farm: FarmName) -> None:
    """Start the clones that are off."""
    session = session_of(ctx)
    finish(session, session.client.farms.start(farm), farm)


@command(
    app,
    "stop",
    "triptych farm stop 'qa-{n:03}'",
    "triptych farm stop 'qa-{n:03}' --timeout 30 --force",
    long_work=True,
)
def stop(
    ctx: typer.Context,
    farm: FarmName,
    timeout: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="SECONDS", help="How long the guests may take.", show_default="120"
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Cut the power of those that are still on then.")
    ] = False,
) -> None:
    """Have all guests shut down, and wait for them."""
    session = session_of(ctx)
    finish(session, session.client.farms.stop(farm, timeout_s=timeout, force=force), farm)


@command(app, "retry", "triptych farm retry 'qa-{n:03}'", long_work=True)
def retry(ctx: typer.Context, farm: FarmName) -> None:
    """Make the clones that failed again, and no others, from the same source."""
    session = session_of(ctx)
    finish(session, session.client.farms.retry(farm), farm)


@command(app, "delete", "triptych farm delete 'qa-{n:03}' --yes", long_work=True)
def delete(ctx: typer.Context, farm: FarmName, yes: Yes = False) -> None:
    """Delete a farm: its VMs, the files that were made for them, and their snapshots."""
    session = session_of(ctx)

    def question() -> str:
        found = session.client.farms.get(farm)
        ready = (found.get("clones") or {}).get("ready", 0)
        return f"Delete farm {found['name']} for good, {ready} VMs with their disks? Images stay."

    session.confirm(question, yes)
    finish(session, session.client.farms.delete(farm), farm)


@command(
    app,
    "extend",
    "triptych farm extend 'qa-{n:03}' --ttl 8h",
    "triptych farm extend 'qa-{n:03}' --never",
)
def extend(
    ctx: typer.Context,
    farm: FarmName,
    ttl: Ttl = None,
    never: Annotated[
        bool, typer.Option("--never", help="It lives until somebody deletes it.")
    ] = False,
) -> None:
    """Let a farm end so long from now, be that later or sooner than it would, or never."""
    if (ttl is None) != never:
        raise usage("ttl_missing", "Say how long it lives from now (--ttl 8h), or --never.")
    session = session_of(ctx)
    found = session.client.farms.extend(farm, ttl)
    session.emit(found, lambda: session.say(f"Farm {found['name']} ends: {_end(found)}."))


def _source(farm: Farm) -> str:
    source = farm.get("source") or {}
    return f"{source.get('kind', '')} {source.get('id', '')}".strip() or "–"


def _counts(counts: dict[str, int] | None) -> str:
    return ", ".join(f"{count} {state}" for state, count in (counts or {}).items()) or "–"


def _end(farm: Farm) -> str:
    if end := farm.get("expires_at"):
        return f"{moment(end)} ({distance(end)})"
    if hours := farm.get("expires_in_h"):
        return f"{hours:g} h after it is made"
    return "never by itself"


def _show(session: Session, farm: Farm) -> None:
    record(
        session.out,
        [
            ("name", farm["name"]),
            ("id", farm["id"]),
            ("host", plain("host", farm.get("host"))),
            ("from", _source(farm)),
            ("created", moment(farm.get("created_at"))),
            ("ends", _end(farm)),
            ("clones", _counts(farm.get("clones"))),
            ("power", _counts(farm.get("power"))),
        ],
    )
    session.say("")
    rows = [
        [
            each["name"],
            each["state"],
            plain("server", each.get("server")),
            _error(each.get("error")),
        ]
        for each in farm.get("items") or []
    ]
    table(session.out, ["clone", "state", "server", "error"], rows)


def _error(error: dict[str, str] | None) -> str:
    return f"{error.get('code')}: {error.get('message')}" if error else "–"
