"""`triptych snapshot`: the one picture a server may have, kept 48 hours."""

from typing import Annotated

import typer

from triptych.cli.grammar import (
    Description,
    Quiesce,
    QuiesceOption,
    ServerName,
    Yes,
    command,
    group,
)
from triptych.cli.render import distance, moment, plain, record, size
from triptych.cli.session import Session, session_of
from triptych.cli.wait import finish
from triptych.types import Snapshot

NAME = "snapshot"
app = group("Snapshots: one per server, kept 48 hours, to go back to at any time.")


@command(
    app,
    "take",
    "triptych snapshot take web1",
    "triptych snapshot take web1 --replace --description 'before the upgrade'",
    long_work=True,
)
def take(
    ctx: typer.Context,
    server: ServerName,
    replace: Annotated[
        bool,
        typer.Option("--replace", help="Take the place of the present one once this is whole."),
    ] = False,
    with_memory: Annotated[
        bool,
        typer.Option("--with-memory", help="Also hold the RAM: a revert resumes that instant."),
    ] = False,
    quiesce: QuiesceOption = Quiesce.auto,
    description: Description = None,
) -> None:
    """Take a snapshot of a server, running or not."""
    session = session_of(ctx)
    operation = session.client.snapshots.take(
        server,
        replace=replace,
        with_memory=with_memory,
        quiesce=quiesce.value,
        description=description,
    )
    finish(session, operation, server)


@command(app, "show", "triptych snapshot show web1")
def show(ctx: typer.Context, server: ServerName) -> None:
    """Show a server's snapshot: when, how, and until when."""
    session = session_of(ctx)
    found = session.client.snapshots.get(server)
    session.emit(found, lambda: _show(session, found, server))


@command(app, "revert", "triptych snapshot revert web1 --yes", long_work=True)
def revert(
    ctx: typer.Context,
    server: ServerName,
    without_memory: Annotated[
        bool,
        typer.Option(
            "--without-memory", help="Boot from the disks although the snapshot holds the RAM."
        ),
    ] = False,
    yes: Yes = False,
) -> None:
    """Put a server back to its snapshot. The present state is set aside for 24 hours."""
    session = session_of(ctx)

    def question() -> str:
        taken = session.client.snapshots.get(server).get("taken_at", "")
        return (
            f"Revert {server} to its snapshot of {moment(taken)} ({distance(taken)})? All that "
            "was written since is replaced; it is set aside for 24 hours."
        )

    session.confirm(question, yes)
    finish(session, session.client.snapshots.revert(server, with_memory=not without_memory), server)


@command(app, "promote", "triptych snapshot promote web1 --name before-upgrade", long_work=True)
def promote(
    ctx: typer.Context,
    server: ServerName,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="The image's name.")] = None,
    description: Description = None,
    pin: Annotated[bool, typer.Option("--pin", help="Keep it from every rotation.")] = False,
) -> None:
    """Make an image of a server's snapshot, to keep it for good. The snapshot stays."""
    session = session_of(ctx)
    operation = session.client.snapshots.promote(
        server, name=name, description=description, pinned=pin or None
    )
    finish(session, operation, server)


@command(app, "delete", "triptych snapshot delete web1 --yes", long_work=True)
def delete(ctx: typer.Context, server: ServerName, yes: Yes = False) -> None:
    """Delete a server's snapshot. The server itself does not change."""
    session = session_of(ctx)
    session.confirm(lambda: f"Delete the snapshot of {server} for good?", yes)
    finish(session, session.client.snapshots.delete(server), server)


def _show(session: Session, snapshot: Snapshot, server: str) -> None:
    taken, expires = snapshot.get("taken_at", ""), snapshot.get("expires_at", "")
    pause = snapshot.get("pause_ms")
    record(
        session.out,
        [
            ("id", snapshot["id"]),
            ("server", server),
            ("taken", f"{moment(taken)} ({distance(taken)})"),
            ("expires", f"{moment(expires)} ({distance(expires)})"),
            ("size", size(snapshot.get("bytes"))),
            ("of its own", size(snapshot.get("unique_bytes"))),
            ("memory", plain("with_memory", snapshot.get("with_memory"))),
            ("consistency", plain("consistency", snapshot.get("consistency"))),
            ("way", plain("way", snapshot.get("way"))),
            ("pause", f"{pause:.0f} ms" if pause else "none"),
            ("description", plain("description", snapshot.get("description"))),
        ],
    )
