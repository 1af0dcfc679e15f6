"""Sharing fragmented disks while the guest runs, so that little is left to do while it is held.

Owns: the rounds before the pause. Sharing all extents of a file costs about 19 µs each, so a
disk in 100,000 pieces would hold its guest for two seconds. Here the whole disk is shared while
the guest goes on writing, then what it wrote meanwhile, again and again while that gets less, as
live migration does with RAM. In the pause remains to find what the last moments changed.
"""

import os
import time
from collections.abc import Callable, Sequence

import numpy as np

from shared.disks.errors import PauseTooLong
from shared.disks.extents import Extents, count_extents, difference, extents
from shared.disks.reflink import SHARE_COST_MS, clone_into_fd, clone_ranges

AT_A_TIME = 1000
"""Extents shared by one call, for whose length the guest cannot write: some 20 ms."""
FEW = 64
"""So many ranges cost less than finding them; going on would not make them fewer."""
MOST_ROUNDS = 8
SHRINKS = 0.7
"""A round that leaves more than this part of the one before is the last."""
TICK_NS = 20_000_000
"""More than a tick of the clock that the kernel stamps files with (10 ms at the most)."""
NEGLIGIBLE_MS = 3.0
"""Less than that in the pause is not worth a wait, in which a frozen guest cannot write."""
_TO_THE_END = (1 << 64) - 1


class CatchingUp:
    """One disk's copy on its way: open source and target, and what the target holds."""

    def __init__(self, source: int, target: int) -> None:
        self.source, self.target = source, target
        self._held: Extents | None = None
        self._written_ns: int | None = None
        self._cost_ms = 0.0

    def begin(self, check: Callable[[], None]) -> None:
        """Share the whole file bit by bit, whatever is written meanwhile. Raises what reflinks
        and `check` raise."""
        os.fdatasync(self.source)
        cuts = extents(self.source).logical[AT_A_TIME::AT_A_TIME]
        starts = np.concatenate([np.zeros(1, np.uint64), cuts])
        ends = np.append(cuts, np.uint64(_TO_THE_END))
        for each in np.stack([starts, ends], axis=1):
            check()
            clone_ranges(self.source, self.target, each[np.newaxis])
        self._held = extents(self.target)

    def round(self) -> int:
        """Share what has changed since; returns in how many ranges that was."""
        self._written_ns = self._stamp()
        self._drain()
        os.fdatasync(self.source)
        started = time.perf_counter()
        changed = self._share_changes()
        self._cost_ms = (time.perf_counter() - started) * 1000
        self._held = extents(self.target)
        return changed

    @property
    def expected_ms(self) -> float:
        """What `finish` would take now, as the last round tells, or the number of extents."""
        if self._held is None:
            return count_extents(self.source) * SHARE_COST_MS
        return 0.0 if self._untouched else self._cost_ms

    def finish(self) -> None:
        """Share the rest, or all if nothing was yet, while nobody writes: the files are equal."""
        if self._held is None:
            clone_into_fd(self.source, self.target)
        elif not self._untouched:
            os.fdatasync(self.source)
            self._share_changes()

    def _share_changes(self) -> int:
        assert self._held is not None, "begin() comes first"  # noqa: S101
        ranges = difference(extents(self.source), self._held)
        clone_ranges(self.source, self.target, ranges)
        return len(ranges)

    @property
    def _untouched(self) -> bool:
        """Whether no write to the source began since the last round did, nor just before it.

        Every write stamps its file when it begins, by a clock that stands still for a tick at a
        time.
        """
        return self._written_ns is not None and self._stamp() == self._written_ns

    def _stamp(self) -> int | None:
        """When the last write began; None if that was too lately to tell a later one from it."""
        stamp = os.fstat(self.source).st_mtime_ns
        now = time.clock_gettime_ns(time.CLOCK_REALTIME)
        return stamp if abs(now - stamp) > TICK_NS else None

    def _drain(self) -> None:
        """Wait for the writes that have begun, those past the page cache too: to share a block
        the kernel locks the file and waits for them (generic_remap_file_range_prep)."""
        block = os.fstatvfs(self.source).f_bsize
        clone_ranges(self.source, self.target, np.array([[0, block]], np.uint64))


def catch_up(copies: Sequence[CatchingUp], budget_ms: float, check: Callable[[], None]) -> None:
    """Bring the copies as near to their sources as they come. `check` raises when the work must
    stop. Raises PauseTooLong where what is left would still hold the guest for too long."""
    for copy in copies:
        copy.begin(check)
    follow(copies, budget_ms, check)


def follow(
    copies: Sequence[CatchingUp], budget_ms: float, check: Callable[[], None] = lambda: None
) -> None:
    """The rounds of `catch_up`, also for what has been written since it ended."""
    before, waited = None, False
    for _ in range(MOST_ROUNDS):
        check()
        changed = sum(copy.round() for copy in copies)
        enough = changed <= FEW or (before is not None and changed > before * SHRINKS)
        left_ms = sum(copy.expected_ms for copy in copies)
        if enough and left_ms <= budget_ms:
            if waited or left_ms < NEGLIGIBLE_MS:
                return
            # What was written a moment ago, as by a freeze, cannot be told from what is written
            # now; once it can, nothing is to be looked for in the pause.
            time.sleep(TICK_NS / 1e9)
            waited = True
        before = changed
    refuse_if_too_long(copies, budget_ms)


def finish(copies: Sequence[CatchingUp], budget_ms: float) -> None:
    """Make all copies equal to their sources, which nobody writes. Raises PauseTooLong, before
    anything is done, where that would take longer than the budget."""
    refuse_if_too_long(copies, budget_ms)
    for copy in copies:
        copy.finish()


def refuse_if_too_long(copies: Sequence[CatchingUp], budget_ms: float) -> None:
    expected_ms = sum(copy.expected_ms for copy in copies)
    if expected_ms > budget_ms:
        raise PauseTooLong.expected(expected_ms, budget_ms)
