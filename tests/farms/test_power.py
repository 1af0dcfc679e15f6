"""A farm's guests started and shut down as one: what is told of each."""

from __future__ import annotations

import pytest
from farms.farmed import Farmed, forgotten_before_it_is_held, outcomes

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


def test_server_that_is_forgotten_while_a_stop_begins(farmed: Farmed) -> None:
    """It is its owner's by then: its power is not cut."""
    farm, made = farmed.farm(2)
    for each in made:
        each.guest.start(wait=False)
        each.guest.domain.suspend()
    with forgotten_before_it_is_held(made[0]):
        told = outcomes(farmed.done(StopFarm(farm=farm.id, timeout_s=1, force=True)))
    assert list(told) == [made[1].clone.name]
    assert [each.guest.state() for each in made] == ["paused", "stopped"]
