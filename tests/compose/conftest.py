"""The deployment by docker compose, on a Docker engine that the tests start if none answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.composed import Deployment, deployed
from lab.containers import Engine
from lab.libvirtd import scratch

pytest.register_assert_rewrite("compose.work")

DEMO = ("api", "beat", "demo-snapshotter", "demo-imager", "demo-cloner")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The first of these tests builds the images, which takes minutes on a new machine."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.timeout(1500))


@pytest.fixture(scope="session")
def state() -> Iterator[Path]:
    with scratch() as directory:
        yield directory


@pytest.fixture(scope="session")
def deployment(engine: Engine, state: Path) -> Iterator[Deployment]:
    """The centre and the demo's host, up and healthy, with its VM registered."""
    files = ("docker-compose.yml", "tests/compose/points.yml")
    with deployed(Deployment(engine, state, "triptych-test", files=files), *DEMO) as made:
        (made.volume("demo-data") / "points").mkdir()
        made.client.servers.add("demo", "demo")
        yield made
