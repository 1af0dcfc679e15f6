"""`triptych operation`: long work, while it goes on and after."""

from enum import StrEnum
from itertools import islice
from typing import Annotated

import typer

from triptych.cli.grammar import OperationId, Yes, command, group
from triptych.cli.render import between, duration, moment, plain, record, size, table
from triptych.cli.session import EXIT_FAILED, Session, session_of
from triptych.cli.wait import conclude, finish, watch
from triptych.types import ENDED, Operation, Page

NAME = "operation"
app = group("Operations: long work, to look at, watch, cancel and undo.")


class State(StrEnum):
    queued = "queued"
    running = "running"
    succeeded = "succeeded"
    failed = "failed"
    cancelled = "cancelled"


@command(app, "list", "triptych operation list", "triptych operation list --state running")
def list_operations(
    ctx: typer.Context,
    limit: Annotated[int, typer.Option(min=1, metavar="N", help="At most this many.")] = 50,
    state: Annotated[
        State | None, typer.Option(help="Only those in this state.", show_default=False)
    ] = None,
) -> None:
    """List operations in the API's order."""
    session = session_of(ctx)
    if state is None:
        found = session.client.operations.list(limit=limit)
    else:
        each = session.client.operations.each()
        found = Page(islice((one for one in each if one["state"] == state.value), limit))
    session.emit_list(found, lambda: _list(session, found), "No such operations.")


@command(app, "show", "triptych operation show op_7f3k")
def show(ctx: typer.Context, operation: OperationId) -> None:
    """Show an operation: its state, progress, result and who asked for it."""
    session = session_of(ctx)
    found = session.client.operations.get(operation)
    session.emit(found, lambda: _show(session, found))


@command(app, "watch", "triptych operation watch op_7f3k")
def watch_operation(ctx: typer.Context, operation: OperationId) -> None:
    """Watch an operation until it ends, then tell its outcome."""
    session = session_of(ctx)
    conclude(session, watch(session, session.client.operations.get(operation)))


@command(app, "cancel", "triptych operation cancel op_7f3k", long_work=True)
def cancel(ctx: typer.Context, operation: OperationId) -> None:
    """Cancel an operation: the server is left as it was, and no files remain."""
    session = session_of(ctx)
    session.client.operations.cancel(operation)
    found = session.client.operations.get(operation)
    if session.wait and found["state"] not in ENDED:
        found = watch(session, found)
    session.emit(found, lambda: session.say(_cancelled(found)))
    if session.wait and found["state"] != "cancelled":
        raise typer.Exit(EXIT_FAILED)


@command(app, "undo", "triptych operation undo op_7f3k --yes", long_work=True)
def undo(ctx: typer.Context, operation: OperationId, yes: Yes = False) -> None:
    """Take a revert or restore back, while what it replaced is still set aside."""
    session = session_of(ctx)
    session.confirm(
        lambda: f"Undo {operation}? What was written since is replaced by the state before it.",
        yes,
    )
    finish(session, session.client.operations.undo(operation))


def _cancelled(operation: Operation) -> str:
    name, state = operation["id"], operation["state"]
    if state == "cancelled":
        return f"Operation {name} is cancelled."
    if state in ENDED:
        return f"Operation {name} had already {state} before it could be cancelled."
    return f"Operation {name} is asked to stop; it is {state}."


def _list(session: Session, operations: Page[Operation]) -> None:
    table(
        session.out,
        ["id", "kind", "server", "state", "progress", "created", "by", "waiting"],
        [
            [
                each["id"],
                plain("kind", each.get("kind")),
                plain("server", each.get("server")),
                each["state"],
                f"{each.get('progress') or 0:.0f} %",
                moment(each.get("created_at")),
                plain("requested_by", each.get("requested_by")),
                each.get("waiting") or "",
            ]
            for each in operations
        ],
    )


def _show(session: Session, operation: Operation) -> None:
    error = operation.get("error") or {}
    took = between(operation.get("started_at"), operation.get("finished_at"))
    total = operation.get("bytes_total")
    done = f", {size(operation.get('bytes_done') or 0)} of {size(total)}" if total else ""
    rows = [
        ("id", operation["id"]),
        ("kind", plain("kind", operation.get("kind"))),
        ("server", plain("server", operation.get("server"))),
        ("host", plain("host", operation.get("host"))),
        ("state", operation["state"]),
        ("phase", plain("phase", operation.get("phase"))),
        ("progress", f"{operation.get('progress') or 0:.0f} %{done}"),
        ("requested by", plain("requested_by", operation.get("requested_by"))),
        ("created", moment(operation.get("created_at"))),
        ("started", moment(operation.get("started_at"))),
        ("finished", moment(operation.get("finished_at"))),
        ("took", "–" if took is None else duration(took)),
        ("attempt", plain("attempt", operation.get("attempt"))),
        ("result", plain("result", operation.get("result"))),
    ]
    if waiting := operation.get("waiting"):
        rows.append(("waiting", waiting))
    if error:
        rows.append(("error", f"{error.get('code')}: {error.get('message')}"))
    if until := operation.get("undo_until"):
        rows.append(("undo until", f"{moment(until)}: triptych operation undo {operation['id']}"))
    record(session.out, rows)
