"""A simulated year: no slot twice, no gap without a reason, no rule broken (I3 to I6).

`make year` has it whole: 1,000 servers, 365 days. In `make test` it is a part of that.
"""

import logging
import os

import pytest
import structlog
from operations.spine import World
from schedules.year import Year

WHOLE = os.environ.get("TRIPTYCH_YEAR_WHOLE") == "1"
SERVERS, DAYS = (1000, 365) if WHOLE else (8, 45)


@pytest.mark.timeout(6 * 3600 if WHOLE else 180)
def test_year_of_outages(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is away and whoever changes what: each slot has one image, or says why not."""
    quiet = structlog.make_filtering_bound_logger(logging.CRITICAL)
    structlog.configure(wrapper_class=quiet)
    try:
        year = Year(world, monkeypatch, SERVERS, DAYS)
        year.run()
    finally:
        structlog.reset_defaults()
    assert year.duplicates() == []
    assert year.gaps() == []
    told = year.happened
    print(f"{SERVERS} servers, {DAYS} days: {len(year.made)} images;", dict(told))
    troubles = ("beat away", "kvm away", "copy failed", "run skipped", "image rotated")
    assert all(told[each] for each in troubles), "there was no trouble, so nothing was tried"
