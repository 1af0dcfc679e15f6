"""The part `image`: a whole copy of a server, from the request to its end, beside other ways.

Where extents are shared ours is an image of a running server, taken at one instant; that the
peers' copy of it is not, is not held against them. `stream` is measured on ext4.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from bench import peers
from bench.book import Book
from bench.figure import Figure
from bench.peers import Bare, gone_after
from bench.result import Result
from bench.site import Done, Site
from bench.sizes import runs

RUNS = 20
CONVERT_RUNS = {2: 6, 8: 3, 20: 2}
"""Of `qemu-img convert`, by GiB of data, the one that does not count included."""
STREAM_RUNS = 5
WARM_UP = 1
"""Runs that do not count where each byte is written: whoever writes first into a new file system
has the blocks of its backing file allocated for all that come after."""
SLOW_RUNS = 1
"""Of tools that take most of a minute, and only once have all to store."""
INCONSISTENT = "the peer reads a disk that its guest writes to: no picture of an instant"
FASTEST = "qemu-img convert, its fastest flags"


def reflink(name: str, site: Site, book: Book, **wishes: str) -> None:
    """An image of the running server, beside `qemu-img convert` with its fastest flags."""
    ours, theirs = [], []
    with site.scratch() as scratch:
        _image(site, **wishes)
        for number in range(runs(RUNS)):
            ours.append(_image(site, **wishes))
            if number < runs(CONVERT_RUNS[site.kind.data]):
                theirs.append(_bare(site, peers.CONVERT, scratch))
    theirs = theirs[WARM_UP:] or theirs
    command, note = str(peers.CONVERT), f"peer {len(theirs)} runs; {INCONSISTENT}"
    result = Result.of(*_timed(ours, theirs), FASTEST, peer_command=command, note=note)
    result.also = {"way": ours[0].result["way"], "bytes": ours[0].result["bytes"]}
    result.also["guests_own_freeze_ms"] = site.freeze_ms()
    book.record(name, result)


def others(site: Site, book: Book) -> None:
    """The same image beside what else is in use; each peer's figure stands for itself."""
    theirs = {
        "convert_default": (peers.CONVERT_DEFAULT, "qemu-img convert, no flags", 3),
        "cp_sparse": (peers.CP_SPARSE, "cp --sparse=always", 3),
        "cp_reflink": (peers.CP_REFLINK, "cp --reflink=always", RUNS),
    }
    with site.scratch() as scratch:
        for name, (bare, called, count) in theirs.items():
            ours, peer = [], []
            for _ in range(runs(count)):
                ours.append(_image(site))
                peer.append(_bare(site, bare, scratch))
            result = Result.of(*_timed(ours, peer), called, peer_command=str(bare))
            result.note = INCONSISTENT
            book.record(f"image_vs_{name}", result)


def virsh_backup(site: Site, book: Book) -> None:
    """The one peer that copies a running server at one instant without sharing extents."""
    ours, theirs = _beside_backup(site)
    peer = "virsh backup-begin, full, push to qcow2"
    result = Result.of(*_timed(ours, theirs), peer, peer_command=peers.BACKUP)
    book.record("image_vs_virsh_backup", result)


def chunk_stores(site: Site, book: Book) -> None:
    """borg and restic, whose first copy holds all of the data, as an image does."""
    for program, init, bare in peers.CHUNK_STORES:
        name = f"image_vs_{program}"
        ours, theirs = [], []
        try:
            peers.needed(program)
            with site.scratch() as scratch:
                init.run(repo=scratch)
                for number in range(runs(STREAM_RUNS)):
                    ours.append(_image(site))
                    if number < SLOW_RUNS:
                        theirs.append(bare.run(repo=scratch, disk=site.disk, name="first"))
        except RuntimeError as error:
            book.fail(name, str(error))
            continue
        result = Result.of(*_timed(ours, theirs), program, peer_command=str(bare))
        result.note = f"peer {SLOW_RUNS} run, into an empty repository; {INCONSISTENT}"
        book.record(name, result)


def stream_stopped(site: Site, book: Book) -> None:
    """Where no extents can be shared, a stopped server."""
    ours, theirs = [], []
    with site.stopped(), site.scratch() as scratch:
        for _ in range(WARM_UP + runs(STREAM_RUNS)):
            ours.append(_image(site))
            theirs.append(_bare(site, peers.CONVERT, scratch))
    del ours[:WARM_UP], theirs[:WARM_UP]
    result = Result.of(*_timed(ours, theirs), FASTEST, peer_command=str(peers.CONVERT))
    result.also = {"way": ours[0].result["way"], "bytes": ours[0].result["bytes"]}
    book.record("stream_stopped", result)


def stream_running(site: Site, book: Book) -> None:
    """Where no extents can be shared, a running server."""
    ours, theirs = _beside_backup(site)
    peer = "virsh backup-begin, full, push to qcow2"
    result = Result.of(*_timed(ours, theirs), peer, peer_command=peers.BACKUP)
    result.also = {"way": ours[0].result["way"], "bytes": ours[0].result["bytes"]}
    result.note = (
        "the same job of QEMU's; ours also freezes and thaws the guest, checks the copy, writes "
        "its manifest, and ends when its caller knows"
    )
    book.record("stream_running", result)


def _beside_backup(site: Site) -> tuple[list[Done], list[float]]:
    ours, theirs = [], []
    with site.scratch() as scratch:
        for _ in range(WARM_UP + runs(STREAM_RUNS)):
            ours.append(_image(site))
            with gone_after(scratch / "backup.qcow2") as copy:
                theirs.append(peers.backup(site.uri, site.guest.name, copy))
            site.settle()
    return ours[WARM_UP:], theirs[WARM_UP:]


def _image(site: Site, **wishes: str) -> Done:
    """An image, which is deleted again; nothing of it is left to write out."""
    done = site.image(**wishes)
    site.clear()
    site.settle()
    return done


def _bare(site: Site, bare: Bare, scratch: Path) -> float:
    with gone_after(scratch / "copy.qcow2") as copy:
        took = bare.run(disk=site.disk, copy=copy)
    site.settle()
    return took


def _timed(ours: list[Done], theirs: list[float]) -> tuple[list[float], list[float]]:
    return [done.seconds for done in ours], theirs


def _reflinks(name: str, site: str, **wishes: str) -> Figure:
    measure: Callable[[Site, Book], None] = partial(reflink, name, **wishes)
    return Figure((name,), site, measure)


FIGURES = [
    _reflinks("image_reflink_2g", "xfs"),
    _reflinks("image_reflink_2g_unfrozen", "xfs", quiesce="never"),
    _reflinks("image_reflink_2g_btrfs", "btrfs"),
    _reflinks("image_reflink_8g", "xfs_8g"),
    _reflinks("image_reflink_20g", "xfs_20g"),
    Figure(
        ("image_vs_convert_default", "image_vs_cp_sparse", "image_vs_cp_reflink"), "xfs", others
    ),
    Figure(("image_vs_virsh_backup",), "xfs", virsh_backup),
    Figure(("image_vs_borg", "image_vs_restic"), "xfs", chunk_stores),
    Figure(("stream_stopped",), "ext4", stream_stopped),
    Figure(("stream_running",), "ext4", stream_running),
]
