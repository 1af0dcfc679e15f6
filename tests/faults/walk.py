"""What the fault suite walks: kinds of operations, faults, and what must hold afterwards.

The points are not listed anywhere: an operation is carried out once undisturbed, and those that
it passed are then the ones at which it is disturbed. Each case begins with a server whose disks
read "changed" and ends with all the checks; the next case is the proof that work goes on.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from system.live_site import Machine, Points, Site, wait_for

from lab import offline
from lab.filesystems import fill
from lab.guest import Guest, attach
from services.cloner import addresses
from shared.disks.overlays import BASE_PREFIX

RECOVERY_S = 60.0
"""How long an operation may take to end after a fault."""


HELD = ("stream:begun", "memory:saved", "reflink:shared")
"""Where a guest, or a job of QEMU's, is held: what undoes that is over soon after."""


def before_commit(points: list[str]) -> list[str]:
    """Those up to where the operation has succeeded; what is left then is done, however often it
    fails."""
    return points[: points.index("committed")]


EVERYWHERE = tuple(itertools.product(("xfs", "ext4"), ("stopped", "running")))
WITH_MEMORY = (("xfs", "running"),)
"""It takes a guest that runs, and shared extents."""
LINKED = (("ext4", "stopped"),)
"""It takes a file system that shares none."""
ONE_WAY = (("xfs", "stopped"), ("xfs", "running"))
"""What copies no disk does the same whichever way they are copied."""


@dataclass
class Kind:
    """One kind of operation: what it needs, how it is asked for, what the disks read after it."""

    name: str
    ask: Callable[[Site, Machine], Any]
    prepare: Callable[[Site, Machine], None] = lambda site, machine: machine.write("changed")
    succeeded: str = "changed"
    failed: str = "changed"
    check: Callable[[Site, Machine, dict[str, Any]], None] = lambda site, machine, ended: None
    """What must hold beside all else when it has ended."""
    where: Collection[tuple[str, str]] = EVERYWHERE
    """On which file systems, and with the server in which power state, it is walked."""
    linked: bool = False
    """Whether it leaves a base."""


_copies: set[str] = set()
"""Snapshots and images whose disks read "before"."""
_memories: set[str] = set()
"""Such snapshots that hold the memory too."""


def _with_snapshot(site: Site, machine: Machine) -> None:
    if site.client.servers.get(machine.id)["snapshot"] not in _copies:
        machine.write("before")
        taken = site.done(site.client.snapshots.take(machine.id, replace=True))
        _copies.add(taken["result"]["snapshot"])
    machine.write("changed")


def _with_image(site: Site, machine: Machine) -> None:
    if site.client.servers.get(machine.id)["newest_image"] not in _copies:
        machine.write("before")
        _copies.add(site.done(site.client.images.create(machine.id))["result"]["image"])
    machine.write("changed")


def _with_memory(site: Site, machine: Machine) -> None:
    if site.client.servers.get(machine.id)["snapshot"] not in _memories:
        machine.write("before")
        taken = site.done(site.client.snapshots.take(machine.id, replace=True, with_memory=True))
        _memories.add(taken["result"]["snapshot"])
    machine.write("changed")


def _reverted(site: Site, machine: Machine) -> None:
    _with_snapshot(site, machine)
    machine.last = site.done(site.client.snapshots.revert(machine.id))["id"]


def _newest_image(site: Site, machine: Machine) -> str:
    return str(site.client.servers.get(machine.id)["newest_image"])


_NUMBERS = itertools.count()
"""The list of domains that names are compared with is a moment behind libvirt's."""


def _clone(site: Site, machine: Machine, kind: str = "server", **wishes: Any) -> Any:
    source = _newest_image(site, machine) if kind == "image" else machine.id
    return site.client.clones.create(
        source,
        source_kind=kind,
        name=f"{machine.name}-c{next(_NUMBERS)}-{{n}}",
        count=2,
        **{"start": False, **wishes},
    )


