"""What is done to the members of a farm at the same time."""

from __future__ import annotations

import threading
import time

from services.cloner.farms import Member, at_once
from shared.models import Clone, Server
from shared.turns import MOST_CALLS


def test_no_more_calls_than_libvirt_takes() -> None:
    """A sixth call of one client is not read, nor the keepalive behind it: libvirtd would be
    taken for dead while it starts or stops guests. All members get their turn."""
    lock, together = threading.Lock(), threading.Barrier(MOST_CALLS)
    now, most, done = 0, 0, []

    def call(each: Member) -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        together.wait(60)
        time.sleep(0.02)
        with lock:
            now -= 1
            done.append(each)

    source = {"operation_id": "op_x", "host": "h", "source_kind": "server", "source_id": "s"}
    members = [Member(Clone(name=f"qa-{n}", **source), Server(name=f"qa-{n}")) for n in range(20)]

    assert at_once(members, call) == members

    assert set(members) == set(done)
    assert most == MOST_CALLS
