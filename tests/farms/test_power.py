"""A farm's guests started and shut down as one: what is told of each."""

from __future__ import annotations

import pytest
from farms.farmed import Farmed, outcomes

from shared.commands import StopFarm

pytestmark = pytest.mark.vm


def test_guest_that_is_still_on_is_not_told_as_stopped(farmed: Farmed) -> None:
    """Its power is nowhere said to be off, and it is left on."""
    farm, made = farmed.farm(2)
    made[0].guest.start(wait=False)
    made[0].guest.domain.suspend()

    told = outcomes(farmed.done(StopFarm(farm=farm.id, timeout_s=1)))

    assert made[0].guest.state() == "paused"
    assert told[made[0].clone.name]["error"]["code"] == "guest_still_on"
    assert "power" not in told[made[0].clone.name]
    assert told[made[1].clone.name]["power"] == "stopped"
