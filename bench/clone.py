"""The part `clone`: clones cold and with memory, and what a farm of them costs its source.

A clone counts as started when libvirt has started it; none is waited for to boot, and all are
destroyed before the next measurement, the peer's as ours.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import libvirt

from bench import disks, peers
from bench.book import Book
from bench.figure import Figure
from bench.peers import Bare
from bench.result import Result
from bench.site import Done, Site
from bench.sizes import runs
from bench.ticker import Recording
from lab.guest import PREFIX, Guest, attach
from shared.disks.engine import capture
from shared.disks.reflink import reflink
from shared.hypervisor.connection import connect
from shared.hypervisor.domains import find_by_name
from shared.hypervisor.duplicate import clone_definition
from shared.hypervisor.savefile import SaveFile
from shared.hypervisor.waking import set_clock

FARMS = {1: 20, 10: 5, 50: 2}
"""How many farms of each size."""
FEW_FARMS = 5
"""Of one, on the other file systems."""
LARGEST = max(FARMS)
MEMORY_FARMS = {1: 10, 10: 3, 50: 1}
"""How many of each size with memory, each clone of which runs on with its source's."""
BOOTING_RUNS = 1
PAUSE_RUNS = 5
FAST_RUNS = 10
SLOW_RUNS = 3
"""Of a peer that copies each byte."""
MENU_MS = 65_535
"""What firmware waits at most: longer than it takes to start the largest farm."""
BARE = "virDomainDefineXML + virDomainCreate"
BARE_COMMAND = (
    "virDomainDefineXML and virDomainCreate of one clone after the other, in one process, with the "
    "definitions that ours have; their disks were copied and their definitions written before"
)

_FARM = f"{PREFIX}farm-"
_numbers = itertools.count(1)


def cold(site: Site, book: Book) -> None:
    """Farms of a running server by size, per clone, beside libvirt's bare calls."""
    each: dict[int, Result] = {}
    with _boot_put_off(site):
        _ours(site, 1)  # what a process does for the first time takes longer
        for size, count in FARMS.items():
            each[size] = _per_clone(site, size, count)
            book.record(f"clone_cold_{size}", each[size])
        book.record("clone_cold_1_unfrozen", _per_clone(site, 1, FARMS[1], quiesce="never"))
    book.record("farm_growth", growth(each[10], each[LARGEST]))
    booting = _per_clone(site, 10, BOOTING_RUNS)
    booting.note = f"{booting.note}, and while the clones before it boot"
    book.record("clone_cold_10_booting", booting)


def cold_elsewhere(name: str, site: Site, book: Book) -> None:
    """One clone of a running server on another file system."""
    with _boot_put_off(site):
        _ours(site, 1)
        book.record(name, _per_clone(site, 1, FEW_FARMS))


def _per_clone(site: Site, size: int, count: int, **wishes: str) -> Result:
    ours, bare = [], []
    for _ in range(runs(count)):
        ours.append(_ours(site, size, **wishes).seconds / size)
        bare.append(_bare(site, size) / size)
    note = "per clone; ours with the copy of the running server and of each clone's disk"
    result = Result.of(ours, bare, BARE, peer_command=BARE_COMMAND, note=note)
    if not wishes:
        result.also["guests_own_freeze_ms"] = site.freeze_ms()
    return result


def growth(small: Result, large: Result) -> Result:
    """What a clone of a large farm takes over one of a small farm, and that of the peer's."""
    assert small.peer and large.peer
    also = {"growth_of_bare": large.peer / small.peer}
    return Result(large.ours, small.ours, "ours in farms of 10", large.runs, also=also)


