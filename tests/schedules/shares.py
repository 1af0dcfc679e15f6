"""A simulated year in shares of its servers: each has a process and a database of its own.

Rules are about a server, or about what is due on a host, so that shares need not know of each
other.
"""

from __future__ import annotations

import gc
import logging
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import pytest
import structlog
from operations.spine import NOBODY_LISTENS, World, surroundings
from schedules.accounts import Account, account
from schedules.year import DAY, Year

TOLD_EVERY = 7 * DAY


@dataclass
class Share:
    number: int
    servers: int
    days: int
    folder: Path
    template: Path
    """A migrated, empty database."""


def live(share: Share) -> Account:
    """Let the year of these servers go by, in this process."""
    share.folder.mkdir()
    database = share.folder / "triptych.db"
    shutil.copy(share.template, database)
    quiet = structlog.make_filtering_bound_logger(logging.CRITICAL)
    structlog.configure(wrapper_class=quiet)
    try:
        with (
            pytest.MonkeyPatch.context() as patch,
            surroundings(patch, share.folder, f"sqlite:///{database}", NOBODY_LISTENS),
        ):
            year = Year(World(patch), patch, share.servers, share.days, seed=share.number)
            gc.freeze()  # what is there by now stays, and need not be looked through again
            year.run(_Told(share))
            return account(year)
    finally:
        gc.unfreeze()
        structlog.reset_defaults()


def live_all(shares: list[Share]) -> list[Account]:
    """The same, each in its process."""
    with ProcessPoolExecutor(len(shares), mp_context=get_context("spawn")) as pool:
        return list(pool.map(live, shares))


class _Told:
    """Says on the way how far it is."""

    def __init__(self, share: Share) -> None:
        self.share, self.begun, self.next = share, time.monotonic(), TOLD_EVERY

    def __call__(self, year: Year) -> None:
        gone = year.moment - (year.end - year.days * DAY)
        if gone < self.next:
            return
        self.next += TOLD_EVERY
        minutes = (time.monotonic() - self.begun) / 60
        print(
            f"share {self.share.number}: day {gone.days} of {year.days}, {len(year.made):,} images,"
            f" {len(year.violations)} violations, {minutes:.1f} min",
            flush=True,
        )
