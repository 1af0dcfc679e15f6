"""The part `snapshot`: what a snapshot costs from the request to its end, and what its guest feels.

All of it on running guests but `snapshot_api`, and as shipped: the guest's agent freezes its
file systems unless a figure says otherwise.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from bench import peers
from bench.book import Book
from bench.figure import Figure
from bench.result import Result
from bench.site import Site
from bench.sizes import runs
from bench.ticker import Recording, Window
from lab.guest import Guest
from shared.disks.engine import capture
from shared.disks.reflink import clone_into_fd, create_target, sync_source

API_RUNS = 100
RUNS = 20
SLOW_RUNS = 10
"""Of what takes ten seconds and more, none of which the guest is held for."""
PEER_RUNS = 5
"""Of peers that are slow, and whose time nothing hangs on."""
SCRATCH_FILE = "/root/scratch"
NOT_ALONE = (
    "the agent's freeze left out, as the peer has none; ours also plans, makes sure that nobody "
    "else is at work on the domain, arms and disarms the watchdog, and checks the copy"
)
BY_HAND = "virDomainSuspend, FICLONE of each disk, virDomainResume, in one process"


def api(site: Site, book: Book) -> None:
    """A stopped one-disk server of 128 MiB, beside the bare system call."""
    with Guest.create(site.hypervisor, site.folder / "small") as guest, site.scratch() as scratch:
        site.register(guest.name)
        ours, bare = [], []
        for _ in range(runs(API_RUNS)):
            ours.append(site.snapshot(guest.name).seconds)
            bare.append(_ficlone(guest.disks[0], scratch / "copy"))
        site.clear()
    book.record("snapshot_api", Result.of(ours, bare, "bare FICLONE of the disk"))


def engine(site: Site, book: Book) -> None:
    """The copy engine alone, without the API, the queue and the database."""
    ours, held, bare = [], [], []
    with site.watchdog() as watchdog, site.scratch() as scratch:
        domain = site.domain
        for number in range(runs(RUNS) + 1):
            place = scratch / str(number)
            place.mkdir(mode=0o711)
            began = time.perf_counter()
            taken = capture(domain, place, watchdog=watchdog, quiesce="never")
            ours.append(time.perf_counter() - began)
            held.append(taken.pause_ms)
            bare.append(_by_hand(site, scratch))
    del ours[0], held[0], bare[0]  # what a process does for the first time takes longer
    more = {"peer_command": BY_HAND, "note": NOT_ALONE}
    book.record(
        "engine_vs_syscalls",
        Result.of(ours, bare, "suspend + FICLONE + resume by hand", **more),
    )
    in_ms = [seconds * 1000 for seconds in bare]
    book.record(
        "engine_pause_vs_syscalls",
        Result.of(held, in_ms, "suspend + FICLONE + resume by hand", "ms", **more),
    )


def pause(name: str, site: Site, book: Book) -> None:
    """The longest gap in the guest's ticker, beside that of libvirt's own snapshot."""
    ours, still, told, theirs, merging = [], [], [], [], []
    ours_s, theirs_s = [], []
    with site.ticks() as ticks, site.scratch() as scratch:
        site.snapshot()
        for number in range(_runs_on(site)):
            with ticks.window() as window:
                done = site.snapshot()
            ours.append(ticks.longest(window))
            ours_s.append(done.seconds)
            told.append(done.pause_ms)
            still.append(_still(ticks, done.seconds))
            if number < PEER_RUNS or name == "guest_pause":
                gaps, seconds = _virsh_snapshot(site, ticks, scratch / "overlay.qcow2")
                theirs.append(gaps[0])
                merging.append(gaps[1])
                theirs_s.append(seconds)
        site.clear()
    also = {
        "engine_pause_ms": statistics.median(told),
        "without_copy_ms": statistics.median(still),
        "longest_of_all_ms": max(ours),
        "peer_commit_gap_ms": statistics.median(merging),
    }
    command = str(peers.SNAPSHOT)
    peer = "virsh snapshot-create-as --disk-only"
    note = (
        "longest gap between a 1 ms ticker's bytes by the host's clock, POST to succeeded, "
        f"file systems frozen; peer {len(theirs)} runs, its commit not counted"
    )
    result = Result.of(ours, theirs, peer, "ms", peer_command=command, note=note, also=also)
    book.record(name, result)
    if name == "guest_pause":
        peer, command = "virsh snapshot + commit", f"{peers.SNAPSHOT} && {peers.COMMIT}"
        result = Result.of(ours_s, theirs_s, peer, peer_command=command)
        book.record("snapshot_running", result)


def pause_of_many_pieces(name: str, site: Site, book: Book) -> None:
    """The same with a second disk in very many extents, beside sharing them all in the pause."""
    ours, still, told, theirs, ways, took = [], [], [], [], set(), []
    with site.ticks() as ticks, site.scratch() as scratch:
        site.snapshot()
        for number in range(runs(SLOW_RUNS)):
            with ticks.window() as window:
                done = site.snapshot()
            ours.append(ticks.longest(window))
            told.append(done.pause_ms)
            took.append(done.seconds)
            ways.add(done.result["way"])
            if number < PEER_RUNS:
                still.append(_still(ticks, done.seconds))
                with ticks.window() as window:
                    _by_hand(site, scratch)
                theirs.append(ticks.longest(window))
        site.clear()
    also = {
        "engine_pause_ms": statistics.median(told),
        "without_copy_ms": statistics.median(still),
        "longest_of_all_ms": max(ours),
        "extents": site.kind.pieces,
        "took_s": statistics.median(took),
        "ways": sorted(ways),
    }
    peer = "FICLONE inside the pause"
    result = Result.of(ours, theirs, peer, "ms", peer_command=BY_HAND, also=also)
    result.note = "the freeze writes to this disk as well; engine_pause_ms is 0 where it streamed"
    book.record(name, result)


def write_latency(suffix: str, site: Site, book: Book) -> None:
    """4 KiB O_DIRECT|O_DSYNC writes one after the other onto the disk that is copied."""
    for name, quiesce in (("", "auto"), ("_unfrozen", "never")):
        ours, still, longest, held = [], [], [], []
        with site.ticks("write", SCRATCH_FILE) as writes:
            site.snapshot(quiesce=quiesce)
            for _ in range(_runs_on(site)):
                with writes.window() as window:
                    done = site.snapshot(quiesce=quiesce)
                ours += list(writes.gaps(window))
                longest.append(writes.longest(window))
                held.append(done.pause_ms)
                still += list(writes.gaps(_nothing_for(writes, done.seconds)))
        site.clear()
        peer = Result(_p99(still), None, None, len(still), "ms").ours
        result = Result(
            _p99(ours),
            peer,
            "the same without a copy",
            len(longest),
            "ms",
            note=f"quiesce: {quiesce}; {len(ours)} writes from POST to succeeded, by the host's "
            "clock; each with the virtio-serial byte that tells of it",
            also={
                "longest_ms": statistics.median(longest),
                "engine_pause_ms": statistics.median(held),
                "median_ms": statistics.median(ours),
                "median_without_copy_ms": statistics.median(still),
            },
        )
        book.record(f"guest_write_latency_p99{name}{suffix}", result)


def _runs_on(site: Site) -> int:
    """Fewer where each copy is of every byte."""
    return runs(SLOW_RUNS if site.kind.written else RUNS)


def _virsh_snapshot(
    site: Site, ticks: Recording, overlay: Path
) -> tuple[tuple[float, float], float]:
    """libvirt's snapshot and the commit after it: the longest gap of each, seconds of both."""
    places: dict[str, str | Path] = {
        "uri": site.uri,
        "domain": site.guest.name,
        "overlay": overlay,
    }
    with ticks.window() as snapping:
        seconds = peers.SNAPSHOT.run(**places)
    with ticks.window() as merging:
        seconds += peers.COMMIT.run(**places)
    return (ticks.longest(snapping), ticks.longest(merging)), seconds


