"""The whole product on real file systems: one stack after the other, guests of its own."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator
from typing import Any

import pytest
from live_site import FILE_SYSTEMS, Machine, Site, open_site

from lab import filesystems
from lab.libvirtd import Hypervisor

DISKS = {"qcow2+raw": ["qcow2", "raw"], "qcow2": ["qcow2"], "raw": ["raw"]}
ELSEWHERE = {("xfs", "raw"), ("btrfs", "raw"), ("ext4", "qcow2")}
"""One disk of a running server that boots on the other file systems: each boot takes seconds."""


@pytest.fixture(scope="session", params=FILE_SYSTEMS)
def site(request: pytest.FixtureRequest, hypervisor: Hypervisor) -> Iterator[Site]:
    """A stack with its vault and its guests' disks on XFS, btrfs or ext4."""
    if not filesystems.can_mount():
        pytest.skip("needs the right to mount loop devices")
    with open_site(hypervisor, request.param) as made:
        yield made


@pytest.fixture(
    scope="module",
    params=itertools.product(DISKS, ("running", "stopped")),
    ids=lambda each: f"{each[0]}-{each[1]}",
)
def machine(request: pytest.FixtureRequest, site: Site) -> Iterator[Machine]:
    """One server per kind of disks and power state, shared by the tests of it."""
    disks, power = request.param
    made = site.machine(DISKS[disks], power)
    yield made
    site.remove(made)


@pytest.fixture
def stopped(site: Site) -> Iterator[Machine]:
    """A stopped server with one small raw disk, of this test alone."""
    made = site.machine(["raw"], "stopped")
    yield made
    if made.state() != "missing":
        site.remove(made)


@pytest.fixture(scope="module")
def running(site: Site) -> Iterator[Machine]:
    """A running server with a qcow2 disk, for the tests of one module and file system."""
    made = site.machine(["qcow2"], "running")
    yield made
    site.remove(made)


@pytest.fixture(autouse=True)
def tidy(request: pytest.FixtureRequest) -> Iterator[None]:
    """After every test on a site: nothing half-made, nothing stray, nobody held."""
    if "site" not in request.fixturenames:
        yield
        return
    site: Site = request.getfixturevalue("site")
    site.mark_logs()
    yield
    site.assert_tidy()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    funcargs: dict[str, Any] = getattr(item, "funcargs", {})
    for site in funcargs.values():
        if report.failed and isinstance(site, Site):
            report.sections.append(("the stack's logs", site.logs()))
    return report


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    def elsewhere(item: Any) -> bool:
        chosen = getattr(item, "callspec", None)
        disks, power = chosen.params.get("machine", ("", "")) if chosen else ("", "")
        return power == "running" and (chosen.params["site"], disks) in ELSEWHERE

    needless = [item for item in items if elsewhere(item)]
    config.hook.pytest_deselected(items=needless)
    items[:] = [item for item in items if item not in needless]
