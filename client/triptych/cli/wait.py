"""Waiting for an operation before the user's eyes, and leaving it with the right exit code.

A live bar on a terminal, a line per step elsewhere; both on stderr, so that stdout holds
the result alone.
"""

import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Protocol

import typer
from rich.console import RenderableType
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.text import Text

from triptych.cli.outcome import Outcome, tell
from triptych.cli.render import between, clean, duration, size
from triptych.cli.session import EXIT_FAILED, EXIT_INTERRUPTED, Session, print_json
from triptych.types import ENDED, Operation

QUIET = 30.0
"""Seconds after which a line is printed even if nothing changed."""


class Show(Protocol):
    def __call__(self, operation: Operation) -> None: ...


def finish(
    session: Session,
    operation: Operation,
    subject: str | None = None,
    *,
    needs_proof: bool = False,
) -> None:
    """What follows the start of long work: wait and tell, or with --no-wait the id alone."""
    if not session.wait:
        session.emit(operation, lambda: session.say(operation["id"]))
        return
    conclude(session, watch(session, operation), subject, needs_proof=needs_proof)


def watch(session: Session, operation: Operation) -> Operation:
    """Shows the operation until its end. Ctrl-C leaves it running and says so."""
    last = operation

    def remember(show: Show) -> Callable[[Operation], None]:
        def seen(current: Operation) -> None:
            nonlocal last
            last = current
            show(current)

        return seen

    try:
        if _live():
            with _bar(session) as bar:
                return session.client.wait(operation["id"], remember(_Bar(bar)))
        return session.client.wait(operation["id"], remember(_Lines(session)))
    except KeyboardInterrupt:
        if session.as_json:
            print_json(last)
        session.note(
            "\nNo longer waiting; the operation goes on.\n"
            f"  triptych operation watch {last['id']}   watches it again\n"
            f"  triptych operation cancel {last['id']}  stops it"
        )
        raise typer.Exit(EXIT_INTERRUPTED) from None


def conclude(
    session: Session,
    operation: Operation,
    subject: str | None = None,
    *,
    needs_proof: bool = False,
) -> None:
    """Tells the outcome; exits with 1 unless all of it succeeded.

    With `needs_proof`, a boot proof that did not run is no success either.
    """
    outcome = _outcome(session, operation, subject)
    if needs_proof and outcome.proof not in (None, "proven"):
        outcome = replace(outcome, good=False)
    if session.as_json:
        print_json(operation)
    elif outcome.good:
        session.say(outcome.text)
    else:
        session.note(outcome.text)
    if not outcome.good:
        raise typer.Exit(EXIT_FAILED)


def _outcome(session: Session, operation: Operation, subject: str | None) -> Outcome:
    name, state = operation["id"], operation["state"]
    if state == "succeeded":
        return tell(session.client, operation, subject)
    if state == "cancelled":
        return Outcome(f"Operation {name} was cancelled; {_what(operation)} did not happen.", False)
    if state == "failed":
        error = operation.get("error") or {}
        code, message = error.get("code", "failed"), error.get("message", "no reason was given")
        return Outcome(
            f"error: {code}: {message}\nLook at the operation: triptych operation show {name}",
            False,
        )
    return Outcome(f"Operation {name} is {state}.", True)


def _what(operation: Operation) -> str:
    return operation.get("kind") or "the work"


def _live() -> bool:
    return sys.stderr.isatty()


class _Progress(Progress):
    """The bar, and below it the reason why the operation waits."""

    reason = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.reason:
            yield Text(self.reason)


def _bar(session: Session) -> _Progress:
    return _Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=28),
        TextColumn("{task.fields[percent]:>5}", markup=False),
        TextColumn("{task.fields[bytes]}", markup=False),
        TextColumn("{task.fields[elapsed]}", markup=False),
        console=session.err,
        transient=True,
    )


class _Bar:
    """The live bar; it pulses until there is something to measure."""

    def __init__(self, progress: _Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("asking", total=None, percent="", bytes="", elapsed="")

    def __call__(self, operation: Operation) -> None:
        percent = operation.get("progress") or 0
        self._progress.reason = clean(operation.get("waiting") or "")
        self._progress.update(
            self._task,
            description=clean(_phase(operation)),
            total=100 if percent else None,
            completed=percent,
            percent=f"{percent:.0f} %" if percent else "",
            bytes=_bytes(operation),
            elapsed=_elapsed(operation),
        )


class _Lines:
    """A line when the phase changes, when it has to wait, at every ten per cent, and at times as
    a sign of life."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._step: tuple[str, bool, int] | None = None
        self._printed = 0.0

    def __call__(self, operation: Operation) -> None:
        percent = operation.get("progress") or 0
        waiting = operation.get("waiting") or ""
        step = (_phase(operation), bool(waiting), int(percent // 10))
        if step == self._step and time.monotonic() - self._printed < QUIET:
            return
        if operation["state"] in ENDED and self._step is not None:
            return
        self._step, self._printed = step, time.monotonic()
        share, took = f"{percent:.0f} %", _elapsed(operation)
        parts = [_phase(operation), share, _bytes(operation), took, waiting]
        self._session.note(f"{operation['id']}: " + ", ".join(part for part in parts if part))


def _phase(operation: Operation) -> str:
    state = operation["state"]
    return (operation.get("phase") or state) if state == "running" else state


def _bytes(operation: Operation) -> str:
    total = operation.get("bytes_total")
    return f"{size(operation.get('bytes_done') or 0)} of {size(total)}" if total else ""


def _elapsed(operation: Operation) -> str:
    seconds = between(operation.get("created_at"), operation.get("finished_at"))
    return "" if seconds is None else duration(seconds)
