"""What there is to say of a simulated year: images, slots without one and why, rules broken."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from typing import Any

from schedules.year import DAY, Year
from sqlalchemy import func, select

from shared.copying import vault
from shared.database import reading
from shared.models import Schedule, ScheduleRun

REASONS = {
    "missed while": "missed while beat, database or host were away",
    "past the window": "past the window when beat was back",
    "No worker": "not begun by its host in time",
}
_run: Any = ScheduleRun
_schedule: Any = Schedule


@dataclass
class Account:
    """Of one share of the servers, or of several: they can be added."""

    images: int = 0
    slots: int = 0
    runs: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    happened: Counter[str] = field(default_factory=Counter)
    duplicates: list[str] = field(default_factory=list)
    gaps: list[str] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)

    def __add__(self, other: Account) -> Account:
        return Account(*(getattr(self, name) + getattr(other, name) for name in vars(self)))

    def table(self) -> str:
        rows: list[tuple[str, int]] = [("slots owed", self.slots), ("images", self.images)]
        rows += [(f"runs {state}", count) for state, count in sorted(self.runs.items())]
        rows += [(f"  {reason}", count) for reason, count in self.skipped.most_common()]
        rows += [("duplicate slots", len(self.duplicates)), ("unexplained gaps", len(self.gaps))]
        rows += [("rule violations", len(self.violations))]
        rows += sorted(self.happened.items())
        return "\n".join(f"{name:<48}{count:>9,}" for name, count in rows)


def total(of: Iterable[Account]) -> Account:
    return reduce(add, of, Account())


def account(year: Year) -> Account:
    """To be asked for once the year is over."""
    made = Account(images=sum(year.made.values()), happened=year.happened)
    made.violations = year.violations + _left_over(year)
    made.duplicates = _duplicates(year)
    with reading() as session:
        for state, reason, count in session.execute(
            select(_run.state, _run.reason, func.count()).group_by(_run.state, _run.reason)
        ):
            made.runs[state] += count
            if state == "skipped":
                made.skipped[_short(reason)] += count
    made.slots, made.gaps = _gaps(year)
    return made


def _short(reason: str) -> str:
    return next((short for part, short in REASONS.items() if part in reason), reason)


def _duplicates(year: Year) -> list[str]:
    """Slots, or operations, that have made more than one image."""
    query = select(_run.schedule_id, _run.slot).group_by(_run.schedule_id, _run.slot)
    with reading() as session:
        twice = session.execute(query.having(func.count() > 1)).all()
    return [*map(str, twice), *(key for key, count in year.made.items() if count > 1)]


def _gaps(year: Year) -> tuple[int, list[str]]:
    """How many slots were promised, and those of which no run says what became of them."""
    owed, found = 0, []
    query = select(_schedule.server_id, _schedule.kind, _schedule.id)
    with reading() as session:
        for server_id, kind, schedule_id in session.execute(query).all():
            runs = session.execute(
                select(_run.slot, _run.first_slot, _run.state, _run.image_id, _run.reason).where(
                    _run.schedule_id == schedule_id
                )
            )
            told = [run for run in runs if _explains(*run[2:])]
            single = {slot for slot, *_ in told}
            ranges = [(first, last) for last, first, *_ in told if first]
            for promise in year.promises[server_id, kind]:
                for slot in promise.slots(year.end - DAY):
                    owed += 1
                    if slot not in single and not any(a <= slot <= b for a, b in ranges):
                        found.append(f"{kind} {slot} of {server_id}, {promise}")
    return owed, found


def _explains(state: str, image_id: str | None, reason: str | None) -> bool:
    return bool(image_id if state == "succeeded" else state in ("failed", "skipped") and reason)


def _left_over(year: Year) -> list[str]:
    """Folders in the vault that are no image, and images that have none."""
    found = []
    for server_id in year.ids:
        folder = vault().folder("image", server_id, "any").parent
        there = {each.name for each in folder.iterdir()} if folder.exists() else set()
        if there != set(year.alive[server_id]):
            found.append(f"{server_id}: {there ^ set(year.alive[server_id])} are not in both")
    return found
