"""No fault, at any point of any operation, costs a server its data or leaves it held (E2).

`make faults` walks all of them; `make test` touches each point once.
"""

from __future__ import annotations

import pytest
from faults.conftest import WHOLE
from faults.walk import COMMITTED, KINDS, Walk

pytestmark = [pytest.mark.vm, pytest.mark.timeout(900)]

OF_THE_GUEST = ("snapshot.take", "snapshot.revert", "image.create", "image.restore", "clone.server")
"""The operations that are about the server itself, not about what is in the vault."""
_touched: set[str] = set()


def _to_walk(points: list[str]) -> list[str]:
    """All of them, or those that nothing has been done at yet."""
    if WHOLE:
        return points
    new = [point for point in points if point not in _touched]
    _touched.update(new)
    return new


@pytest.mark.parametrize("kind", KINDS)
def test_worker_killed_at_every_point(walk: Walk, kind: str) -> None:
    """SIGKILL: the next worker clears up and carries the work to its end."""
    for point in _to_walk(walk.passed_by(KINDS[kind])):
        walk.disturb(KINDS[kind], point, "kill")


@pytest.mark.parametrize("kind", KINDS)
def test_worker_killed_at_every_point_of_an_undo(walk: Walk, kind: str) -> None:
    """An error at the very end, and the worker killed while all is being put back."""
    if not WHOLE and kind not in ("image.restore", "clone.server"):
        return
    for point in _to_walk(walk.undone_by(KINDS[kind])):
        walk.disturb(KINDS[kind], point, "raise, kill")


if WHOLE:

    @pytest.mark.parametrize("kind", KINDS)
    def test_error_at_every_point(walk: Walk, kind: str) -> None:
        """An error: everything is put back, and the operation says why."""
        for point in walk.passed_by(KINDS[kind]):
            if point != "claimed" and not point.startswith(COMMITTED):
                walk.disturb(KINDS[kind], point, "raise")

    @pytest.mark.parametrize("fault", ["libvirtd", "qemu", "power"])
    @pytest.mark.parametrize("kind", OF_THE_GUEST)
    def test_guest_or_libvirtd_gone_at_every_point(walk: Walk, kind: str, fault: str) -> None:
        """What happens to the guest, or to libvirtd, in the middle is not made worse."""
        if walk.machine.power == "stopped" and fault != "libvirtd":
            return
        for point in walk.passed_by(KINDS[kind]):
            if not point.startswith(COMMITTED):
                walk.disturb(KINDS[kind], point, fault)

    @pytest.mark.parametrize("kind", OF_THE_GUEST)
    def test_disk_full_at_every_point(walk: Walk, kind: str) -> None:
        """Nothing of a copy that did not fit is kept; the server is as it was."""
        if walk.machine.power == "running":
            return  # the guest itself would stop, on the write that finds no room
        for point in walk.passed_by(KINDS[kind]):
            if not point.startswith(COMMITTED):
                walk.disturb(KINDS[kind], point, "full")


def test_worker_hangs_while_the_guest_is_held(walk: Walk) -> None:
    """The guest is given back although the worker lives, and the copy is not kept."""
    if walk.machine.power == "stopped" or walk.site.way == "stream":
        return
    case = walk.disturb(KINDS["snapshot.take"], "reflink:paused", "hang")
    assert case.outcome == "failed"
