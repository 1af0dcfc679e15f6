"""How much is measured. The environment makes it small, to try the harness itself.

`BENCH_GIB_MIB=64` has 64 MiB count as a GiB, `BENCH_RUNS=2` allows no more than two runs. What
is measured so goes to `results/shrunk/`, never to the results, the table or the plots.
"""

from __future__ import annotations

import os

MIB = 2**20
GIB = int(os.environ.get("BENCH_GIB_MIB", "1024")) * MIB
"""Bytes of what the figures' names call a GiB."""
_MOST_RUNS = int(os.environ.get("BENCH_RUNS", "0"))
SHRUNK = GIB != 1024 * MIB or bool(_MOST_RUNS)

DATA_AT = 256 * MIB
"""Where the data begins on a disk; what lies before is the guest's system."""
EXTENTS = 200_000 * GIB // (1024 * MIB)
CHURN_BLOCK = 64 * 1024
CHURN = 0.05
"""Part of the data that is written between two daily images, in random blocks."""


def runs(wanted: int) -> int:
    """So many, or fewer where the environment says so."""
    return min(wanted, _MOST_RUNS) if _MOST_RUNS else wanted
