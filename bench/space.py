"""The part `space`: what images of a server that lives cost, in bytes and in pause."""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np

from bench import disks, peers
from bench.book import Book
from bench.figure import Figure
from bench.result import Result
from bench.site import Site
from bench.sizes import CHURN, CHURN_BLOCK, runs
from shared.disks.extents import extents

DAYS = 7
MANY = 50
ENDS = 3
"""So many images at either end of the many are compared, by their medians."""


def seven(suffix: str, site: Site, book: Book) -> None:
    """Daily images of a server of whose data 5 % are written anew each day, in random blocks."""
    dice = random.Random(DAYS)  # noqa: S311  the same blocks in each run
    changed = 0
    site.guest.wait_ready()  # or it does not hear that it is to shut down
    with site.stopped():
        before = site.used()
        for day in range(DAYS):
            if day:
                changed += disks.churn(site.disk, site.data, CHURN, dice)
            site.image(name=f"day-{day}")
        grown = site.used() - before
    images = sorted(site.vault.glob("**/*.qcow2"), key=lambda path: path.stat().st_mtime_ns)
    if len(images) != DAYS:
        raise RuntimeError(f"{len(images)} images are in the vault, not {DAYS}")
    first, held = images[0].stat().st_blocks * 512, blocks_held(images)
    note = (
        f"{DAYS} images, between two of them {CHURN:.0%} of the data written in random "
        f"{CHURN_BLOCK // 1024} KiB blocks; blocks that images share are counted once (FIEMAP)"
    )
    book.record(
        f"seven_images_space{suffix}",
        Result(held, first + changed, "first image plus bytes changed", DAYS, "B", note=note),
    )
    note = "growth of the file system (df) while the server itself stays on it"
    growth = Result(grown, changed, "bytes changed", DAYS, "B", note=note)
    book.record(f"seven_images_growth{suffix}", growth)
    if not suffix:
        _chunk_stores(site, book, images, held)
    site.clear()


def _chunk_stores(site: Site, book: Book, images: list[Path], held: int) -> None:
    """borg and restic with the same seven disks, oldest first, into a repository each."""
    for program, init, bare in peers.CHUNK_STORES:
        name = f"seven_images_space_{program}"
        try:
            peers.needed(program)
            with site.scratch() as scratch:  # gone before the next one's: there is room for one
                init.run(repo=scratch)
                took = [
                    bare.run(repo=scratch, disk=disk, name=f"day-{day}")
                    for day, disk in enumerate(images)
                ]
                size = sum(path.lstat().st_blocks * 512 for path in scratch.rglob("*"))
        except RuntimeError as error:
            book.fail(name, str(error))
            continue
        also = {"peer_first_s": took[0], "peer_next_s": statistics.median(took[1:])}
        book.record(name, Result(held, size, program, DAYS, "B", str(bare), also=also))


def blocks_held(paths: Iterable[Path]) -> int:
    """Bytes of the disk that these files stand on, those they share counted once."""
    pieces = []
    for path in paths:
        with path.open("rb") as file:
            found = extents(file.fileno())
        pieces.append(np.stack([found.physical, found.physical + found.length], axis=1))
    return covered(np.concatenate(pieces))


def covered(pieces: np.ndarray) -> int:
    """How much of the line the pieces (rows of start and end) cover together."""
    pieces = pieces[np.argsort(pieces[:, 0], kind="stable")].astype(np.int64)
    reached = np.concatenate([[0], np.maximum.accumulate(pieces[:, 1])[:-1]])
    return int(np.maximum(pieces[:, 1] - np.maximum(pieces[:, 0], reached), 0).sum())


def fifty(site: Site, book: Book) -> None:
    """Pause and time at the end of many images of a running server, over those at the beginning."""
    pauses, seconds, pieces = [], [], []
    count, blocks = max(runs(MANY), 2 * ENDS), int(site.data * CHURN / CHURN_BLOCK)
    site.guest.wait_ready()
    for number in range(count):
        site.churn_inside(blocks, seed=number)
        done = site.image()
        pauses.append(done.pause_ms)
        seconds.append(done.seconds)
        with site.disk.open("rb") as disk:
            pieces.append(len(extents(disk.fileno())))
    site.clear()
    note = (
        f"the last {ENDS} of {count} images over the first {ENDS}; before each the guest "
        f"writes {blocks} random {CHURN_BLOCK // 1024} KiB blocks, {CHURN:.0%} of its "
        "data; none is deleted"
    )
    also = {"extents_at_first": pieces[0], "extents_at_last": pieces[-1]}
    for name, values, unit in (("pause", pauses, "ms"), ("time", seconds, "s")):
        result = Result.of(values[-ENDS:], values[:ENDS], "the first images", unit, note=note)
        result.runs, result.also = count, {**also, "longest": max(values)}
        book.record(f"fifty_images_{name}_growth", result)


FIGURES = [
    Figure(("fifty_images_pause_growth", "fifty_images_time_growth"), "xfs", fifty),
    Figure(
        (
            "seven_images_space",
            "seven_images_growth",
            "seven_images_space_borg",
            "seven_images_space_restic",
        ),
        "xfs_space",
        partial(seven, ""),
    ),
    *(
        Figure(
            (f"seven_images_space_{site}", f"seven_images_growth_{site}"),
            site,
            partial(seven, f"_{site}"),
        )
        for site in ("btrfs", "ext4")
    ),
]