def _still(ticks: Recording, seconds: float) -> float:
    """The longest gap of as long a time in which nothing is copied."""
    return ticks.longest(_nothing_for(ticks, seconds))


def _nothing_for(ticks: Recording, seconds: float) -> Window:
    with ticks.window() as window:
        time.sleep(seconds)
    return window


def _by_hand(site: Site, scratch: Path) -> float:
    """Seconds that suspend, FICLONE of each disk and resume take; all is written out before."""
    domain = site.domain
    with contextlib.ExitStack() as undo:
        pairs = []
        for number, disk in enumerate(site.guest.disks):
            source = undo.enter_context(disk.open("rb")).fileno()
            copy = scratch / f"by-hand-{number}"
            target = create_target(source, copy)
            undo.callback(copy.unlink)
            undo.callback(os.close, target)
            sync_source(disk)
            pairs.append((source, target))
        began = time.perf_counter()
        domain.suspend()
        try:
            for source, target in pairs:
                clone_into_fd(source, target)
        finally:
            domain.resume()
        return time.perf_counter() - began


def _ficlone(source: Path, copy: Path) -> float:
    began = time.perf_counter()
    with source.open("rb") as read:
        target = create_target(read.fileno(), copy)
        clone_into_fd(read.fileno(), target)
        os.fsync(target)
        os.close(target)
    took = time.perf_counter() - began
    copy.unlink()
    return took


def _p99(values: list[float]) -> float:
    return statistics.quantiles(values, n=100)[-1]


def _pauses(name: str, site: str, measure: Callable[[str, Site, Book], None] = pause) -> Figure:
    return Figure((name,), site, partial(measure, name))


FIGURES = [
    Figure(("snapshot_api",), "xfs", api),
    Figure(("engine_vs_syscalls", "engine_pause_vs_syscalls"), "xfs", engine),
    Figure(("guest_pause", "snapshot_running"), "xfs", partial(pause, "guest_pause")),
    *(
        Figure(
            tuple(f"guest_write_latency_p99{name}{suffix}" for name in ("", "_unfrozen")),
            site,
            partial(write_latency, suffix),
        )
        for site, suffix in (("xfs", ""), ("btrfs", "_btrfs"), ("ext4", "_ext4"))
    ),
    _pauses("guest_pause_btrfs", "btrfs"),
    _pauses("guest_pause_ext4", "ext4"),
    _pauses("guest_pause_8g", "xfs_8g"),
    _pauses("guest_pause_20g", "xfs_20g"),
    _pauses("guest_pause_200k_extents", "xfs_200k_extents", pause_of_many_pieces),
]
