"""A simulated year: no slot twice, no gap without a reason, no rule broken (I3 to I6).

`make year` has it whole: 1,000 servers, 365 days. In `make test` it is a part of that.
"""

import os
from pathlib import Path

import pytest
from schedules.accounts import total
from schedules.shares import Share, live, live_all

WHOLE = os.environ.get("TRIPTYCH_YEAR_WHOLE") == "1"
SHARES, SERVERS, DAYS = (2, 1000, 365) if WHOLE else (1, 8, 45)


@pytest.mark.timeout(12 * 3600 if WHOLE else 900)
def test_year_of_outages(sqlite_template: Path, tmp_path: Path) -> None:
    """Whatever is away and whoever changes what: each slot has one image, or says why not."""
    shares = [
        Share(number, SERVERS // SHARES, DAYS, tmp_path / f"share-{number}", sqlite_template)
        for number in range(1, SHARES + 1)
    ]
    year = total(live_all(shares) if SHARES > 1 else map(live, shares))
    print(f"\n{SERVERS} servers, {DAYS} days\n{year.table()}")
    assert year.duplicates == []
    assert year.gaps == []
    assert year.violations == []
    troubles = ("beat away", "kvm away", "copy failed", "crowded hour", "image rotated")
    assert all(year.happened[each] for each in troubles), "no trouble, so nothing was tried"
    assert year.runs["skipped"]
