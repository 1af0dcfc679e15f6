"""A host to examine: its rows, a vault and disks of its own, and a real libvirt."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from doctor.patient import Patient
from operations.spine import (  # noqa: F401
    World,
    any_database,
    database_url,
    environment,
    world,
)

from lab.libvirtd import Hypervisor
from shared.hypervisor.connection import forget
from shared.settings import settings


@pytest.fixture
def patient(
    world: World,  # noqa: F811
    hypervisor: Hypervisor,
    workspace: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Patient]:
    """A healthy host."""
    monkeypatch.setenv("TRIPTYCH_LIBVIRT_URI", hypervisor.uri)
    monkeypatch.setenv("TRIPTYCH_VAULT", str(workspace / "vault"))
    monkeypatch.setenv("TRIPTYCH_SWTPM", str(workspace / "swtpm"))
    settings.cache_clear()
    made = Patient(world, hypervisor, workspace)
    yield made
    made.remove()
    forget(hypervisor.uri)
