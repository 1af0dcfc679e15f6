"""Fixtures that more than one folder of tests needs: libvirtd, a guest, containers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from operations.servers import postgres, redis_server  # noqa: F401
from operations.spine import postgres_template, sqlite_template  # noqa: F401

from lab.containers import Engine
from lab.containers import engine as docker_engine
from lab.guest import Guest
from lab.libvirtd import Hypervisor, libvirtd, scratch

# Its reaper would have to be pulled; the fixtures remove what they start.
os.environ["TESTCONTAINERS_RYUK_DISABLED"] = "true"


@pytest.fixture(scope="session")
def hypervisor() -> Iterator[Hypervisor]:
    """A libvirtd, the machine's or our own; without one the tests fail, they do not skip."""
    with libvirtd() as found:
        yield found


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    """A Docker engine, the machine's or a private one; without one the tests fail."""
    with docker_engine() as found, pytest.MonkeyPatch.context() as patch:
        patch.setenv("DOCKER_HOST", found.host)  # for testcontainers
        yield found


@pytest.fixture
def workspace() -> Iterator[Path]:
    """A directory that QEMU's user can enter, unlike `tmp_path`."""
    with scratch() as directory:
        yield directory


@pytest.fixture
def guest(hypervisor: Hypervisor, workspace: Path) -> Iterator[Guest]:
    """A running guest with a qcow2 root disk and a raw one at /data."""
    with Guest.create(hypervisor, workspace, disks=["qcow2", "raw"]) as made:
        yield made.start()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Where CI runs nothing may be skipped; the reasons stand above, in the summary."""
    if os.environ.get("CI") == "true" and terminalreporter.stats.get("skipped"):
        terminalreporter.write_line("CI=true: a skipped test is a failed one", red=True)


def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("CI") == "true" and reporter and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
