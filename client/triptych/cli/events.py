"""`triptych events`: what happened, and what happens as it does."""

from collections.abc import Sequence
from typing import Annotated

import typer

from triptych.cli.grammar import command
from triptych.cli.render import moment, plain
from triptych.cli.session import EXIT_INTERRUPTED, Session, print_json, session_of
from triptych.types import Event


def register(app: typer.Typer) -> None:
    command(app, "events", "triptych events", "triptych events --follow --json | jq .type")(events)


def events(
    ctx: typer.Context,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on printing events as they happen.")
    ] = False,
    since: Annotated[
        str | None,
        typer.Option("--since", metavar="EVENT_ID", help="With --follow, begin after this event."),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, metavar="N", help="At most this many.")] = 50,
) -> None:
    """Print the last events, newest at the end; with --follow, those to come (one a line)."""
    session = session_of(ctx)
    if not follow:
        found = session.client.events.list(limit=limit)
        session.emit_list(found, lambda: _say_all(session, found[::-1]), "No events yet.")
        return
    try:
        for event in session.client.follow(since):
            if session.as_json:
                print_json(event, line=True)
            else:
                _say_all(session, [event])
    except KeyboardInterrupt:
        raise typer.Exit(EXIT_INTERRUPTED) from None


def _say_all(session: Session, events: Sequence[Event]) -> None:
    for event in events:
        data = event.get("data")
        parts = [
            moment(event.get("time")),
            str(event.get("type") or "–"),
            str(event.get("subject") or ""),
            plain("data", data) if data else "",
        ]
        session.say("  ".join(part for part in parts if part))
