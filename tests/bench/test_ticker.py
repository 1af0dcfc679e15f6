"""What the bench says a guest feels is what the guest feels."""

import time

import pytest

from bench.site import Kind, opened
from lab import filesystems
from lab.libvirtd import Hypervisor

pytestmark = pytest.mark.vm
HOLD_MS = 2000


def test_a_hold_shows_in_full(hypervisor: Hypervisor) -> None:
    """Holding a guest for two seconds, longer than a busy machine does, is a gap of as much in its
    ticks, and none without."""
    if not filesystems.can_mount():
        pytest.skip("mounting a loop device needs root")
    with opened(Kind("xfs", data=0, disk=1), hypervisor) as site, site.ticks() as ticks:
        with ticks.window() as quiet:
            time.sleep(0.5)
        with ticks.window() as held:
            began = time.perf_counter()
            site.guest.domain.suspend()
            time.sleep(HOLD_MS / 1000)
            site.guest.domain.resume()
            took = (time.perf_counter() - began) * 1000
        assert ticks.longest(quiet) < HOLD_MS <= ticks.longest(held) < took + HOLD_MS / 2
        assert site.snapshot().pause_ms > 0
