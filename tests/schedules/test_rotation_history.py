"""Rotation over every history that a schedule can have: what must never happen does not (I4)."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from operations.spine import World
from schedules.rotating import Disk, site

from shared.database import reading
from shared.models import Image
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

    def good(self) -> list[Image]:
        """What the schedule counts, the oldest first."""
        strict = self.past.schedule().require == "verified"
        return [
            image
            for image in self.past.there("daily")
            if image.state == "complete"
            and not image.pinned
            and (image.verified_result == "passed" or not strict)
        ]

    def on_disk(self) -> list[Image]:
        return [image for image in self.good() if self.past.folder(image.id).is_dir()]

    def lowered(self) -> None:
        self.floor = min(self.floor, len(self.good()))

    def removed(self, folder: Path) -> None:
        """A moment like any other: what is about to go may go, for the others are there."""
        if self.by_run:
            assert folder.name not in {each.id for each in self.past.there()}
            assert len(self.on_disk()) >= self.floor

    @invariant()
    def as_many_as_were_promised(self) -> None:
        assert len(self.on_disk()) >= self.floor

    # A schedule's run

    @rule(hours=HOURS, dies_at=DEATHS, used=ANY, rotten=st.sampled_from([False, False, True]))
    def daily_run(self, hours: float, dies_at: str | None, used: int, rotten: bool) -> None:
        """One that has its copy, perhaps of a disk that is rotten; the worker may die, and an
        image of the server may be wanted by somebody who waits in its line."""
        past, before = self.past, self.past.there("daily")
        past.disk.outcome = "rotten" if rotten else "sound"
        wanted = past.there()[used].id if used < len(past.there()) else None
        strict = past.schedule().require == "verified"
        operation = past.asked_for("daily")
        waiting = past.restore_is_asked_for(wanted) if wanted and self.usable(wanted) else None
        with reading() as session:
            foreseen = [each.id for each in due_next(session, past.schedule())]
        others = set(past.ids()) - {each.id for each in before}

        past.moved(hours)
        past.disk.dies_at = dies_at
        self.by_run = True
        made = past.end(operation)
        self.by_run, past.disk.dies_at = False, None
        if waiting:
            past.cancel(waiting)

        gone = [each.id for each in before if each.id not in past.ids()]
        assert others <= set(past.ids()), "of others none"
        assert (made is None) == (strict and rotten)
        if made is None:
            assert gone == []
            return
        self.floor = min(past.schedule().keep, self.floor + 1)
        assert made in past.ids(), "the newest good one is there"
        assert set(gone) == set(foreseen), "what was foreseen, and no other"
        assert not {each.id for each in before if each.pinned or each.state != "complete"} & set(
            gone
        )
        assert wanted not in gone
        self.check_newest_verified([each for each in before if each.id != made], gone)
        self.check_none_is_left_over(made, wanted)

    def usable(self, image: str) -> bool:
        return next(each for each in self.past.there() if each.id == image).state == "complete"

    def check_newest_verified(self, before: list[Image], gone: list[str]) -> None:
        whole = [each for each in before if each.state == "complete"]
        passed = [each.id for each in whole if each.verified_result == "passed"]
        strict = self.past.schedule().require == "verified"  # then the new one is verified
        assert strict or not passed or passed[-1] not in gone

    def check_none_is_left_over(self, made: str, wanted: str | None) -> None:
        """It did rotate: more than `keep` there are only for a reason."""
        keep, good = self.past.schedule().keep, [each.id for each in self.good()]
        assert len([each for each in good if each not in (made, wanted)]) <= keep

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


def test_rotation_over_any_history(
    world: World, monkeypatch: pytest.MonkeyPatch, any_database: str
) -> None:
    """At no moment are there fewer good images than asked for or made; what is pinned, manual,
    used, the newest good or the newest verified one is never rotated out."""
    disk = Disk(world, monkeypatch)
    run_state_machine_as_test(
        lambda: History(world, disk),
        settings=settings(
            max_examples=10 if any_database == "sqlite" else 3,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
