"""What a host's workers write of it."""

from datetime import timedelta

import pytest
from operations.spine import World

from shared import hosts
from shared.database import now, reading, transaction
from shared.models import Host
from shared.models.hosts import SILENCE
from shared.operations.drain import drain


def row() -> Host:
    with reading() as session:
        return session.get_one(Host, "kvm-1")


@pytest.mark.parametrize("seconds", [1, -1])
def test_silence_begins_after_three_missed_reports(seconds: int) -> None:
    """A host is silent once it has not reported for longer than that."""
    host = Host(name="kvm-1", last_seen_at=now() - SILENCE - timedelta(seconds=seconds))
    assert (seconds > 0) == host.silent == (not host.answering)


def test_workers_without_libvirt_are_not_silent(world: World) -> None:
    """They say what is wrong, and that they live."""
    hosts.HostReporter()._unreachable("connection refused")
    assert row().problem == "libvirt does not answer: connection refused"
    assert (row().silent, row().answering) == (False, False)


def test_report_leaves_a_drain_as_it_is(world: World, any_database: str) -> None:
    """A host that drains goes on draining, whatever it reports and whoever restarts."""
    with transaction() as session:
        since = drain(session, "kvm-1").draining_since

    hosts.report()

    assert (since, True) == (row().draining_since, row().answering)