def _made(site: Site, machine: Machine, ended: dict[str, Any], power: str = "stopped") -> None:
    """The clones that were made are there, and nothing of others; they are removed."""
    for clone in (ended["result"] or {}).get("clones", []):
        if clone["state"] == "ready":
            made = attach(site.hypervisor, clone["name"])
            assert made.state() == power
            made.remove()
    assert not _of_clones(site, machine), "a clone that was not made left files"
    names = {each.name() for each in site.hypervisor_connection().listAllDomains()}
    assert not [name for name in names if name.startswith(f"{machine.name}-c")]
    reserved = site.vault / addresses.FOLDER
    assert [each.name for each in reserved.glob("*") if each.name != ".lock"] == []


def _of_clones(site: Site, machine: Machine) -> list[Path]:
    return list(site.disks.glob(f"{machine.name}-c*"))


@dataclass
class Herd:
    """A machine's farm of two clones: as it was before what is walked, for that to be judged by."""

    id: str
    clones: list[dict[str, Any]]
    guests: list[Guest] = field(default_factory=list)
    """By the clones' numbers."""
    power: list[str] = field(default_factory=list)
    """Of each guest; `missing` is the clone that could not be made."""


_herds: dict[str, Herd] = {}


def _with_farm(
    site: Site, machine: Machine, on: Collection[int] = (), *, broken: bool = False
) -> None:
    """A farm of which those numbers run; what is left of the one before goes first, unless it is
    as good. In a `broken` one the second clone could not be made."""
    machine.write("changed")
    wanted = {"ready": 1, "failed": 1} if broken else {"ready": 2}
    there = {each["id"]: each["clones"] for each in site.client.farms.list()}
    herd = _herds.get(machine.id)
    if herd is None or there.get(herd.id) != wanted:
        if herd and herd.id in there:
            site.done(site.client.farms.delete(herd.id))
        herd = _herds[machine.id] = _new_farm(site, machine, broken=broken)
    for number in on:
        herd.guests[number].start(wait=False)
    herd.power = [each.state() for each in herd.guests]


def _with_farm_that_runs(site: Site, machine: Machine) -> None:
    _with_farm(site, machine, on=(0, 1))
    if machine.power == "running":  # its clones have what shuts down when asked to
        for guest in _herds[machine.id].guests:
            guest.wait_ready()


def _stop_farm(site: Site, machine: Machine) -> Any:
    alone = machine.power == "running"
    wishes: dict[str, Any] = {"timeout_s": 45} if alone else {"timeout_s": 1, "force": True}
    return site.client.farms.stop(_herds[machine.id].id, **wishes)


def _new_farm(site: Site, machine: Machine, *, broken: bool) -> Herd:
    name = f"{machine.name}-f{next(_NUMBERS)}-{{n}}"
    in_the_way = site.disks / f"{name.format(n=2)}-vda{machine.disks[0].suffix}"
    if broken:
        in_the_way.touch()
    # Else only the first start renews it: the points of the next ones are others.
    wishes: dict[str, Any] = {"start": False, "identity": "keep"}
    made = site.client.clones.create(machine.id, name=name, count=2, **wishes)
    result = site.done(made)["result"]
    if broken:
        in_the_way.unlink()
    guests = [attach(site.hypervisor, each["name"]) for each in result["clones"]]
    return Herd(result["farm"], result["clones"], guests)


def _farm_is_as_told(
    site: Site,
    machine: Machine,
    ended: dict[str, Any],
    done: str = "missing",
    between: Collection[str] = (),
) -> None:
    """Each clone is wholly as it was, or as its outcome says: that it is `done`. What cannot be
    undone may be either, or `between`, where it was not brought to its end."""
    herd = _herds[machine.id]
    told = (ended["result"] or {}).get("clones", [])
    reached = {each["name"] for each in told if not each["error"]}
    for clone, guest, before in zip(herd.clones, herd.guests, herd.power, strict=True):
        states = {done} if clone["name"] in reached else {before, *between}
        assert guest.state() in states, (clone["name"], guest.state(), states)
        files = sorted(site.disks.glob(f"{clone['name']}-*"))
        if guest.state() == "missing":
            files += site.disks.glob(f"{clone['name']}.*")  # its log
            assert files == []
            continue
        assert files == sorted(guest.disks) and len(files) == 2, (files, guest.disks)
        guest.destroy()  # the next case begins with it off
        if machine.power == "stopped":
            assert {offline.read_file(disk, "/word") for disk in guest.disks} == {"changed"}


