"""Every container restarted while work goes on; the schema taken back and forth with data in it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from compose_tools import wait_for
from system.live_site import Points

from lab.composed import Deployment

ENDED = ("succeeded", "failed", "cancelled")
BUSY = """
from pathlib import Path
from lab.guest import Guest
from lab.libvirtd import Hypervisor
vms = Path("/srv/triptych-demo/vms")
with (vms / "noise.raw").open("wb") as noise, open("/dev/urandom", "rb") as random:
    for _ in range(768):
        noise.write(random.read(2**20))
hypervisor = Hypervisor(Path("/srv/triptych-demo/libvirt"), "qemu:///system")
Guest.create(hypervisor, vms, "busy", disks=[str(vms / "noise.raw")])
"""


@pytest.fixture(scope="module")
def busy(deployment: Deployment) -> Iterator[str]:
    """A server that is off and takes its time to copy: its imager is restarted meanwhile."""
    deployment.execute("hypervisor", "python3", "-c", BUSY)
    wait_for(lambda: _known(deployment, "busy"), "libvirt's new domain is reported")
    deployment.client.servers.add("demo", "busy")
    yield "busy"
    wait_for(lambda: not _underway(deployment), "all has ended")
    deployment.guest("busy").remove()


def _known(deployment: Deployment, name: str) -> bool:
    return any(each["name"] == name for each in deployment.client.domains.list("demo"))


def _underway(deployment: Deployment) -> list[dict[str, Any]]:
    return [each for each in deployment.client.operations.list() if each["state"] not in ENDED]


@pytest.fixture
def points(deployment: Deployment) -> Points:
    return Points(deployment.volume("demo-data") / "points")


def _restart(deployment: Deployment, service: str) -> None:
    deployment.compose("restart", service)
    deployment.up(service)


def _folders(deployment: Deployment, server: str) -> set[str]:
    """The images that the vault holds, whole or not."""
    script = f"mkdir -p {server} && ls {server}"
    return set(
        deployment.execute(
            "demo-imager", "sh", "-c", f"cd /srv/triptych-demo/vault/images && {script}"
        ).split()
    )


@pytest.mark.parametrize(
    "service",
    ["redis", "postgres", "api", "beat", "demo-snapshotter", "demo-imager", "demo-cloner"],
)
def test_a_container_restarted_in_the_middle(
    deployment: Deployment, busy: str, points: Points, service: str
) -> None:
    """What runs and what waits is done once, whichever container is restarted meanwhile."""
    server = deployment.client.servers.get(busy)["id"]
    before = _folders(deployment, server)
    ends_what_it_does = service == "demo-imager"
    with points.held(
        lambda: deployment.client.images.create(busy, quiesce="never"), "stream:begun"
    ) as running:
        waiting = deployment.client.images.create(busy, quiesce="never")
        other = deployment.client.snapshots.take("demo", replace=True)
        if not ends_what_it_does:
            _restart(deployment, service)
    if ends_what_it_does:
        _restart(deployment, service)
    ended = [deployment.client.wait(each["id"], timeout=300) for each in (running, waiting, other)]

    assert [each["state"] for each in ended] == ["succeeded"] * 3
    made = {each["result"]["image"] for each in ended[:2]}
    assert _folders(deployment, server) - before == made
    for image in made:
        deployment.cli("image", "delete", image, "--yes")


def test_the_hypervisor_restarted_in_the_middle(
    deployment: Deployment, busy: str, points: Points
) -> None:
    """Its guests lose their power; the copy ends as it is told, and the next one works."""
    server = deployment.client.servers.get(busy)["id"]
    before = _folders(deployment, server)
    with points.held(
        lambda: deployment.client.images.create(busy, quiesce="never"), "stream:begun"
    ) as running:
        _restart(deployment, "hypervisor")
    ended = deployment.client.wait(running["id"], timeout=300)

    made = {ended["result"]["image"]} if ended["state"] == "succeeded" else set()
    assert _folders(deployment, server) - before == made
    assert deployment.guest().wait_ready().state() == "running"
    taken = deployment.client.snapshots.take("demo", replace=True)
    assert deployment.client.wait(taken["id"], timeout=180)["state"] == "succeeded"


def test_schema_and_containers_are_replaced_with_data_in_them(deployment: Deployment) -> None:
    """`down`, back to the schema before, `up`: what was there is there, and works."""
    taken = deployment.client.snapshots.take("demo", replace=True)
    deployment.client.wait(taken["id"], check=True, timeout=180)
    deployment.guest().shutdown()
    before = _all_there_is(deployment)
    deployment.down(volumes=False)
    deployment.up("postgres")
    back = ("python", "-m", "shared.database", "downgrade", "-1")
    deployment.compose("run", "--rm", "--no-deps", "migrate", *back)
    older = _revision(deployment)

    deployment.up("api", "beat", "demo-snapshotter", "demo-imager", "demo-cloner")

    assert _revision(deployment) > older
    assert _all_there_is(deployment) == before
    reverted = deployment.client.snapshots.revert("demo")
    assert deployment.client.wait(reverted["id"], timeout=180)["state"] == "succeeded"


def _all_there_is(deployment: Deployment) -> dict[str, list[str]]:
    client = deployment.client
    nouns = {"servers": client.servers, "images": client.images, "clones": client.clones}
    found = {name: sorted(each["id"] for each in noun.list()) for name, noun in nouns.items()}
    return found | {"operations": sorted(each["id"] for each in client.operations.list())}


def _revision(deployment: Deployment) -> str:
    query = "SELECT version_num FROM alembic_version"
    return deployment.execute("postgres", "psql", "-U", "triptych", "-Atc", query).strip()
