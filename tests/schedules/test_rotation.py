"""Which images a schedule's new one takes away, and which it never does (I4)."""

from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any

import pytest
from operations.spine import World
from schedules.rotating import Disk, Site, site
from sqlalchemy import select

from shared import errors, rotation
from shared.commands import CloneSource, CreateClones, RetryFarm
from shared.database import now, transaction
from shared.models import Schedule, ScheduleRun


@pytest.fixture
def disk(world: World, monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(world, monkeypatch)


@pytest.fixture
def past(world: World, disk: Disk) -> Site:
    """Nothing has happened yet; the daily schedule keeps three."""
    return site(world, disk)


def last_run() -> ScheduleRun:
    row: Any = ScheduleRun
    with transaction() as session:
        return session.scalars(select(ScheduleRun).order_by(row.slot.desc())).first()  # type: ignore[return-value]


def test_every_new_one_replaces_the_oldest(past: Site, any_database: str) -> None:
    """Kept at three: the fourth takes the first away, the fifth the second; from disk too."""
    made = [past.run() for _ in range(5)]
    assert past.ids() == made[2:]
    assert [past.folder(str(each)).exists() for each in made] == [False, False, True, True, True]
    assert [each["image"] for each in past.world.events("image.rotated")] == made[:2]


def test_lowered_keep_takes_effect_with_the_next_run(past: Site) -> None:
    """All that are too many then go, oldest first."""
    past.plan(keep=5)
    made = [past.run() for _ in range(5)]
    past.plan(keep=2)
    assert past.ids() == made
    latest = past.run()
    assert past.ids() == [made[4], latest]
    assert [each["image"] for each in past.world.events("image.rotated")] == made[:4]


def test_pinned_image_neither_counts_nor_goes(past: Site) -> None:
    """It stays beside as many others as are kept; unpinned, it is the oldest again."""
    past.plan(keep=2)
    pinned = str(past.run())
    past.pin(pinned)
    made = [past.run() for _ in range(3)]
    assert past.ids() == [pinned, *made[1:]]
    past.pin(pinned, False)
    assert past.ids() == [pinned, *made[1:]]
    latest = past.run()
    assert past.ids() == [made[2], latest]


def test_used_image_goes_with_a_later_run(past: Site, any_database: str) -> None:
    """A restore that waits in line keeps its image; when it has ended the image goes."""
    past.plan(keep=1)
    first = str(past.run())
    operation = past.asked_for("daily")
    with past.used(first):
        second = past.end(operation)
    assert past.ids() == [first, second]
    third = past.run()
    assert past.ids() == [third]


def test_image_that_a_farm_is_made_again_from_stays(past: Site, any_database: str) -> None:
    """A retry that waits in line keeps the image that its farm was made from."""
    past.plan(keep=1)
    first = str(past.run())
    farm = CreateClones(source=CloneSource(kind="image", id=first), name="qa-{n}", count=2)
    past.cancel(past.world.submit(farm))
    operation = past.asked_for("daily")
    retry = past.world.submit(RetryFarm(farm=farm.name))
    second = past.end(operation)
    assert past.ids() == [first, second]
    past.cancel(retry)
    third = past.run()
    assert past.ids() == [third]


def test_damaged_image_neither_counts_nor_goes(past: Site) -> None:
    """Only whole images count; what is damaged is left for a person to see."""
    past.plan(keep=1)
    damaged = str(past.run())
    past.rot(damaged)
    past.verify(damaged)
    second, third = past.run(), past.run()
    assert second not in past.ids()
    assert past.ids() == [damaged, third]


def test_image_of_an_ended_schedule_rotates_nothing(past: Site) -> None:
    """The schedule was deleted while its image was made: all that there are stay."""
    past.plan(keep=1)
    first = past.run()
    operation = past.asked_for("daily")
    with transaction() as session:
        session.delete(session.get_one(Schedule, past.schedules["daily"]))
    second = past.end(operation)
    assert past.ids() == [first, second]


def test_newest_verified_one_stays(past: Site) -> None:
    """However old it is, until a newer one is verified: the last that is known to be whole."""
    past.plan(keep=2)
    first = str(past.run())
    past.verify(first)
    made = [past.run() for _ in range(3)]
    assert past.ids() == [first, *made[1:]]
    past.verify(str(made[2]))
    last = past.run()
    assert past.ids() == [made[2], last]


def test_a_clock_that_was_put_back(past: Site) -> None:
    """The image that was just made never goes, though by the clock it is the oldest."""
    past.plan(keep=2)
    made = [past.run() for _ in range(2)]
    latest = past.run(hours=-1000)
    assert set(past.ids()) == {latest, made[1]}


# Where the schedule requires that images are verified


@pytest.fixture
def strict(past: Site) -> Site:
    past.plan(require="verified")
    return past


def test_verified_before_it_counts(strict: Site, any_database: str) -> None:
    """The image is born verified, in the one operation of its run, and that is told."""
    image = str(strict.run())
    [row] = strict.there()
    assert (row.state, row.verified_result) == ("complete", "passed")
    assert isinstance(row.verified_at, datetime)
    assert strict.world.events("image.verified") == [{"image": image, "result": "passed"}]


def test_what_does_not_pass_is_not_kept(strict: Site, any_database: str) -> None:
    """The run has failed and says why, nothing has gone, and nothing of the copy is left."""
    made = [strict.run() for _ in range(3)]
    strict.disk.outcome = "rotten"
    assert strict.run() is None
    assert strict.ids() == made
    assert {each.name for each in strict.folder("x").parent.iterdir()} == set(made)
    run = last_run()
    assert (run.state, run.image_id) == ("failed", None)
    assert "vda: rotten" in (run.reason or "")
    assert "No older image was touched" in (run.reason or "")
    assert strict.schedule().failures_in_row == 1


def test_unverified_ones_go_when_there_are_enough_verified(past: Site) -> None:
    """Required later on: what was made before stays until as many verified ones are there."""
    old = [past.run() for _ in range(3)]
    past.plan(require="verified")
    new = [past.run() for _ in range(2)]
    assert past.ids() == [*old, *new]
    new.append(past.run())
    assert past.ids() == new


def test_required_while_the_image_is_made(past: Site) -> None:
    """One that was not verified takes none away."""
    made = [past.run() for _ in range(3)]
    past.disk.meanwhile = lambda: past.plan(require="verified")
    latest = past.run()
    assert past.ids() == [*made, latest]


def test_manual_images_are_not_verified(strict: Site) -> None:
    """What a schedule requires, it requires of its own."""
    strict.disk.outcome = "rotten"
    assert strict.run(None) in strict.ids()


# What would go


def going(past: Site) -> list[str]:
    with transaction() as session:
        return [each.id for each in rotation.due_next(session, past.schedule())]


def test_what_would_go_is_what_goes(past: Site, any_database: str) -> None:
    """Before it is there, one more; after `keep` was lowered, all that are too many."""
    past.plan(keep=4)
    made = [past.run() for _ in range(3)]
    assert going(past) == []
    made.append(past.run())
    assert going(past) == made[:1]
    past.plan(keep=2)
    assert going(past) == made[:3]
    past.pin(str(made[0]))
    assert going(past) == made[1:3]
    with past.used(str(made[1])):
        assert going(past) == made[2:3]
    past.run()
    assert {made[0], made[3]} <= set(past.ids())
    assert not {made[1], made[2]} & set(past.ids())


# Two at once


def test_pinned_while_its_successor_is_made(past: Site) -> None:
    """Up to the last moment it can be; then it stays."""
    past.plan(keep=1)
    first = str(past.run())
    past.disk.meanwhile = lambda: past.pin(first)
    latest = past.run()
    assert past.ids() == [first, latest]


@pytest.mark.parametrize("want", ["pin", "restore"])
def test_wanted_a_moment_too_late(past: Site, any_database: str, want: str) -> None:
    """Who comes between the choice of what goes and the commit waits, and hears that it is gone:
    nobody is told that an image stays which does not."""
    past.plan(keep=1)
    first = str(past.run())
    newest = past.there()[0].model_copy(update={"id": "img_newest"})
    with ThreadPoolExecutor(1) as pool:
        with transaction() as session:
            [chosen] = rotation.due(session, newest)
            late = pool.submit(past.pin if want == "pin" else past.restore_is_asked_for, first)
            with pytest.raises(TimeoutError):
                late.result(timeout=0.3)
            chosen.deleted_at = now()
        with pytest.raises(errors.ImageNotFound):
            late.result()