KINDS = {
    each.name: each
    for each in (
        Kind("snapshot.take", lambda site, m: site.client.snapshots.take(m.id, replace=True)),
        Kind(
            "snapshot.revert",
            lambda site, m: site.client.snapshots.revert(m.id),
            _with_snapshot,
            succeeded="before",
        ),
        Kind(
            "snapshot.take with memory",
            lambda site, m: site.client.snapshots.take(m.id, replace=True, with_memory=True),
            where=WITH_MEMORY,
        ),
        Kind(
            "snapshot.revert with memory",
            lambda site, m: site.client.snapshots.revert(m.id),
            _with_memory,
            succeeded="before",
            where=WITH_MEMORY,
        ),
        Kind(
            "snapshot.undo",
            lambda site, m: site.client.operations.undo(m.last),
            _reverted,
            failed="before",
            where=ONE_WAY,
        ),
        Kind(
            "snapshot.promote", lambda site, m: site.client.snapshots.promote(m.id), _with_snapshot
        ),
        Kind(
            "snapshot.delete",
            lambda site, m: site.client.snapshots.delete(m.id),
            _with_snapshot,
            where=ONE_WAY,
        ),
        Kind("image.create", lambda site, m: site.client.images.create(m.id)),
        Kind(
            "image.restore",
            lambda site, m: site.client.images.restore(_newest_image(site, m)),
            _with_image,
            succeeded="before",
        ),
        Kind(
            "image.delete",
            lambda site, m: site.client.images.delete(_newest_image(site, m)),
            _with_image,
            where=ONE_WAY,
        ),
        Kind("clone.server", _clone, check=_made),
        Kind(
            "clone.snapshot",
            lambda site, m: _clone(site, m, "snapshot", identity="cloud-init"),
            _with_snapshot,
            check=_made,
        ),
        Kind(
            "clone.image",
            lambda site, m: _clone(site, m, "image", start=True),
            _with_image,
            check=partial(_made, power="running"),
        ),
        Kind(
            "clone.server with memory",
            lambda site, m: _clone(site, m, start=True, with_memory=True),
            where=WITH_MEMORY,
            check=partial(_made, power="running"),
        ),
        Kind(
            "clone.linked",
            lambda site, m: _clone(site, m, linked=True),
            check=_made,
            where=LINKED,
            linked=True,
        ),
        Kind(
            "farm.delete",
            lambda site, m: site.client.farms.delete(_herds[m.id].id),
            _with_farm,
            check=_farm_is_as_told,
            where=ONE_WAY,
        ),
        Kind(
            "clone.delete",
            lambda site, m: site.client.clones.delete(_herds[m.id].clones[0]["id"]),
            partial(_with_farm, on=(0,)),
            check=_farm_is_as_told,
            where=ONE_WAY,
        ),
        Kind(
            "farm.retry",
            lambda site, m: site.client.farms.retry(_herds[m.id].id),
            partial(_with_farm, broken=True),
            check=partial(_farm_is_as_told, done="stopped"),
        ),
        Kind(
            "farm.start",
            lambda site, m: site.client.farms.start(_herds[m.id].id),
            _with_farm,
            check=partial(_farm_is_as_told, done="running", between={"running"}),
            where=ONE_WAY,
        ),
        Kind(
            "farm.stop",
            _stop_farm,
            _with_farm_that_runs,
            check=partial(_farm_is_as_told, done="stopped", between={"stopped"}),
            where=ONE_WAY,
        ),
    )
}


@dataclass
class Case:
    """What was done, and how it ended."""

    kind: str
    power: str
    way: str
    point: str
    fault: str
    at: str
    """Where `raise, kill` fails the operation; the worker is killed at the point, while undoing."""
    outcome: str = ""
    seconds: float = 0.0


