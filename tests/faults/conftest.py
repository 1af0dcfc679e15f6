"""Stacks whose workers can be told where to fail, and the table of what came of it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from faults.walk import KINDS, Case, Points, Walk
from system.live_site import Site, open_site

from lab import filesystems
from lab.libvirtd import Hypervisor, libvirtd

CASES: list[Case] = []
WHOLE = os.environ.get("TRIPTYCH_FAULTS_ALL") == "1"
"""Every case, as `make faults` asks for; else a part that touches every point once."""
OF_THE_GUEST = (
    "snapshot.take",
    "snapshot.take with memory",
    "snapshot.revert",
    "snapshot.revert with memory",
    "image.create",
    "image.restore",
    "clone.server",
    "clone.server with memory",
)
"""The operations that are about the server itself, not about what is in the vault."""

KILLED, UNDONE, HELD, OWNERS = (
    "test_worker_killed_at_every_point",
    "test_worker_killed_at_every_point_of_an_undo",
    "test_worker_and_watchdog_die_while_the_guest_is_held",
    "test_a_pause_that_its_owner_asks_for_later_stays",
)
PART = {
    ("xfs", "stopped"): {
        (KILLED, "snapshot.delete"),
        (KILLED, "snapshot.undo"),
        (KILLED, "image.restore"),
        (KILLED, "clone.image"),
        (UNDONE, "image.restore"),
        (KILLED, "farm.delete"),
        (UNDONE, "farm.delete"),
    },
    ("xfs", "running"): {
        (KILLED, "snapshot.take"),
        (KILLED, "snapshot.take with memory"),
        (KILLED, "image.restore"),
        (UNDONE, "snapshot.take with memory"),
        (UNDONE, "image.restore"),
        (KILLED, "clone.server with memory"),
        (UNDONE, "clone.server"),
        (HELD, None),
        (OWNERS, None),
    },
    ("ext4", "running"): {(KILLED, "image.create"), (UNDONE, "image.create")},
    ("ext4", "stopped"): {(KILLED, "image.create"), (KILLED, "clone.linked")},
}
"""What `PART=1` runs, in this order; a point that was touched is not touched again."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ours = [item for item in items if Path(__file__).parent in item.path.parents]
    needless = [item for item in ours if not _is_wanted(item)]
    config.hook.pytest_deselected(items=needless)
    items[:] = [item for item in items if item not in needless]


def _is_wanted(item: Any) -> bool:
    chosen = item.callspec.params
    where, kind = (chosen["site"], chosen["walk"]), chosen.get("kind")
    name = item.originalname
    if kind and KINDS[kind].memory and where != ("xfs", "running"):
        return False
    if kind and KINDS[kind].linked and where != ("ext4", "stopped"):
        return False
    if not WHOLE:
        return (name, kind) in PART[where]
    if chosen.get("fault") in ("qemu", "power"):
        return where[1] == "running"
    if name == "test_disk_full_at_every_point":
        return where[1] == "stopped"  # a running guest stops on the write that finds no room
    if name in (HELD, OWNERS, "test_worker_hangs_while_the_guest_is_held"):
        return where == ("xfs", "running")
    return True


@pytest.fixture(scope="session")
def hypervisor() -> Iterator[Hypervisor]:
    """A libvirtd of our own, since it is killed."""
    with libvirtd(own=True) as found:
        yield found


@pytest.fixture(scope="session", params=["xfs", "ext4"])
def site(
    request: pytest.FixtureRequest, hypervisor: Hypervisor, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    directory: Path = tmp_path_factory.mktemp("faults")
    settings = {
        "TRIPTYCH_FAULTS": str(directory),
        "TRIPTYCH_CONCURRENCY": "2",
        "TRIPTYCH_IDENTITY_TIMEOUT": "1",  # clones of a stopped server have nothing that answers
    }
    with open_site(
        hypervisor,
        request.param,
        size=4 * filesystems.GIB,
        host=f"faults-{request.param}",
        **settings,
    ) as made:
        made.points = Points(directory)
        yield made


@pytest.fixture(scope="session", params=["stopped", "running"])
def walk(request: pytest.FixtureRequest, site: Site) -> Iterator[Walk]:
    """A server with two disks."""
    machine = site.machine(["qcow2", "raw"], request.param)
    made = Walk(site, machine, site.points)
    yield made
    CASES.extend(made.cases)
    site.remove(machine)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not CASES:
        return
    terminalreporter.section("points and outcomes")
    rows: dict[tuple[str, str], Counter[str]] = {}
    for case in CASES:
        at = rows.setdefault((case.point, case.fault), Counter())
        at[case.outcome or "FAILED"] += 1
    for (point, fault), outcomes in rows.items():
        told = ", ".join(f"{count} {state}" for state, count in sorted(outcomes.items()))
        terminalreporter.write_line(f"{point:34} {fault:9} {told}")
    distinct = {(c.kind, c.power, c.way, c.point, c.fault) for c in CASES}
    longest = max(CASES, key=lambda case: case.seconds)
    terminalreporter.write_line(
        f"{len(distinct)} distinct cases, {sum(not c.outcome for c in CASES)} failures; the "
        f"longest took {longest.seconds:.0f} s: {longest.kind} {longest.power} {longest.point} "
        f"{longest.fault}"
    )