def with_memory(site: Site, book: Book) -> None:
    """Farms that run on from the source's memory, per clone, beside bare restores of it."""
    _ours(site, 1, with_memory=True)  # what a process does for the first time takes longer
    for size, count in MEMORY_FARMS.items():
        ours, firsts, held, bare, clocks = [], [], [], [], []
        for _ in range(runs(count)):
            with _first_seen(site) as seen:
                done = _ours(site, size, with_memory=True)
            ours.append(done.seconds / size)
            firsts += [moment - done.began for moment in seen]
            held.append(done.pause_ms)
            took, clock_ms = _restored(site, size)
            bare.append(took / size)
            clocks.append(clock_ms)
        result = Result.of(
            ours, bare, "virsh restore", peer_command=f"{peers.RESTORE}, for one after the other"
        )
        result.note = (
            "per clone; ours with the save of the running server's memory and the copies of each "
            "clone's; the peer's were made before; the guest has no network card; "
            "guests_own_clock_ms is what the peer's guest takes to set its clock, which is in ours"
        )
        result.also = {
            "first_runs_after_s": statistics.median(firsts),
            "pause_ms": statistics.median(held),
            "guests_own_clock_ms": statistics.median(clocks),
        }
        book.record(f"clone_memory_{size}", result)


@contextlib.contextmanager
def _first_seen(site: Site) -> Iterator[list[float]]:
    """When the first clone that is made meanwhile was seen to run."""
    seen: list[float] = []
    over = threading.Event()

    def look() -> None:
        with site.hypervisor.connection() as connection:
            while not over.wait(0.01) and not seen:
                for domain in connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_RUNNING):
                    if domain.name().startswith(_FARM):
                        seen.append(time.perf_counter())
                        break

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def _restored(site: Site, size: int) -> tuple[float, float]:
    """Seconds of as many restores of one memory, with disks and definitions made before; and
    milliseconds that the last one's guest then takes to set its clock."""
    stem = _stem()
    names = [f"{stem}-{number}" for number in range(size)]
    with site.scratch() as scratch, site.watchdog() as watchdog, _gone_after(site, names):
        taken = capture(site.domain, scratch, watchdog=watchdog, memory=True)
        assert taken.memory
        stored = SaveFile.read(taken.memory)
        files = []
        for name in names:
            disk, saved = scratch / f"{name}.qcow2", scratch / f"{name}.save"
            reflink(taken.files[0].path, disk)
            reflink(taken.memory, saved)
            made = clone_definition(
                stored.xml, name=name, uuid=str(uuid4()), disk_paths={"vda": str(disk)}
            )
            stored.with_definition(made.xml).write_to(saved)
            site.guest.connection.defineXML(made.xml)
            files.append(saved)
        took = sum(peers.RESTORE.run(uri=site.uri, saved=saved) for saved in files)
        _running(site, names)
        began = time.perf_counter()
        if why := set_clock(find_by_name(connect(site.uri), names[-1])):
            raise RuntimeError(why)
        clock_ms = (time.perf_counter() - began) * 1000
    return took, clock_ms


def pause(site: Site, book: Book) -> None:
    """How long the source is held for a farm, beside a farm of one; clones are not started."""
    farms: list[float] = []
    ones: list[float] = []
    gaps: list[float] = []
    gaps_of_one: list[float] = []
    with site.ticks() as ticks:
        for _ in range(runs(PAUSE_RUNS)):
            for size, held, felt in ((LARGEST, farms, gaps), (1, ones, gaps_of_one)):
                with ticks.window() as window:
                    done = _ours(site, size, start=False)
                held.append(done.pause_ms)
                felt.append(ticks.longest(window))
    result = Result.of(farms, ones, "a farm of one", "ms")
    result.note = f"pause_ms of farms of {LARGEST}; guest_gap_ms is a 1 ms ticker's longest gap"
    result.also = {
        "guest_gap_ms": statistics.median(gaps),
        "guest_gap_of_one_ms": statistics.median(gaps_of_one),
    }
    book.record("farm_pause_growth", result)