@dataclass
class Walk:
    """A server on a site, and the faults that befall what is done to it."""

    site: Site
    machine: Machine
    points: Points
    cases: list[Case] = field(default_factory=list)
    found: dict[str, list[str]] = field(default_factory=dict)
    """The points of each kind, once it was carried out."""
    whole: bool = True
    """Whether the last case has ended well, with all checks."""

    def passed_by(self, kind: Kind) -> list[str]:
        """The points of an operation that nothing happens to."""
        if kind.name not in self.found:
            self._begin()
            kind.prepare(self.site, self.machine)
            self.points.clear()
            operation = kind.ask(self.site, self.machine)
            self.settle(kind, self.site.done(operation))
            self.found[kind.name] = self.points.passed()
            self.whole = True
        return self.found[kind.name]

    def undone_by(self, kind: Kind, at: str) -> list[str]:
        """The points of undoing it, when it fails there."""
        self.disturb(kind, at, "raise")
        passed = self.points.passed()
        return passed[passed.index(at) + 1 :]

    def disturb_at_each(
        self, kind: Kind, points: list[str], fault: str, at: str = "committing"
    ) -> None:
        """A case at each of the points where it was not tried yet; the table shows those that a
        failure left out too."""
        tried = {(case.kind, case.point, case.fault, case.at) for case in self.cases}
        new = [point for point in points if (kind.name, point, fault, at) not in tried]
        for case in [self._planned(kind, point, fault, at) for point in new]:
            self._disturb(kind, case)

    def disturb(self, kind: Kind, point: str, fault: str) -> Case:
        case = self._planned(kind, point, fault)
        self._disturb(kind, case)
        return case

    def _planned(self, kind: Kind, point: str, fault: str, at: str = "committing") -> Case:
        case = Case(kind.name, self.machine.power, self.site.way, point, fault, at)
        self.cases.append(case)
        return case

    def _disturb(self, kind: Kind, case: Case) -> None:
        """One case: prepared, disturbed at the point, ended, and all of it checked."""
        point, fault = case.point, case.fault
        self._begin()
        kind.prepare(self.site, self.machine)
        self.site.mark_logs()
        first = [(case.at, "raise")] if fault == "raise, kill" else []
        plain = "kill" if first else "wait" if fault in EVENTS else fault
        self.points.arm(*first, (point, plain))
        started = time.monotonic()
        operation = kind.ask(self.site, self.machine)
        if fault in EVENTS:
            self._wait_reached(operation, point)
            with EVENTS[fault](self, operation):
                ended = self.site.ended(operation, RECOVERY_S)
        else:
            ended = self.site.ended(operation, RECOVERY_S)
        case.seconds = time.monotonic() - started
        # The row says that it has ended a moment before the last points are passed.
        wait_for(lambda: self.points.reached, f"{point} is passed again", 10)
        self._judge(case, ended)
        self.settle(kind, ended, fault)
        case.outcome = ended["state"]
        self.whole = True

    def _wait_reached(self, operation: Any, point: str) -> None:
        wait_for(lambda: self.points.reached, f"{operation['kind']} reaches {point}")

    def _judge(self, case: Case, ended: dict[str, Any]) -> None:
        """A dead worker's work is done by the next one; an error undoes it, before the end."""
        clones = (ended["result"] or {}).get("clones", [])
        failed = [each for each in clones if each["state"] == "failed"]
        if case.fault == "kill":
            assert (ended["state"], failed) == ("succeeded", []), ended
        if case.fault == "cancel":
            assert ended["state"] == "cancelled", ended
        if case.fault.startswith("raise"):
            if clones:  # one of them failed, which leaves the other alone (C4)
                assert len(failed) == 1 < len(clones)
            else:
                assert ended["state"] == "failed", ended
            assert "Injected" in (failed or [ended])[0]["error"]["message"]

    def settle(self, kind: Kind, ended: dict[str, Any], fault: str = "") -> None:
        """The server is as the operation says it is, nothing is left over, and it can go on. It is
        off where the fault was to it, and nowhere else."""
        site, machine = self.site, self.machine
        with contextlib.suppress(AssertionError):  # a moment after the end it may not be yet
            wait_for(self._tidy, "nothing is left over")
        site.assert_tidy()
        succeeded = ended["state"] == "succeeded"
        if fault in CUT_POWER:
            self._switch_on()
        assert machine.state() == machine.power
        expected = {kind.succeeded if succeeded else kind.failed}
        assert machine.read() == expected, (machine.read(), ended)
        kind.check(site, machine, ended)
        bases = list(site.disks.glob(f"{BASE_PREFIX}*"))
        assert len(bases) == (len(machine.disks) if kind.linked and succeeded else 0), bases
        for base in bases:
            base.unlink()

    def _begin(self) -> None:
        """Take away what a case left that failed: it is to be the only one."""
        if not self.whole:
            self._switch_on()
            with self.site.hypervisor.connection() as connection:
                names = [each.name() for each in connection.listAllDomains()]
            for name in names:
                if name.startswith(f"{self.machine.name}-c"):
                    attach(self.site.hypervisor, name).remove()
            for path in _of_clones(self.site, self.machine):
                path.unlink()
            for base in self.site.disks.glob(f"{BASE_PREFIX}*"):
                base.unlink()
        self.whole = False

    def _switch_on(self) -> None:
        if self.machine.power == "running" and self.machine.state() == "stopped":
            self.machine.guest.start()

    def _tidy(self) -> bool:
        with contextlib.suppress(AssertionError):
            self.site.assert_tidy()
            return True
        return False


