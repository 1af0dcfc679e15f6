"""Rotation, over every history that a schedule can have (I4)."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, cast

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from operations.spine import World
from sqlalchemy import select

from services.imager import images
from shared.commands import RestoreImage
from shared.copying import Stored
from shared.database import transaction
from shared.ids import new_id
from shared.models import Image, Operation, Schedule, Server
from shared.operations.submit import submit

START = datetime(2026, 1, 1, tzinfo=UTC)

SUCCESS = st.tuples(st.just("success"), st.just(0))
TOUCH = st.tuples(st.sampled_from(["pin", "unpin", "delete", "use", "leave"]), st.integers(0, 5))
STEPS = st.one_of(  # half of them make an image, so that most histories do rotate
    SUCCESS,
    SUCCESS,
    SUCCESS,
    SUCCESS,
    TOUCH,
    TOUCH,
    st.tuples(st.sampled_from(["failure", "manual", "other schedule"]), st.just(0)),
    st.tuples(st.just("keep"), st.integers(1, 4)),
)


class Copied:
    """Stands for a copy that is complete on disk."""

    def facts(self) -> dict[str, Any]:
        return {}


@dataclass
class History:
    """A server with a daily and a weekly schedule, and what happens to the daily one's images."""

    server: Server
    daily: Schedule
    weekly: Schedule
    made: int = 0

    def image(self, schedule: Schedule | None) -> tuple[Image, list[str]]:
        """Create an image as the imager commits it; the ids of those that it took away."""
        self.made += 1
        id_ = new_id("img")
        image = Image(
            id=id_,
            name=id_,
            server_id=self.server.id,
            created_at=START + self.made * timedelta(hours=1),
            origin=schedule.kind if schedule else "manual",
            schedule_id=schedule.id if schedule else None,
            consistency="crash",
            way="reflink",
            bytes=1,
        )
        outcome = images._created(self.server, image, cast(Stored, Copied()))
        with transaction() as session:
            steps = outcome.apply(session) or []
        removed = [arguments["folder"].rsplit("/", 1)[1] for _, arguments in steps]
        return image, removed

    def there(self, schedule: Schedule | None = None) -> list[Image]:
        """The images that there are, oldest first; of that schedule, if one is given."""
        row: Any = Image
        query = select(Image).where(row.server_id == self.server.id, row.deleted_at.is_(None))
        if schedule:
            query = query.where(row.schedule_id == schedule.id)
        with transaction() as session:
            return list(session.scalars(query.order_by(row.created_at)))

    def in_use(self) -> set[str]:
        row: Any = Operation
        query = select(Operation).where(row.server_id == self.server.id, row.state == "queued")
        with transaction() as session:
            return {str(each.command["image"]) for each in session.scalars(query)}


def history(world: World, keep: int) -> History:
    server = world.server(new_id("name"))
    daily, weekly = (
        Schedule(server_id=server.id, kind=kind, at="03:00", timezone="UTC", keep=k, catch_up_s=60)
        for kind, k in (("daily", keep), ("weekly", 2))
    )
    world.add(daily, weekly)
    return History(server, daily, weekly)


def change(row: type, id_: str, **values: Any) -> None:
    with transaction() as session:
        found = session.get_one(row, id_)
        for name, value in values.items():
            setattr(found, name, value)


def check_success(past: History, keep: int) -> None:
    """A scheduled image is made; what goes and what stays."""
    before = past.there(past.daily)
    others = {each.id for each in past.there()} - {each.id for each in before}
    pinned = {each.id for each in before if each.pinned}
    counted = [each.id for each in before if not each.pinned]
    used = past.in_use()

    image, removed = past.image(past.daily)

    after = past.there(past.daily)
    good = [each.id for each in after if not each.pinned]
    assert image.id in good, "the new one stays"
    assert len(good) >= min(keep, len(counted) + 1), "never fewer than asked for"
    assert pinned <= {each.id for each in after}, "pinned ones never go"
    assert others <= {each.id for each in past.there()}, "others neither count nor go"
    assert not used & set(removed), "what is going to be used goes later"
    assert set(removed) == set(counted) - set(good), "what goes is removed from disk"
    surplus = [*counted, image.id][: max(0, len(counted) + 1 - keep)]
    assert removed == [each for each in surplus if each not in used], "the oldest first"


