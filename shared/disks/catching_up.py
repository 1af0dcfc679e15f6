"""Sharing fragmented disks while the guest runs, so that little is left to do while it is held.

Owns: the rounds before the pause. Sharing all extents of a file costs about 19 µs each, so a
disk in 100,000 pieces would hold its guest for two seconds. Here the whole disk is shared while
the guest goes on writing, then what it wrote meanwhile, again and again while that gets less, as
live migration does with RAM. In the pause remains to find what the last moments changed.
"""

import os
import time
from collections.abc import Callable, Sequence

from shared.disks.errors import PauseTooLong
from shared.disks.extents import Extents, Ranges, difference, extents
from shared.disks.reflink import clone_into_fd, clone_ranges

FEW = 64
"""So many ranges cost less than finding them; going on would not make them fewer."""
MOST_ROUNDS = 8
SHRINKS = 0.7
"""A round that leaves more than this part of the one before is the last."""
RANGE_COST_MS = 0.05
"""Measured: what sharing one range takes."""
_TICK_NS = 50_000_000
"""More than a tick of the clock that the kernel stamps files with (10 ms at the most)."""


class CatchingUp:
    """One disk's copy on its way: open source and target, and what the target holds."""

    def __init__(self, source: int, target: int) -> None:
        self.source, self.target = source, target
        self._held: Extents | None = None
        self._written_ns: int | None = None
        self._cost_ms = 0.0

    def begin(self) -> None:
        """Share the whole file, whatever is written meanwhile. Raises what reflinks raise."""
        os.fdatasync(self.source)
        clone_into_fd(self.source, self.target)
        self._held = extents(self.target)

    def round(self) -> int:
        """Share what has changed since; returns in how many ranges that was."""
        self._written_ns = self._stamp()
        started = time.perf_counter()
        ranges = self._behind()
        self._cost_ms = (time.perf_counter() - started) * 1000 + len(ranges) * RANGE_COST_MS
        clone_ranges(self.source, self.target, ranges)
        self._held = extents(self.target)
        return len(ranges)

    @property
    def expected_ms(self) -> float:
        """What `finish` would take now, as the last round tells."""
        return 0.0 if self._untouched else self._cost_ms

    def finish(self, budget_ms: float) -> None:
        """Share the rest, or all if nothing was yet, while nobody writes: the files are equal.

        Raises PauseTooLong where that would take longer than `budget_ms`, before it is begun.
        """
        if self._held is None:
            clone_into_fd(self.source, self.target)
        elif not self._untouched:
            if self._cost_ms > budget_ms:
                raise PauseTooLong.expected(self._cost_ms, budget_ms)
            clone_ranges(self.source, self.target, self._behind())

    @property
    def _untouched(self) -> bool:
        """Whether the source was not written since the last round began, nor just before it.

        Every write stamps its file, by a clock that stands still for a tick at a time.
        """
        return self._written_ns is not None and self._stamp() == self._written_ns

    def _stamp(self) -> int | None:
        """When the source was written last; None if that was too lately to tell a later write."""
        stamp = os.fstat(self.source).st_mtime_ns
        now = time.clock_gettime_ns(time.CLOCK_REALTIME)
        return stamp if abs(now - stamp) > _TICK_NS else None

    def _behind(self) -> Ranges:
        assert self._held is not None, "begin() comes first"  # noqa: S101
        os.fdatasync(self.source)
        return difference(extents(self.source), self._held)


def catch_up(copies: Sequence[CatchingUp], budget_ms: float, check: Callable[[], None]) -> None:
    """Bring the copies as near to their sources as they come. `check` raises when the work must
    stop. Raises PauseTooLong where what is left would still hold the guest for too long."""
    for copy in copies:
        check()
        copy.begin()
    before = None
    for _ in range(MOST_ROUNDS):
        check()
        changed = sum(copy.round() for copy in copies)
        expected_ms = sum(copy.expected_ms for copy in copies)
        enough = changed <= FEW or (before is not None and changed > before * SHRINKS)
        if enough and expected_ms <= budget_ms:
            return
        before = changed
    if expected_ms > budget_ms:
        raise PauseTooLong.expected(expected_ms, budget_ms)