@contextmanager
def _without_libvirtd(walk: Walk, operation: Any) -> Iterator[None]:
    """libvirtd is killed, and back when the operation has ended, or a second later."""
    walk.site.hypervisor.stop(kill=True)
    walk.points.go()
    try:
        with contextlib.suppress(TimeoutError):
            walk.site.ended(operation, 1)
    finally:
        walk.site.hypervisor.start()
    yield


@contextmanager
def _without_qemu(walk: Walk, _operation: Any) -> Iterator[None]:
    """QEMU is killed, as by the kernel when memory runs out."""
    if walk.machine.state() != "stopped":
        os.kill(qemu_of(walk.machine), signal.SIGKILL)
    walk.points.go()
    yield
    wait_for(lambda: walk.machine.state() == "stopped" or _runs(walk.machine), "libvirt sees it")


@contextmanager
def _powered_off(walk: Walk, _operation: Any) -> Iterator[None]:
    """The owner cuts the guest's power."""
    walk.machine.guest.destroy()
    walk.points.go()
    yield


@contextmanager
def _full(walk: Walk, _operation: Any) -> Iterator[None]:
    """Something else fills the file system that vault and disks are on."""
    ballast = fill(walk.site.folder)
    walk.points.go()
    try:
        yield
    finally:
        ballast.unlink()


@contextmanager
def _cancelled(walk: Walk, operation: Any) -> Iterator[None]:
    walk.site.client.operations.cancel(operation["id"])
    walk.points.go()
    yield


@contextmanager
def _hanging(walk: Walk, _operation: Any) -> Iterator[None]:
    """The worker hangs there for longer than a guest may be held."""
    if walk.machine.power == "running":
        wait_for(lambda: walk.machine.state() == "running", "the watchdog resumes the guest", 40)
    walk.points.go()
    yield


EVENTS: dict[str, Callable[[Walk, Any], Any]] = {
    "libvirtd": _without_libvirtd,
    "qemu": _without_qemu,
    "power": _powered_off,
    "full": _full,
    "hang": _hanging,
    "cancel": _cancelled,
}
CUT_POWER = ("qemu", "power")


def _runs(machine: Machine) -> bool:
    with contextlib.suppress(AssertionError):
        return bool(qemu_of(machine))
    return False


def qemu_of(machine: Machine) -> int:
    """The pid of the QEMU process that runs the machine."""
    wanted = f"guest={machine.name},".encode()
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if wanted in entry.read_bytes():
                return int(entry.parent.name)
        except OSError:
            continue
    raise AssertionError(f"no QEMU runs {machine.name}")
