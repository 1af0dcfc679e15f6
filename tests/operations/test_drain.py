"""Draining a host, on both databases: what is refused, and what two at once see."""

import threading
from typing import Any

import pytest
from operations.spine import World, at_once
from sqlalchemy import func, select

from shared import errors
from shared.commands import DeleteImage, TakeSnapshot
from shared.database import reading, transaction
from shared.models import Image, Operation
from shared.operations.drain import drain, resume
from shared.operations.submit import submit

pytestmark = pytest.mark.usefixtures("any_database")


def draining(name: str = "kvm-1") -> int:
    """Let the host drain; how many operations are queued there, as seen by who asked."""
    row: Any = Operation
    with transaction() as session:
        drain(session, name)
        query = select(func.count()).select_from(Operation)
        return session.scalar(query.where(row.host == name, row.state == "queued")) or 0


def test_new_work_is_refused_until_the_resume(world: World) -> None:
    """A refused command leaves neither an operation nor a wake-up; other hosts' go on."""
    server, elsewhere = world.server(), world.server("elsewhere", host="kvm-2")
    draining()

    with pytest.raises(errors.HostDraining):
        world.snapshot_of(server)

    assert [world.snapshot_of(elsewhere)] == world.woken()
    with transaction() as session:
        resume(session, "kvm-1")
    assert world.snapshot_of(server) in world.woken()


def test_housekeeping_goes_on(world: World) -> None:
    """A deletion is accepted: it leaves less to do."""
    server = world.server()
    world.add(
        Image(
            id="img_1", name="a", server_id=server.id, consistency="crash", way="reflink", bytes=1
        )
    )
    draining()
    assert world.submit(DeleteImage(image="img_1"))


def test_a_key_is_known_while_draining(world: World) -> None:
    """Who asks again with the same key is told what became of the first request (E4)."""
    command = TakeSnapshot(server=world.server().id)
    first = world.submit(command, "key")
    draining()
    assert first == world.submit(command, "key")


def test_drain_sees_what_was_being_submitted(world: World) -> None:
    """Whoever is told that nothing is queued can rely on it: nothing slips in behind."""
    server = world.server()
    counted: list[int] = []
    thread = threading.Thread(target=lambda: counted.append(draining()))
    with transaction() as session:
        submit(session, TakeSnapshot(server=server.id), requested_by="test")
        thread.start()
        thread.join(0.4)
        assert counted == [], "it must wait for the request's end"
    thread.join(30)
    assert counted == [1]


def test_requests_do_not_wait_for_each_other(world: World) -> None:
    """Many at once, on one host, while it is drained and resumed: each gets an answer."""
    servers = [world.server(f"s{number}") for number in range(6)]

    def ask(server: Any) -> str:
        try:
            world.snapshot_of(server)
        except errors.HostDraining as error:
            return error.code
        return "accepted"

    answers = at_once(*[lambda server=server: ask(server) for server in servers], draining)  # type: ignore[misc]

    with reading() as session:
        accepted = session.scalar(select(func.count()).select_from(Operation))
    assert answers.count("accepted") == accepted
    assert {"accepted", "host_draining"} >= set(answers[:-1])


def test_two_drains_are_told_once(world: World) -> None:
    """One change, one event, however many ask at the same time."""
    at_once(*[draining] * 4)
    assert world.events("host.draining") == [{"host": "kvm-1"}]
