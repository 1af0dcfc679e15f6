"""The part `revert`: a running server is put back and runs again, beside a bare stop and start.

Neither waits for the guest to boot; before each run it has.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from bench import peers
from bench.book import Book
from bench.figure import Figure
from bench.result import Result
from bench.site import Done, Site
from bench.sizes import runs

RUNS = 10
FEW_RUNS = 5
"""On the other file systems; where no extents are shared, the whole disk is copied back each time.
"""
PEER = "virsh destroy + virsh start"


def revert(name: str, site: Site, book: Book) -> None:
    """To the server's snapshot."""
    site.snapshot()
    _beside_restart(name, site, book, f"/servers/{site.guest.name}/snapshot/revert")


def restore(name: str, site: Site, book: Book) -> None:
    """From an image."""
    image = site.image().result["image"]
    _beside_restart(name, site, book, f"/images/{image}/restore")


def _beside_restart(name: str, site: Site, book: Book, path: str) -> None:
    ours: list[float] = []
    theirs: list[float] = []

    def put_back() -> float:
        done: Done = site.operate(path, {})
        return done.seconds

    def restart() -> float:
        return peers.RESTART.run(uri=site.uri, domain=site.guest.name)

    for _ in range(runs(RUNS if site.kind.file_system == "xfs" else FEW_RUNS)):
        _on_booted(site, put_back, ours)
        _on_booted(site, restart, theirs)
    site.clear()
    book.record(name, Result.of(ours, theirs, PEER, peer_command=str(peers.RESTART)))


def _on_booted(site: Site, measure: Callable[[], float], into: list[float]) -> None:
    site.guest.wait_ready()
    into.append(measure())


FIGURES = [
    Figure((f"{what}{suffix}",), site, partial(measure, f"{what}{suffix}"))
    for site, suffix in (("xfs", ""), ("btrfs", "_btrfs"), ("ext4", "_ext4"))
    for what, measure in (("revert", revert), ("restore", restore))
]
