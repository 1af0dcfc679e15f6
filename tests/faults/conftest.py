"""Stacks whose workers can be told where to fail, and the table of what came of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from faults.outcomes import Outcomes, table
from faults.walk import KINDS, Case, Walk
from system.live_site import Site, open_site, wait_for

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

CANCELLED = (
    "snapshot.revert",
    "image.restore",
    "clone.server",
    "clone.snapshot",
    "clone.server with memory",
    "clone.linked",
    "farm.delete",
)
OF_FARMS = ("farm.delete", "clone.delete", "farm.retry", "farm.start", "farm.stop")
"""Those about its clones, in which libvirtd does the work."""

CANCEL, ERROR, GONE = (
    "test_cancelled_at_every_point",
    "test_error_at_every_point",
    "test_guest_or_libvirtd_gone_at_every_point",
)
KILLED, UNDONE, HELD, ALL, OWNERS = (
    "test_worker_killed_at_every_point",
    "test_worker_killed_at_every_point_of_an_undo",
    "test_worker_and_watchdog_die_while_the_guest_is_held",
    "test_all_workers_and_the_broker_die_while_the_guest_is_held",
    "test_a_pause_that_its_owner_asks_for_later_stays",
)
PART = {
    ("xfs", "stopped"): {
        (KILLED, "snapshot.delete"),
        (KILLED, "snapshot.undo"),
        (KILLED, "image.restore"),
        (KILLED, "clone.image"),
        (KILLED, "clone.snapshot"),
        (UNDONE, "image.restore"),
        (UNDONE, "snapshot.undo"),
        (CANCEL, "clone.server"),
        (KILLED, "farm.delete"),
        (UNDONE, "farm.delete"),
        (KILLED, "clone.delete"),
        (UNDONE, "clone.delete"),
        (KILLED, "farm.retry"),
        (KILLED, "farm.start"),
        (KILLED, "farm.stop"),
    },
    ("xfs", "running"): {
        (KILLED, "snapshot.take"),
        (KILLED, "snapshot.take with memory"),
        (KILLED, "snapshot.revert with memory"),
        (KILLED, "image.restore"),
        (UNDONE, "snapshot.take with memory"),
        (UNDONE, "image.restore"),
        (KILLED, "clone.server with memory"),
        (UNDONE, "clone.server"),
        (HELD, None),
        (ALL, None),
        (OWNERS, None),
    },
    ("ext4", "running"): {(KILLED, "image.create"), (UNDONE, "image.create")},
    ("ext4", "stopped"): {(KILLED, "image.create"), (KILLED, "clone.linked")},
}
"""What `PART=1` runs, in this order; a point that was touched is not touched again."""


SHARES = 2
"""As many as cores. Three took no less: each has a stack and a libvirtd that cost something."""
SHARE = int(os.environ.get("TRIPTYCH_FAULTS_SHARE", "0"))
"""Which of them to do, from 1 on; 0 is all."""
OUTCOMES = Outcomes(WHOLE, [], SHARES)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ours = [item for item in items if Path(__file__).parent in item.path.parents]
    wanted = [item for item in ours if _is_wanted(item)]
    OUTCOMES.wanted = sorted(item.nodeid for item in wanted)
    if SHARE:
        wanted = [item for item in wanted if _share(item) == SHARE]
    needless = [item for item in ours if item not in wanted]
    config.hook.pytest_deselected(items=needless)
    items[:] = [item for item in items if item not in needless]


def _where(item: Any) -> tuple[str, str]:
    return item.callspec.params["site"], item.callspec.params["walk"]


def _share(item: Any) -> int:
    """Of about equal time; the servers of a share are its own. What kills a worker of a server
    that runs, and boots it each time, takes longest."""
    fault = item.callspec.params.get("fault")
    short = item.originalname in (ERROR, CANCEL) or fault == "libvirtd"
    return 1 if _where(item) == ("xfs", "running") and not short else 2


def _is_wanted(item: Any) -> bool:
    chosen = item.callspec.params
    where, kind = _where(item), chosen.get("kind")
    name = item.originalname
    if kind and where not in KINDS[kind].where:
        return False
    if not WHOLE:
        return (name, kind) in PART[where]
    if name == GONE and kind == "snapshot.undo":  # which does what a revert does
        return chosen["fault"] == "libvirtd" and where[1] == "running"
    if chosen.get("fault") == "power":  # to a copy by QEMU it is what "qemu" is
        return where == ("xfs", "running") and kind in OF_THE_GUEST
    if chosen.get("fault") == "qemu":
        return where[1] == "running" and kind in OF_THE_GUEST
    if name == CANCEL:  # with memory, or linked, it is done elsewhere alone
        return where == ("xfs", "stopped") or len(KINDS[kind].where) == 1
    if name == "test_disk_full_at_every_point":
        return where[1] == "stopped"  # a running guest stops on the write that finds no room
    if name in (HELD, ALL, OWNERS, "test_worker_hangs_while_the_guest_is_held"):
        return where == ("xfs", "running")
    return True


@pytest.fixture(scope="session")
def hypervisor() -> Iterator[Hypervisor]:
    """A libvirtd of our own, since it is killed."""
    with libvirtd(own=True) as found:
        yield found


@pytest.fixture(scope="session", params=["xfs", "ext4"])
def site(request: pytest.FixtureRequest, hypervisor: Hypervisor) -> Iterator[Site]:
    settings = {
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
        yield made


@pytest.fixture(scope="session", params=["stopped", "running"])
def walk(request: pytest.FixtureRequest, site: Site) -> Iterator[Walk]:
    """A server with two disks."""
    wait_for(lambda: site.client.hosts.get(site.host)["answering"], "it has libvirtd back")
    machine = site.machine(["qcow2", "raw"], request.param)
    made = Walk(site, machine, site.points)
    yield made
    CASES.extend(made.cases)
    site.remove(machine)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" and report.passed:
        OUTCOMES.done.append(report.nodeid)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if SHARE and not session.config.option.collectonly:
        OUTCOMES.cases = [asdict(case) for case in CASES]
        OUTCOMES.write(Path(os.environ["TRIPTYCH_FAULTS_OUTCOMES"]) / f"{SHARE}.json")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if CASES and not SHARE:
        terminalreporter.section("points and outcomes")
        for line in table([asdict(case) for case in CASES]):
            terminalreporter.write_line(line)