def memory_pause(site: Site, book: Book) -> None:
    """How long the source is held for a farm with memory, beside libvirt's own live snapshot."""
    farms: list[float] = []
    ones: list[float] = []
    bare: list[float] = []
    with site.ticks() as ticks, site.scratch() as scratch:
        for _ in range(runs(PAUSE_RUNS)):
            for size, felt in ((LARGEST, farms), (1, ones)):
                with _first_seen(site) as seen, ticks.window() as window:
                    _ours(site, size, with_memory=True)
                window.ended = int(seen[0] * 1e9)  # the clones' own work may slow the source
                felt.append(ticks.longest(window))
            bare.append(_memory_snapshot(site, ticks, scratch))
    result = Result.of(farms, bare, "virsh snapshot-create-as --live --memspec", "ms")
    result.peer_command = str(peers.MEMORY_SNAPSHOT)
    result.note = (
        f"longest gap of a 1 ms ticker, POST to the first clone that runs, farms of {LARGEST}"
    )
    result.also = {"guest_gap_of_one_ms": statistics.median(ones)}
    book.record("clone_memory_pause", result)


def _memory_snapshot(site: Site, ticks: Recording, scratch: Path) -> float:
    """The longest gap of libvirt's snapshot with memory, which is merged and deleted again."""
    overlay, saved = scratch / "overlay.qcow2", scratch / "memory"
    places: dict[str, str | Path] = {"uri": site.uri, "domain": site.guest.name}
    with ticks.window() as window:
        peers.MEMORY_SNAPSHOT.run(**places, overlay=overlay, saved=saved)
    peers.COMMIT.run(**places, overlay=overlay)
    saved.unlink()
    return ticks.longest(window)


def virt_clone(site: Site, book: Book) -> None:
    """One clone of a stopped server: virt-clone refuses a running one."""
    peers.needed("virt-clone")
    with site.stopped():
        result = _beside(site, site.guest, peers.VIRT_CLONE, "virt-clone + start", SLOW_RUNS)
        unsynced = [
            _by_commands(site, site.guest, peers.VIRT_CLONE_UNSYNCED)
            for _ in range(runs(SLOW_RUNS))
        ]
    result.also["peer_unsynced_s"] = statistics.median(unsynced)
    result.note = "peer_unsynced_s: started while its copy is in the host's memory only"
    book.record("clone_vs_virt_clone", result)


def virt_clone_reflink(site: Site, book: Book) -> None:
    """The same of a raw disk, whose extents virt-clone can share."""
    peers.needed("virt-clone")
    with site.stopped(), site.scratch() as folder:
        disk = str(disks.raw_of(site.disk, folder / "system.raw"))
        memory = site.kind.memory_mib
        with Guest.create(site.hypervisor, folder, disks=[disk], memory_mib=memory) as guest:
            site.register(guest.name)
            called = "virt-clone --reflink + start"
            result = _beside(site, guest, peers.VIRT_CLONE_REFLINK, called, FAST_RUNS)
            site.forget(guest.name)
    result.note = "of a raw disk: libvirt refuses --reflink for a qcow2"
    book.record("clone_vs_virt_clone_reflink", result)


def linked(site: Site, book: Book) -> None:
    """One clone of a stopped server, beside one that hangs on its source's disk."""
    with site.stopped():
        called = "qemu-img create -b + define + start"
        result = _beside(site, site.guest, peers.LINKED, called, FAST_RUNS)
    result.note = "the peer's clone is lost once its source's disk is written to or deleted"
    book.record("clone_vs_linked", result)


def _beside(site: Site, guest: Guest, bare: Bare, called: str, count: int) -> Result:
    """A farm of one of a stopped server, beside commands that make and start a clone of it."""
    ours, theirs = [], []
    for _ in range(runs(count)):
        ours.append(_ours(site, 1, guest).seconds)
        theirs.append(_by_commands(site, guest, bare))
    return Result.of(ours, theirs, called, peer_command=str(bare))


def _ours(site: Site, size: int, guest: Guest | None = None, **wishes: Any) -> Done:
    """A farm, which is gone again. Raises RuntimeError for a clone that libvirt does not run."""
    source = (guest or site.guest).name
    stem = _stem()
    names = [f"{stem}-{number}" for number in range(1, size + 1)]
    with _gone_after(site, names):
        done = site.clones(f"{stem}-{{n}}", size, source, **wishes)
        if wishes.get("start", True):
            _running(site, names)
    for name in names:
        site.forget(name)
    return done


