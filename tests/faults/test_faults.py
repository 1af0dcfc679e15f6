"""No fault, at any point of any operation, costs a server its data or leaves it held (E2).

`make faults` walks all of them, `make faults PART=1` touches each point once (conftest.py).
"""

from __future__ import annotations

import os
import signal
import time

import pytest
from faults.conftest import CANCELLED, OF_FARMS, OF_THE_GUEST, WHOLE
from faults.walk import HELD, KINDS, Walk, before_commit
from system.live_site import wait_for

from embedded.stack import SERVICES
from lab.processes import children_of
from shared.copying import HOLDS
from shared.hypervisor.watchdog_helper import OWED

PROMISED_S, TRIES = 2, 3
"""Until a guest that is held runs again; the best of a few tries keeps it."""

pytestmark = [pytest.mark.vm, pytest.mark.timeout(900)]

_touched: set[str] = set()


def _to_walk(points: list[str]) -> list[str]:
    """All of them, or those that nothing has been done at yet."""
    new = [point for point in points if WHOLE or point not in _touched]
    _touched.update(new)
    return new


@pytest.mark.parametrize("kind", KINDS)
def test_worker_killed_at_every_point(walk: Walk, kind: str) -> None:
    """SIGKILL: another worker clears up and carries the work to its end."""
    walk.disturb_at_each(KINDS[kind], _to_walk(walk.passed_by(KINDS[kind])), "kill")


@pytest.mark.parametrize("kind", KINDS)
def test_worker_killed_at_every_point_of_an_undo(walk: Walk, kind: str) -> None:
    """An error while a guest is held, or at the very end, and the worker killed while all is
    being put back."""
    held = [point for point in HELD if point in walk.passed_by(KINDS[kind])][:1]
    for at in [*held, "committing"]:
        points = _to_walk(walk.undone_by(KINDS[kind], at))
        walk.disturb_at_each(KINDS[kind], points, "raise, kill", at)


@pytest.mark.parametrize("kind", KINDS)
def test_error_at_every_point(walk: Walk, kind: str) -> None:
    """An error: everything is put back, and the operation says why."""
    points = before_commit(walk.passed_by(KINDS[kind]))
    walk.disturb_at_each(KINDS[kind], points[1:], "raise")  # "claimed" is before all


@pytest.mark.parametrize("fault", ["libvirtd", "qemu", "power"])
@pytest.mark.parametrize("kind", [*OF_THE_GUEST, *OF_FARMS, "snapshot.undo"])
def test_guest_or_libvirtd_gone_at_every_point(walk: Walk, kind: str, fault: str) -> None:
    """What happens to the guest, or to libvirtd, in the middle is not made worse."""
    points = before_commit(walk.passed_by(KINDS[kind]))
    walk.disturb_at_each(KINDS[kind], points, fault)


@pytest.mark.parametrize("kind", CANCELLED)
def test_cancelled_at_every_point(walk: Walk, kind: str) -> None:
    """Everything is as it was; of a farm nothing is left."""
    points = before_commit(walk.passed_by(KINDS[kind]))
    walk.disturb_at_each(KINDS[kind], points, "cancel")


@pytest.mark.parametrize("kind", OF_THE_GUEST)
def test_disk_full_at_every_point(walk: Walk, kind: str) -> None:
    """Nothing of a copy that did not fit is kept; the server is as it was."""
    points = before_commit(walk.passed_by(KINDS[kind]))
    walk.disturb_at_each(KINDS[kind], points, "full")


@pytest.mark.parametrize(
    ("kind", "point"),
    [("snapshot.take", "reflink:paused"), ("snapshot.take with memory", "memory:saved")],
)
def test_worker_hangs_while_the_guest_is_held(walk: Walk, kind: str, point: str) -> None:
    """The guest is given back although the worker lives, and the copy is not kept."""
    case = walk.disturb(KINDS[kind], point, "hang")
    assert case.outcome == "failed"


def test_worker_and_watchdog_die_while_the_guest_is_held(walk: Walk) -> None:
    """As when a container is killed with all that is in it: another service of the host gives
    the guest back, within two seconds, without a successor of the dead one."""
    kind = KINDS["snapshot.take"]
    took: list[float] = []
    while len(took) < TRIES and min(took, default=PROMISED_S) >= PROMISED_S:
        kind.prepare(walk.site, walk.machine)
        walk.points.arm(("reflink:paused", "wait"))
        operation = kind.ask(walk.site, walk.machine)
        wait_for(lambda: walk.points.reached, "the guest is held")
        assert walk.machine.state() == "paused"
        helpers = children_of(walk.site.child_of(operation), "watchdog")
        assert helpers

        for helper in helpers:
            os.kill(helper, signal.SIGKILL)
        walk.site.kill_worker("snapshotter")
        died = time.monotonic()
        wait_for(lambda: walk.machine.state() == "running", "the guest runs", 60)

        took.append(time.monotonic() - died)
        walk.site.stack.start_worker("snapshotter")
        walk.settle(kind, walk.site.done(operation))
    assert min(took) < PROMISED_S


def test_all_workers_and_the_broker_die_while_the_guest_is_held(walk: Walk) -> None:
    """The first worker that starts again gives the guest back, and waits for no broker. It also
    does what the helpers of dead ones had noted, and had no time for."""
    kind, stack = KINDS["snapshot.take"], walk.site.stack
    kind.prepare(walk.site, walk.machine)
    walk.points.arm(("reflink:paused", "wait"))
    operation = kind.ask(walk.site, walk.machine)
    wait_for(lambda: walk.points.reached, "the guest is held")
    helpers = children_of(walk.site.child_of(operation), "watchdog")

    stack.signal("redis", signal.SIGKILL)
    for service in SERVICES[1:]:
        walk.site.kill_worker(service)
    for helper in helpers:
        os.kill(helper, signal.SIGKILL)
    walk.site.kill_worker(SERVICES[0])
    state = walk.machine.state()
    note = walk.site.vault / HOLDS / f"{walk.machine.guest.domain.UUIDString()}{OWED}"
    note.touch()
    stack.start_worker(SERVICES[1])
    wait_for(lambda: walk.machine.state() == "running", "the guest runs")
    wait_for(lambda: not note.exists(), "what was owed is done")
    assert (SERVICES[0], state) == ("snapshotter", "paused")

    stack.start_redis()
    stack.start_worker(SERVICES[0])
    stack.start_worker(SERVICES[2])
    walk.settle(kind, walk.site.done(operation))


def test_a_pause_that_its_owner_asks_for_later_stays(walk: Walk) -> None:
    """Once a guest was released, to undo the rest of the operation resumes nobody."""
    kind = KINDS["snapshot.take"]
    kind.prepare(walk.site, walk.machine)
    walk.points.arm(("publish:sealed", "wait"))
    operation = kind.ask(walk.site, walk.machine)
    wait_for(lambda: walk.points.reached, "the copy is made")

    walk.machine.guest.domain.suspend()
    walk.site.client.operations.cancel(operation["id"])
    walk.points.go()
    ended = walk.site.ended(operation)
    left = walk.machine.state()
    walk.machine.guest.domain.resume()

    assert (ended["state"], left) == ("cancelled", "paused")
    walk.settle(kind, ended)
