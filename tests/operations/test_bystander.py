"""What the other workers of a host do when one of them dies (E2)."""

import time
from collections.abc import Iterator

import pytest
from operations.spine import World, nothing
from operations.waiting import wait_for

from shared.database import transaction
from shared.operations import bystander, claim, journal, presence
from shared.operations.bystander import Bystander, attend
from shared.settings import settings

pytestmark = pytest.mark.usefixtures("any_database")


def holding(world: World, name: str = "somebody") -> str:
    """An operation that holds a guest."""
    world.action("resume_domain", lambda step: None)
    world.action("remove_copy", lambda step: None)
    operation = world.snapshot_of(world.server(f"of-{name}"))
    assert claim.claim(operation, owner(name))
    with transaction() as session:
        journal.write(session, operation, "undo", "remove_copy", step="remove")
        journal.write(session, operation, "undo", "resume_domain", step="resume")
    world.clear_outbox()
    return operation


@pytest.fixture
def held(world: World) -> str:
    return holding(world)


def owner(name: str = "somebody") -> str:
    return f"{settings().host}/snapshotter/of-{name}"


def die(name: str = "somebody") -> None:
    """As the owner's process does: its file stays, and nobody has locked it."""
    folder = settings().vault / ".workers"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / owner(name).replace("/", "~")).touch()


@pytest.fixture
def running() -> Iterator[Bystander]:
    thread = Bystander()
    thread.start()
    yield thread
    thread.stop()
    thread.join(10)


def test_guest_is_given_back_and_the_rest_left_to_the_successor(world: World, held: str) -> None:
    """Only the guest cannot wait. All else in the journal is the successor's."""
    attend(owner())

    assert world.played == ["resume"]
    assert world.woken() == [held]
    assert [step for _, step in world.journal(held)] == ["remove"]
    assert (world.row(held).state, world.row(held).owner) == ("running", None)
    successor = claim.take_over(held, f"{settings().host}/snapshotter/successor")
    assert successor and successor.attempt == 1


def test_work_that_somebody_took_over_is_left_alone(world: World, held: str) -> None:
    """Whoever has it now may hold the guest for a reason."""
    world.change(held, owner=f"{settings().host}/snapshotter/another")

    attend(owner())

    assert world.played == world.woken() == []


def test_owner_that_lives_is_not_taken_for_dead(world: World, held: str) -> None:
    """Whatever was believed of it: its lock is asked for again."""
    with presence.attempt("snapshotter") as living:
        world.change(held, owner=living)

        attend(living)

        assert world.row(held).owner == living
    assert world.played == world.woken() == []


def test_death_is_seen_within_a_second(world: World, running: Bystander) -> None:
    """The file of an attempt whose process is gone is locked by nobody. Of three deaths one may
    befall a machine that is busy with something else."""
    took = []
    for number in range(3):
        operation = holding(world, str(number))
        died = time.monotonic()
        die(str(number))
        wait_for(lambda number=number: len(world.played) == number + 1)
        took.append(time.monotonic() - died)
        wait_for(lambda operation=operation: world.woken() == [operation])

    assert min(took) < 1
    wait_for(lambda: not list((settings().vault / ".workers").iterdir()))


def test_owner_whose_file_went_with_another_worker_is_known_by_the_row(
    world: World, held: str
) -> None:
    """Whoever removed it died before the guest was given back; the next to start looks."""
    thread = Bystander()
    thread.start()
    try:
        wait_for(lambda: world.row(held).owner is None)
    finally:
        thread.stop()
        thread.join(10)

    assert world.played == ["resume"]
    assert world.woken() == [held]


def test_libvirt_that_is_away_is_waited_for(
    world: World, held: str, running: Bystander, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What could not be done is tried again, and nothing is forgotten meanwhile."""
    tries: list[str] = []

    def fail_first(step: str) -> None:
        tries.append(step)
        if len(tries) == 1:
            raise ConnectionError("libvirt is away")

    world.action("resume_domain", fail_first)
    die()

    wait_for(lambda: world.row(held).owner is None)

    assert tries == ["resume", "resume"]
    assert set(world.woken()) == {held}


def test_thaw_waits_for_no_resume_that_cannot_be(world: World, held: str) -> None:
    """As while somebody's job holds the domain; both are tried again until both are done."""
    thawed: list[str] = []
    tries: list[str] = []

    def fail_first(step: str) -> None:
        tries.append(step)
        if len(tries) == 1:
            raise ConnectionError("a job holds the domain")

    world.action("thaw_domain", thawed.append)
    world.action("resume_domain", fail_first)
    with transaction() as session:
        journal.strike(session, held, "resume_domain")
        journal.write(session, held, "undo", "thaw_domain", step="thaw")
        journal.write(session, held, "undo", "resume_domain", step="resume")

    with pytest.raises(ConnectionError):
        attend(owner())
    assert (tries, thawed) == (["resume"], ["thaw"])

    attend(owner())
    assert tries == ["resume", "resume"]
    assert world.row(held).owner is None


def test_living_attempts_are_left_alone(
    world: World, running: Bystander, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is at work is no business of others, nor is one that has ended."""
    attended: list[str] = []
    monkeypatch.setattr(bystander, "attend", attended.append)
    world.handler(nothing)

    with presence.attempt("snapshotter"):
        time.sleep(3 * bystander.EVERY_S)
    time.sleep(2 * bystander.EVERY_S)

    assert attended == []
