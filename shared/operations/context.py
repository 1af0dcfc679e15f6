"""What a handler is given: its phase, progress, journal and the word to stop.

A handler does the work and returns an Outcome; the runner commits it. Until then every
error, cancellation or crash is undone from the journal.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any, TypeVar

import structlog
from sqlalchemy import update
from sqlmodel import Session

from shared import errors, faults
from shared.database import from_now, transaction
from shared.models import Operation
from shared.operations import journal
from shared.operations.claim import STALLED, held
from shared.operations.patience import patiently
from shared.settings import settings
from shared.turns import side_by_side

log = structlog.get_logger()

Result = TypeVar("Result")
_unit: ContextVar[str | None] = ContextVar("unit", default=None)
"""The unit of its operation that what runs here is part of."""


@dataclass
class Outcome:
    """What a handler achieved; applied in one transaction, the point of no return."""

    result: dict[str, Any]
    apply: Callable[[Session], list[journal.Step] | None] = lambda session: None
    """Changes rows, in the same transaction that commits the operation. What it returns
    remains to be done to the world; redone after a crash until it is done."""
    undo: dict[str, Any] | None = None
    undo_until: datetime | None = None


class Context:
    """One attempt at one operation, by this process."""

    def __init__(self, operation: Operation, owner: str) -> None:
        self.operation = operation
        self.owner = owner
        self._stop = threading.Event()
        self._cancel = threading.Event()
        self._lost = threading.Event()
        self._changed = threading.Event()
        self._progress: dict[str, Any] = {}
        self._parts: dict[str, tuple[int, int]] = {}
        self._counting = threading.Lock()
        self.units = 1
        """How many units there will be, for the progress of them all."""
        self.leftovers: list[str] = []
        """Units that could not be undone; what is left to do once committed."""

    # What handlers call

    @property
    def id(self) -> str:
        return self.operation.id

    def phase(self, name: str) -> None:
        """Say what happens now; also a point at which a cancel takes effect."""
        self.check()
        self._progress["phase"] = name
        self._changed.set()

    def progress(self, done: int, total: int) -> None:
        """Report bytes; cheap, written to the row at most a few times a second.

        In a unit, of its own bytes: they are added up.
        """
        unit = _unit.get()
        with self._counting:
            if unit is not None:
                self._parts[unit] = done, total
            parts = [(done, total)] if unit is None else list(self._parts.values())
            percent = sum(min(100, d * 100 // t) for d, t in parts if t)
            self._progress.update(
                bytes_done=sum(d for d, _ in parts),
                bytes_total=sum(t for _, t in parts),
                progress=percent if unit is None else percent // max(self.units, len(parts)),
            )
        self._changed.set()

    def stopping(self) -> bool:
        """For long copies to poll: must the work stop?"""
        return self._cancel.is_set() or self._lost.is_set()

    def check(self) -> None:
        """Raises Cancelled or LeaseLost when the work must stop."""
        self.check_lease()
        if self._cancel.is_set():
            raise errors.Cancelled("Cancelled on request; everything is as it was before.")

    def check_lease(self) -> None:
        """Raises LeaseLost when the operation is another's, whatever else went wrong."""
        if self._lost.is_set():
            raise errors.LeaseLost(f"Operation {self.id} was taken over by another worker.")

    @contextmanager
    def unit(self, name: str) -> Iterator[None]:
        """A part that can fail on its own: on an error its steps, and no others, are undone.

        Its steps are those that are written down in the block, by the thread that runs it; no
        other unit of the operation has its name. Where to undo them fails too, the error that
        began it is raised, and they are undone when the operation ends, well or not.
        """
        within = _unit.set(name)
        try:
            yield
        except errors.LeaseLost:
            self._lost.set()
            raise
        except errors.Cancelled:
            raise  # the operation is, and is undone as a whole
        except Exception:
            try:
                journal.play(self.id, self.owner, "undo", unit=name)
            except errors.LeaseLost:
                self._lost.set()
                raise
            except Exception:
                log.exception("unit.not_cleared_up", operation=self.id)
                self.leftovers.append(name)
            raise
        finally:
            _unit.reset(within)

    def side_by_side(
        self, units: Mapping[str, Callable[[], Result]], at_once: int
    ) -> dict[str, Result | Exception]:
        """Carry out units by their names, begun in their order and at most `at_once` at a time:
        what each returned, or the error that it ended with and was undone for.

        Raises LeaseLost or Cancelled, once all of them have stopped.
        """
        self.units = len(units)

        def carry_out(name: str, work: Callable[[], Result]) -> Result:
            with self.unit(name):
                self.check()
                return work()

        works = [partial(carry_out, *each) for each in units.items()]
        outcomes = side_by_side(works, at_once, interrupted=self._lost.set)
        self.check()
        return dict(zip(units, outcomes, strict=True))

    def undo(self, action: str, /, **arguments: Any) -> None:
        """Write down, before a step, what undoes it. Waits for a database that is away."""
        self.undo_all((action, arguments))

    def undo_all(self, *steps: journal.Step, durable: bool = True) -> None:
        """Write down several at once; the last is undone first. They need not be `durable` where
        a power cut undoes the steps themselves, as it does all that holds a guest."""
        self.check()

        def write() -> None:
            with transaction(durable=durable) as session:
                held(session, self.id, self.owner)
                for action, arguments in steps:
                    journal.write(session, self.id, "undo", action, _unit.get(), **arguments)

        patiently(self.check, write)
        for action, _ in steps:
            faults.point(f"journalled:{action}")

    def strike(self, *actions: str) -> None:
        """Take back what `undo` wrote down for steps that are over."""

        def delete() -> None:
            with transaction(durable=False) as session:
                held(session, self.id, self.owner)
                journal.strike(session, self.id, *actions, unit=_unit.get())

        patiently(self.check, delete)

    # The heartbeat

    def __enter__(self) -> "Context":
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._changed.set()
        self._thread.join()

    def _beat(self) -> None:
        last_renewal = time.monotonic()
        while not self._stop.wait(0.25):  # what ends sooner than that needs no heartbeat
            self._changed.wait(0.5)
            self._changed.clear()
            if self._stop.is_set():
                return
            try:
                if self._renew():
                    last_renewal = time.monotonic()
                else:
                    self._lost.set()
                    return
            except Exception as error:
                log.warning("heartbeat.failed", operation=self.id, reason=str(error))
                # Nobody else takes it before: `claim.take_over` waits a lease longer.
                if time.monotonic() - last_renewal > settings().lease * STALLED:
                    self._lost.set()
                    return

    def latest(self) -> dict[str, Any]:
        """Phase and progress, by column."""
        return dict(self._progress)

    def _renew(self) -> bool:
        """Renew the lease, write progress, read the cancel flag. False when it is lost."""
        with transaction(durable=False) as session:
            renewed = session.execute(
                update(Operation)
                .where(
                    Operation.id == self.id,  # type: ignore[arg-type]
                    Operation.state == "running",  # type: ignore[arg-type]
                    Operation.owner == self.owner,  # type: ignore[arg-type]
                )
                .values(lease_expires_at=from_now(settings().lease), **self.latest())
                .returning(Operation.cancel_requested_at)  # type: ignore[call-overload]
            ).first()
        if renewed is None:
            return False
        if renewed[0] is not None:
            self._cancel.set()
        return True
