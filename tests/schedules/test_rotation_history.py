"""Rotation over every history that a schedule can have: what must never happen does not (I4)."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from operations.spine import World
from schedules.rotating import Disk, site
from sqlalchemy.event import listen

from shared.database import engine, reading
from shared.models import Image, Schedule
from shared.rotation import due_next

HOURS = st.sampled_from([24, 24, 24, 0.01, -50])
DEATHS = st.sampled_from([None, None, None, "committing", "committed", "redo:remove_copy:done"])
ANY = st.integers(0, 9)


class History(RuleBasedStateMachine):
    """The owner, the disk and the workers do what they like; the daily schedule is looked at.

    `floor` is how many good images there must be: each run that succeeds adds one, up to `keep`,
    and no run takes one away. Only what an owner deletes, pins or asks for, and what is found
    damaged, lowers it, to what that leaves.
    """

    def __init__(self, world: World, disk: Disk) -> None:
        super().__init__()
        self.past = site(world, disk)
        self.floor = 0
        disk.removing = self.removed
        self.by_run = False
        """Whether what is removed now is removed by a schedule's run."""

    # What counts

    def good(self, schedule: Schedule | None = None) -> list[Image]:
        """What the schedule counts, the oldest first."""
        strict = (schedule or self.past.schedule()).require == "verified"
        return [
            image
            for image in self.past.there("daily")
            if image.state == "complete"
            and not image.pinned
            and (image.verified_result == "passed" or not strict)
        ]

    def lowered(self) -> None:
        self.floor = min(self.floor, len(self.good()))

    def removed(self, folder: Path) -> None:
        """A moment like any other: what is about to go may go, for the others are there."""
        if self.by_run:
            assert folder.name not in self.past.ids()
            self.as_many_as_were_promised()

    @invariant()
    def as_many_as_were_promised(self) -> None:
        on_disk = [each for each in self.good() if self.past.folder(each.id).is_dir()]
        assert len(on_disk) >= self.floor

    # A schedule's run

    @rule(hours=HOURS, dies_at=DEATHS, used=ANY, rotten=st.sampled_from([False, False, True]))
    def daily_run(self, hours: float, dies_at: str | None, used: int, rotten: bool) -> None:
        """One that has its copy, perhaps of a disk that is rotten; the worker may die, and an
        image of the server may be wanted by somebody who waits in its line."""
        past, schedule, before = self.past, self.past.schedule(), self.past.there()
        usable = [each.id for each in before if each.state == "complete"]
        wanted = usable[used] if used < len(usable) else None
        operation = past.asked_for("daily")
        waiting = past.restore_is_asked_for(wanted) if wanted else None
        with reading() as session:
            foreseen = {each.id for each in due_next(session, schedule)}

        past.moved(hours)
        past.disk.outcome, past.disk.dies_at = "rotten" if rotten else "sound", dies_at
        self.by_run = True
        made = past.end(operation)
        self.by_run, past.disk.dies_at = False, None
        if waiting:
            past.cancel(waiting)

        gone = [each for each in before if each.id not in past.ids()]
        assert (made is None) == (rotten and schedule.require == "verified")
        if made is None:
            assert gone == []
            return
        self.floor = min(schedule.keep, self.floor + 1)
        assert {each.id for each in gone} == foreseen, "what was foreseen, and no other"
        self.check_none_had_to_stay(schedule, before, gone, wanted)
        good = [each.id for each in self.good(schedule)]
        assert made in good, "the newest good one is there"
        assert len({*good} - {made, wanted}) <= schedule.keep, "others than those go"

    def check_none_had_to_stay(
        self, schedule: Schedule, before: list[Image], gone: list[Image], wanted: str | None
    ) -> None:
        for each in gone:
            assert each.schedule_id == schedule.id, "of others none"
            assert each.state == "complete"
            assert not each.pinned
            assert each.id != wanted
        own = [each for each in before if each.schedule_id == schedule.id]
        passed = [
            each for each in own if each.state == "complete" and each.verified_result == "passed"
        ]
        if passed and schedule.require != "verified":  # else the new one is the newest verified
            assert passed[-1] not in gone

    @rule()
    def run_without_a_copy(self) -> None:
        """The disk could not be read: nothing changes."""
        before = self.past.ids()
        self.past.disk.outcome = "failed"
        assert self.past.run() is None
        assert before == self.past.ids()

    @rule()
    def weekly_run(self) -> None:
        """The other schedule's images are its own."""
        before = self.past.ids("daily")
        self.past.disk.outcome = "sound"
        self.past.run("weekly")
        assert before == self.past.ids("daily")

    @rule(times=st.integers(1, 4))
    def nights_like_any_other(self, times: int) -> None:
        for _ in range(times):
            self.daily_run(24, None, 99, False)

    # What an owner does

    @rule()
    def manual_image(self) -> None:
        before = self.past.ids()
        self.past.disk.outcome = "sound"
        made = self.past.run(None)
        assert {*before, made} == set(self.past.ids())

    @rule(which=ANY, pinned=st.booleans())
    def pin(self, which: int, pinned: bool) -> None:
        if which < len(self.past.ids()):
            self.past.pin(self.past.ids()[which], pinned)
            self.lowered()

    @rule(which=ANY)
    def delete(self, which: int) -> None:
        if which < len(self.past.ids()):
            self.past.delete(self.past.ids()[which])
            self.lowered()

    @rule(which=ANY, rots=st.sampled_from([False, False, True]))
    def verify(self, which: int, rots: bool) -> None:
        if which < len(self.past.ids()):
            image = self.past.ids()[which]
            if rots:
                self.past.rot(image)
            self.past.verify(image)
            self.lowered()

    @rule(keep=st.integers(1, 4))
    def keep_others(self, keep: int) -> None:
        before = self.past.ids()
        self.past.plan(keep=keep)
        assert before == self.past.ids(), "nothing goes before the next run"
        self.floor = min(self.floor, keep)

    @rule(require=st.sampled_from(["complete", "verified"]))
    def require(self, require: str) -> None:
        self.past.plan(require=require)
        self.lowered()


def hasten(kind: str) -> None:
    """Do not wait for a disk that holds what nobody will read after a crash."""
    if kind == "sqlite":
        engine().dispose()
        listen(
            engine(), "connect", lambda connection, _: connection.execute("PRAGMA synchronous=OFF")
        )


def test_rotation_over_any_history(
    world: World, monkeypatch: pytest.MonkeyPatch, any_database: str
) -> None:
    """At no moment are there fewer good images than asked for or made; what is pinned, manual,
    used, the newest good or the newest verified one is never rotated out."""
    disk = Disk(world, monkeypatch)
    hasten(any_database)
    run_state_machine_as_test(
        lambda: History(world, disk),
        settings=settings(
            max_examples=10 if any_database == "sqlite" else 2,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
