"""What happens by itself as time goes by: expiry, the end of undo, schedules, rotation.

On a stack of its own, whose copies live for seconds and which has two beats by accident.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest
from live_site import Machine, Site, moment, open_site, wait_for

from embedded.stack import ROOT
from lab import filesystems
from lab.libvirtd import Hypervisor

pytestmark = pytest.mark.vm
RETENTION_S = 4


@pytest.fixture(scope="module")
def site(hypervisor: Hypervisor) -> Iterator[Site]:
    """A stack with short lives and a second beat."""
    if not filesystems.can_mount():
        pytest.skip("needs the right to mount loop devices")
    short = {
        "TRIPTYCH_SNAPSHOT_RETENTION": f"PT{RETENTION_S}S",
        "TRIPTYCH_SNAPSHOT_WARNING": "PT3S",
        "TRIPTYCH_UNDO_RETENTION": str(RETENTION_S),
        "TRIPTYCH_TICK": "0.5",
        "TRIPTYCH_SCHEDULE_SPREAD": "0",
    }
    with open_site(hypervisor, "xfs", size=filesystems.GIB, host="short-lived", **short) as made:
        command = ["-m", "celery", "-A", "shared.beat", "worker", "--concurrency", "1"]
        environment = made.stack._process_environment()
        with (made.state / "log" / "second-beat.log").open("wb") as output:
            second = subprocess.Popen(
                [sys.executable, *command, "-n", "second@%h"],
                cwd=ROOT,
                env={**os.environ, **environment},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        try:
            yield made
        finally:
            second.terminate()
            second.wait(30)


def events(site: Site, kind: str, server: str) -> list[dict]:
    found = site.client.events.list()
    return [e for e in found if e["type"] == f"triptych.{kind}" and e["subject"] == server]


def test_a_snapshot_expires_by_itself(site: Site, stopped: Machine) -> None:
    """It lives for the retention and is gone soon after, files and all, with its two events."""
    snapshot = site.done(site.client.snapshots.take(stopped.id))["result"]["snapshot"]
    query = "SELECT taken_at, expires_at FROM snapshot WHERE id = ?"  # it may be gone by now
    (row,) = site.rows(query, snapshot)
    taken, end = (datetime.fromisoformat(each).replace(tzinfo=UTC) for each in row)
    assert end - taken == timedelta(seconds=RETENTION_S)

    wait_for(lambda: site.client.servers.get(stopped.id)["snapshot"] is None, "expires")

    assert datetime.now(UTC) >= end
    folder = site.vault / "snapshots" / stopped.id / snapshot
    wait_for(lambda: not folder.exists(), "its files are gone")
    (warning,) = events(site, "snapshot.expiring", stopped.id)
    (expired,) = events(site, "snapshot.expired", stopped.id)
    assert warning["data"]["snapshot"] == expired["data"]["snapshot"] == snapshot
    settle(site)


def test_what_was_set_aside_goes_when_undo_is_over(site: Site, stopped: Machine) -> None:
    """After the time to undo, the old disks are gone and undo is refused (E1)."""
    stopped.write("old")
    site.done(site.client.images.create(stopped.id, name="for-undo"))
    stopped.write("new")
    asked = time.monotonic()
    with site.points.held(
        lambda: site.client.images.restore("for-undo"), "committing"
    ) as operation:
        aside = site.disks / f".triptych-{operation['id']}"
        assert aside.is_dir()
    site.done(operation)

    wait_for(lambda: not aside.exists(), "what was set aside goes")

    assert time.monotonic() - asked >= RETENTION_S
    assert site.client.operations.get(operation["id"])["undo_until"] is None
    assert stopped.read() == {"old"}
    settle(site)


def settle(site: Site) -> None:
    wait_for(
        lambda: not site.rows("SELECT 1 FROM operation WHERE finished_at IS NULL"),
        "operations have ended",
    )


def make_due(site: Site, machine: Machine, minutes: int) -> None:
    """As if the schedule, in UTC, were set to so many minutes ago, and its slot not yet taken."""
    slot = datetime.now(UTC).replace(second=0, microsecond=0) - timedelta(minutes=minutes)
    due = slot.strftime("%Y-%m-%d %H:%M:%S.%f")
    query = (
        "UPDATE schedule SET at = ?, next_run_at = ?, start_at = ? WHERE server_id = ? RETURNING id"
    )
    assert len(site.rows(query, slot.strftime("%H:%M"), due, due, machine.id)) == 1


def scheduled(site: Site, machine: Machine) -> list[dict]:
    return [i for i in site.client.images.list(machine.id) if i["origin"] == "daily"]


def test_a_schedule_makes_one_image_per_slot_and_keeps_two(site: Site, stopped: Machine) -> None:
    """Two beats, one image per slot (I5); the third takes the oldest's place (I4), no other's."""
    site.done(site.client.images.create(stopped.id, name="by-hand"))
    schedule = site.client.schedules.set(stopped.id, "daily", at="03:00", timezone="UTC", keep=2)
    assert moment(schedule["next_run_at"]) > datetime.now(UTC)
    made: list[str] = []
    for round_ in (1, 2, 3):
        make_due(site, stopped, minutes=10 - round_)
        wait_for(
            lambda n=round_: (
                len(site.rows("SELECT 1 FROM schedule_run WHERE state = 'succeeded'")) == n
            ),
            f"run {round_}",
        )
        settle(site)
        newest = site.client.servers.get(stopped.id)["newest_image"]
        assert newest not in made
        made.append(newest)
        assert len(scheduled(site, stopped)) == min(round_, 2)

    runs = site.client.schedules.runs(stopped.id, "daily")
    assert [run["state"] for run in runs["items"]] == ["succeeded"] * 3
    assert [run["image"] for run in runs["items"]] == made[::-1]
    assert len(runs["upcoming"]) == 10
    assert {image["id"] for image in scheduled(site, stopped)} == set(made[1:])
    assert site.client.images.get("by-hand")["state"] == "complete"
    operations = site.rows("SELECT 1 FROM operation WHERE requested_by = 'schedule:daily'")
    assert len(operations) == 3
    site.client.schedules.delete(stopped.id, "daily")
