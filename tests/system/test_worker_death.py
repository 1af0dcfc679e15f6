"""A worker killed in the middle: the server is as it was, and the work ends in truth (E2).

Here whole workers die, and work that is long: tests/faults has one process die at every point.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from live_site import BUSY, Machine, Site

from lab.guest import attach
from shared.hypervisor.backup import job_files
from shared.hypervisor.connection import connect
from shared.hypervisor.domains import find_by_name

pytestmark = [
    pytest.mark.vm,
    pytest.mark.parametrize("site", ["ext4"], indirect=True),
]
RECOVERY_S = 60


def _big(site: Site, power: str) -> Machine:
    made = site.machine(["qcow2"], power, noise=BUSY)
    made.write("before")
    return made


@pytest.fixture(scope="module")
def running_big(site: Site) -> Iterator[Machine]:
    """A running server with a second disk of noise: QEMU copies on while nobody looks."""
    made = _big(site, "running")
    yield made
    site.remove(made)


@pytest.fixture(scope="module")
def stopped_big(site: Site) -> Iterator[Machine]:
    """The same, stopped."""
    made = _big(site, "stopped")
    yield made
    site.remove(made)


@dataclass
class Work:
    """One kind of operation: its service, the point to kill at, how it is asked for."""

    service: str
    point: str
    ask: Callable[[Site, Machine], Any]
    after: str
    """What the server's disk reads once it has succeeded."""


def _clone(site: Site, machine: Machine) -> Any:
    return site.client.clones.create(machine.id, name=f"{machine.name}-c", start=False)


WORK = {
    "take": Work(
        "snapshotter",
        "stream:begun",
        lambda site, m: site.client.snapshots.take(m.id, replace=True),
        "changed",
    ),
    "clone-making": Work("cloner", "materialise:written", _clone, "changed"),
    "revert-swapping": Work(
        "snapshotter", "swap:replaced", lambda site, m: site.client.snapshots.revert(m.id), "before"
    ),
}


def prepare(site: Site, machine: Machine, kind: str) -> None:
    """A copy to go back to, where the operation needs one, and a change since."""
    machine.write("before")
    if kind.startswith("revert"):
        site.done(site.client.snapshots.take(machine.id, replace=True))
    machine.write("changed")


def assert_mended(site: Site, machine: Machine, kind: str, operation: Any) -> None:
    """The operation ended truthfully and the server is as the operation says."""
    ended = site.ended(operation, RECOVERY_S)
    assert ended["state"] == "succeeded", ended
    assert ended["attempt"] == 2
    assert machine.state() == machine.power
    assert machine.read() == {WORK[kind].after}
    if kind.startswith("clone"):
        (made,) = ended["result"]["clones"]
        clone = Machine(site, attach(site.hypervisor, made["name"]), "stopped", made["server"], 0)
        assert len(clone.disks) == len(machine.disks)
        site.remove(clone)
    site.assert_tidy()
    # The server is not locked: the next piece of work on it is done.
    if site.client.servers.get(machine.id)["snapshot"]:
        site.done(site.client.snapshots.delete(machine.id))


def kill_worker(site: Site, machine: Machine, kind: str) -> None:
    """Ask for the work, kill the whole worker in the middle, and start another."""
    prepare(site, machine, kind)
    work = WORK[kind]
    with site.points.held(lambda: work.ask(site, machine), work.point) as operation:
        site.kill_worker(work.service)
    site.stack.start_worker(work.service)

    assert_mended(site, machine, kind, operation)


def kill_child(site: Site, machine: Machine, kind: str) -> None:
    """Ask for the work and kill the one process that does it."""
    prepare(site, machine, kind)
    work = WORK[kind]
    with site.points.held(lambda: work.ask(site, machine), work.point) as operation:
        child = site.child_of(operation)
        assert child != site.stack.pid(work.service)
        os.kill(child, signal.SIGKILL)

    assert_mended(site, machine, kind, operation)


@pytest.mark.parametrize("kind", ["take", "revert-swapping"])
def test_a_running_server_outlives_its_worker(site: Site, running_big: Machine, kind: str) -> None:
    """SIGKILL of the whole worker: its successor clears up and carries the work to its end."""
    kill_worker(site, running_big, kind)


def test_a_stopped_server_outlives_its_worker(site: Site, stopped_big: Machine) -> None:
    """The same of a server that stays stopped throughout, while a clone of it is being made."""
    kill_worker(site, stopped_big, "clone-making")


def test_a_running_server_outlives_a_pool_child(site: Site, running_big: Machine) -> None:
    """SIGKILL of the one process that works: the pool's next child clears up and goes on."""
    kill_child(site, running_big, "take")


def test_a_worker_that_always_dies_gives_up(site: Site, stopped_big: Machine) -> None:
    """After three attempts whose worker died the operation fails with worker_lost, all put back."""
    stopped_big.write("changed")
    site.points.arm(*[("stream:disk-copied", "kill")] * 3)

    operation = site.client.images.create(stopped_big.id)

    assert site.refused(operation, RECOVERY_S) == "worker_lost"
    assert stopped_big.state() == "stopped"
    assert stopped_big.read() == {"changed"}
    assert site.client.servers.get(stopped_big.id)["newest_image"] is None


def test_the_journal_tells_our_copy_job_from_anothers(site: Site, running_big: Machine) -> None:
    """What ends it after a crash knows it by the folder that it copies into."""
    prepare(site, running_big, "take")
    work = WORK["take"]
    query = "SELECT arguments FROM journal WHERE operation_id = ? AND action = ?"
    files, deadline = [], time.monotonic() + 90
    while not files and time.monotonic() < deadline:  # QEMU may be done before it is looked at
        with site.points.held(lambda: work.ask(site, running_big), work.point) as operation:
            (row,) = site.rows(query, operation["id"], "abort_backup")
            files = job_files(find_by_name(connect(site.hypervisor.uri), running_big.name))
        site.done(operation)

    assert {each.parent for each in files} == {Path(json.loads(row["arguments"])["folder"])}
