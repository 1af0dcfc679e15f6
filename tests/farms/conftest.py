"""Farms on a real libvirt, of guests that are off and have tiny disks; handlers in this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from farms.farmed import Farmed
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
def farmed(
    world: World,  # noqa: F811
    hypervisor: Hypervisor,
    workspace: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Farmed]:
    monkeypatch.setenv("TRIPTYCH_LIBVIRT_URI", hypervisor.uri)
    monkeypatch.setenv("TRIPTYCH_VAULT", str(workspace / "vault"))
    settings.cache_clear()
    made = Farmed(world, hypervisor, workspace)
    yield made
    made.remove()
    forget(hypervisor.uri)
