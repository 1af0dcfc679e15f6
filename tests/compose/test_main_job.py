"""The main job on the composed stack, by the command line: each claim seen inside the guest."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest
from compose_tools import wait_for

from lab.composed import Deployment
from lab.guest import Guest

PLACE = "/root/word"


@pytest.fixture
def demo(deployment: Deployment) -> Iterator[Guest]:
    """The demo VM, up before the test, and running after it."""
    guest = deployment.guest().wait_ready()
    yield guest
    assert guest.state() == "running"


def test_a_snapshot_brings_the_server_back(deployment: Deployment, demo: Guest) -> None:
    """What was there at the snapshot is there after revert, and what came later is not."""
    demo.write(PLACE, "kept\n")
    deployment.cli("snapshot", "take", "demo", "--replace")
    demo.write(PLACE, "broken\n")

    deployment.cli("snapshot", "revert", "demo", "--yes")

    assert demo.wait_ready().read(PLACE) == "kept\n"


def test_an_image_brings_the_server_back(deployment: Deployment, demo: Guest) -> None:
    """Also after the disk was destroyed under it; the schedule makes the next one by itself."""
    demo.write(PLACE, "in the image\n")
    deployment.cli("image", "create", "demo", "--name", "golden")
    demo.destroy()
    disk = "/srv/triptych-demo/vms/demo-vda.qcow2"
    deployment.execute("hypervisor", "dd", "if=/dev/urandom", f"of={disk}", "bs=1M", "count=1")

    deployment.cli("image", "restore", "golden", "--yes")
    demo.start()

    assert demo.read(PLACE) == "in the image\n"
    minute = datetime.now(UTC) + timedelta(minutes=1, seconds=30)  # until it is set some pass
    at = f"{minute:%H:%M}"
    deployment.cli("schedule", "set", "demo", "daily", "--at", at, "--timezone", "UTC")


def test_clones_live_on_their_own(deployment: Deployment, demo: Guest) -> None:
    """Three clones have names, UUIDs and addresses of their own, and keep what is theirs."""
    made = deployment.cli(
        "clone", "create", "golden", "--from", "image", "--count", "3", "--name", "qa-{n:03}"
    )
    names = [clone["name"] for clone in made["result"]["clones"]]
    clones = [deployment.guest(name) for name in names]
    machines = [demo, *clones]

    assert names == ["qa-001", "qa-002", "qa-003"]
    for number, machine in enumerate(machines):
        machine.wait_ready().write("/root/mine", f"{number}\n")
    assert [each.read("/root/mine") for each in machines] == ["0\n", "1\n", "2\n", "3\n"]
    assert len(machines) == len({each.domain.UUIDString() for each in machines})
    assert len(machines) == len({each.xml.find(".//mac").attrib["address"] for each in machines})
    for clone in clones:
        clone.remove()


def test_a_schedule_runs_by_itself(deployment: Deployment, demo: Guest) -> None:
    """The image of the schedule that an earlier test set is there soon after its minute."""

    def made() -> list[str]:
        runs = deployment.client.schedules.runs("demo", "daily")["items"]
        return [str(run["image"]) for run in runs if run["state"] == "succeeded"]

    (image,) = wait_for(made, "the schedule's image is made", timeout=300)

    assert deployment.client.images.get(image)["origin"] == "daily"