def take_step(past: History, step: str, number: int, keep: int) -> None:
    if step == "success":
        check_success(past, keep)
    elif step == "manual":
        assert past.image(None)[1] == []
    elif step == "other schedule":
        own = {each.id for each in past.there(past.daily)}
        past.image(past.weekly)
        assert own == {each.id for each in past.there(past.daily)}
    elif step == "keep":
        change(Schedule, past.daily.id, keep=number)
    elif step == "leave":
        for id_ in past.in_use():
            end_uses(past, id_)
    elif step != "failure" and (everything := past.there()):  # a failure leaves no row
        touch(past, step, everything[number % len(everything)].id)


def touch(past: History, step: str, image: str) -> None:
    """What a person does with an image."""
    if step == "use":
        with transaction() as session:
            submit(session, RestoreImage(image=image), requested_by="test")
    elif step != "delete":
        change(Image, image, pinned=step == "pin")
    elif image not in past.in_use():
        change(Image, image, deleted_at=START)


def end_uses(past: History, image: str) -> None:
    with transaction() as session:
        for each in session.scalars(select(Operation)):
            if each.command.get("image") == image:
                each.state = "succeeded"


@settings(
    max_examples=50,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(keep=st.integers(1, 3), steps=st.lists(STEPS, min_size=6, max_size=20))
def test_rotation_over_any_history(world: World, keep: int, steps: list[tuple[str, int]]) -> None:
    """Never fewer good images than asked for or made; the oldest goes first; pinned, manual
    and used ones never go."""
    past = history(world, keep)
    for step, number in steps:
        take_step(past, step, number, keep)
        if step == "keep":
            keep = number


def test_every_new_one_replaces_the_oldest(world: World) -> None:
    """Kept at three: the fourth takes the first away, the fifth the second."""
    past = history(world, keep=3)
    made = [past.image(past.daily) for _ in range(5)]
    ids = [image.id for image, _ in made]
    assert [removed for _, removed in made] == [[], [], [], ids[:1], ids[1:2]]
    assert [each.id for each in past.there()] == ids[2:]


def test_lowered_keep_takes_effect_with_the_next_run(world: World) -> None:
    """All that are too many then go, oldest first."""
    past = history(world, keep=5)
    ids = [past.image(past.daily)[0].id for _ in range(5)]
    change(Schedule, past.daily.id, keep=2)
    assert past.image(past.daily)[1] == ids[:4]


def test_pinned_image_neither_counts_nor_goes(world: World) -> None:
    """It stays beside as many others as are kept; unpinned, it is the oldest again."""
    past = history(world, keep=2)
    pinned = past.image(past.daily)[0].id
    change(Image, pinned, pinned=True)
    second = past.image(past.daily)[0].id
    assert [past.image(past.daily)[1] for _ in range(2)] == [[], [second]]
    assert pinned in {each.id for each in past.there()}
    change(Image, pinned, pinned=False)
    assert past.image(past.daily)[1][0] == pinned


def test_used_image_goes_with_a_later_run(world: World) -> None:
    """A restore that waits in line keeps its image; when it has ended the image goes."""
    past = history(world, keep=1)
    first, _ = past.image(past.daily)
    with transaction() as session:
        submit(session, RestoreImage(image=first.id), requested_by="test")
    second, removed = past.image(past.daily)
    assert removed == []
    end_uses(past, first.id)
    assert past.image(past.daily)[1] == [first.id, second.id]


def test_damaged_image_neither_counts_nor_goes(world: World) -> None:
    """Only complete images count; what is damaged is left for a person to see."""
    past = history(world, keep=1)
    damaged, _ = past.image(past.daily)
    change(Image, damaged.id, state="damaged")
    good, removed = past.image(past.daily)
    assert removed == []
    assert past.image(past.daily)[1] == [good.id]


def test_image_of_an_ended_schedule_rotates_nothing(world: World) -> None:
    """The schedule was deleted while its image was made."""
    past = history(world, keep=1)
    kept, _ = past.image(past.daily)
    gone = Schedule(id="sch_gone", server_id="", kind="daily", at="", timezone="", keep=1)
    gone.catch_up_s = 0
    assert past.image(gone)[1] == []
    assert kept.id in {each.id for each in past.there()}