def _bare(site: Site, size: int) -> float:
    """Seconds of libvirt's calls alone for as many clones, made ready before."""
    stem = _stem()
    names = [f"{stem}-{number}" for number in range(size)]
    with site.scratch() as scratch, _gone_after(site, names):
        definitions = []
        for name in names:
            copy = scratch / f"{name}.qcow2"
            copied_by = peers.CP_SPARSE if site.kind.written else peers.CP_REFLINK
            copied_by.run(disk=site.disk, copy=copy)
            definitions.append(_definition(site.guest, name, copy))
        with site.hypervisor.connection() as connection:
            began = time.perf_counter()
            for definition in definitions:
                connection.defineXML(definition).create()
            took = time.perf_counter() - began
        _running(site, names)
    return took


def _by_commands(site: Site, guest: Guest, bare: Bare) -> float:
    name = _stem()
    with site.scratch() as scratch, _pools_as_before(site), _gone_after(site, [name]):
        copy, definition = scratch / "copy", scratch / "definition.xml"
        definition.write_text(_definition(guest, name, copy))
        took = bare.run(
            uri=site.uri,
            domain=guest.name,
            name=name,
            disk=guest.disks[0],
            copy=copy,
            definition=definition,
        )
        _running(site, [name])
    return took


def _definition(guest: Guest, name: str, disk: Path) -> str:
    """As ours would be."""
    source = guest.domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
    made = clone_definition(source, name=name, uuid=str(uuid4()), disk_paths={"vda": str(disk)})
    return made.xml


def _stem() -> str:
    return f"{_FARM}{next(_numbers)}"


def _running(site: Site, names: list[str]) -> None:
    with site.hypervisor.connection() as connection:
        running = {domain.name() for domain in connection.listAllDomains() if domain.isActive()}
    if missing := set(names) - running:
        raise RuntimeError(f"{len(missing)} of {len(names)} clones do not run: {min(missing)}")


@contextlib.contextmanager
def _boot_put_off(site: Site) -> Iterator[None]:
    """Whatever is started from the guest's definition waits in its firmware, at a boot menu."""
    domain = site.guest.domain
    before = domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
    menu = f"<bootmenu enable='yes' timeout='{MENU_MS}'/></os>"
    site.guest.connection.defineXML(before.replace("</os>", menu))
    try:
        yield
    finally:
        site.guest.connection.defineXML(before)


@contextlib.contextmanager
def _gone_after(site: Site, names: list[str]) -> Iterator[None]:
    """The domains of these names are destroyed, forgotten and their files deleted."""
    try:
        yield
    finally:
        for name in names:
            with attach(site.hypervisor, name):
                pass
        site.settle()


@contextlib.contextmanager
def _pools_as_before(site: Site) -> Iterator[None]:
    """virt-clone defines a storage pool for each folder that it writes to."""
    with site.hypervisor.connection() as connection:
        before = {pool.UUIDString() for pool in connection.listAllStoragePools()}
    try:
        yield
    finally:
        with site.hypervisor.connection() as connection:
            for pool in connection.listAllStoragePools():
                if pool.UUIDString() not in before:
                    if pool.isActive():
                        pool.destroy()
                    pool.undefine()


FIGURES = [
    Figure(
        (
            *(f"clone_cold_{size}" for size in FARMS),
            "clone_cold_1_unfrozen",
            "farm_growth",
            "clone_cold_10_booting",
        ),
        "xfs_farm",
        cold,
    ),
    *(
        Figure((f"clone_cold_1_{site}",), site, partial(cold_elsewhere, f"clone_cold_1_{site}"))
        for site in ("btrfs", "ext4")
    ),
    Figure(tuple(f"clone_memory_{size}" for size in MEMORY_FARMS), "xfs_farm", with_memory),
    Figure(("farm_pause_growth",), "xfs_farm", pause),
    Figure(("clone_memory_pause",), "xfs_farm", memory_pause),
    Figure(("clone_vs_virt_clone",), "xfs_farm", virt_clone),
    Figure(("clone_vs_virt_clone_reflink",), "xfs_farm", virt_clone_reflink),
    Figure(("clone_vs_linked",), "xfs_farm", linked),
]
