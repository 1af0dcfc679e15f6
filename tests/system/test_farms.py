"""A farm on the live stack: made, retried, started, shut down, and gone when its time is over."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import libvirt
import pytest
from live_site import Machine, Site, moment, wait_for
from triptych import Problem

from lab.guest import Guest, attach

pytestmark = [pytest.mark.vm, pytest.mark.parametrize("site", ["xfs"], indirect=True)]
SECOND = 1 / 3600
"""In hours."""


def outcomes(operation: dict) -> dict[str, str]:
    """What became of each clone, by name: its state, or its error's code."""
    clones = operation["result"]["clones"]
    return {each["name"]: (each["error"] or {"code": each["state"]})["code"] for each in clones}


def test_only_what_failed_is_made_again(site: Site, stopped: Machine) -> None:
    """By the same name, from the server as it is now, which the result tells; those that were
    made stay as they are. Then the farm goes, and with it nothing but what is its own."""
    stopped.write("then")
    suffix = stopped.disks[0].suffix
    in_the_way = site.disks / f"again-2-vda{suffix}"
    in_the_way.write_text("somebody else's")
    operation = site.client.clones.create(stopped.id, name="again-{n}", count=3, start=False)
    first = site.done(operation)
    assert outcomes(first) == {
        "again-1": "ready",
        "again-2": "clone_name_taken",
        "again-3": "ready",
    }
    farm = first["result"]["farm"]
    assert site.client.farms.get(farm)["clones"] == {"ready": 2, "failed": 1}

    in_the_way.unlink()
    stopped.write("now")
    again = site.done(site.client.farms.retry(farm))

    assert outcomes(again) == {"again-2": "ready"}
    assert moment(again["result"]["taken_at"]) > moment(first["finished_at"])
    clones = {each["name"]: each for each in site.client.farms.get("again-{n}")["items"]}
    for name, word in (("again-1", "then"), ("again-2", "now"), ("again-3", "then")):
        made = Machine(site, attach(site.hypervisor, name), "stopped", clones[name]["server"])
        assert made.read() == {word}
    with pytest.raises(Problem) as refusal:
        site.client.farms.retry(farm)
    assert refusal.value.code == "nothing_to_retry"

    disks = [site.disks / f"{name}-vda{suffix}" for name in clones]
    assert all(each.exists() for each in disks)
    deleted = site.done(site.client.farms.delete("again-{n}"))
    assert set(outcomes(deleted).values()) == {"deleted"}
    assert not any(each.exists() for each in disks)
    assert stopped.read() == {"now"}
    assert [each["name"] for each in site.client.farms.list() if each["id"] == farm] == []


def test_farm_is_started_and_shut_down_as_one(site: Site) -> None:
    """Cleanly: the guests shut down by themselves. One that cannot is named and left on, and
    its power is cut only if that is asked for."""
    source = Guest.create(site.hypervisor, site.disks, disks=["qcow2"])
    server = site.register(source)
    made = site.client.clones.create(server, name="power-{n}", count=2, start=False)
    farm = site.done(made)["result"]["farm"]
    one, two = (attach(site.hypervisor, name) for name in ("power-1", "power-2"))

    started = site.done(site.client.farms.start(farm))
    assert [each["power"] for each in started["result"]["clones"]] == ["running"] * 2
    two.domain.suspend()
    one.wait_ready()
    halted = site.done(site.client.farms.stop(farm, timeout_s=100))

    assert outcomes(halted) == {"power-1": "ready", "power-2": "guest_still_on"}
    assert (one.state(), two.state()) == ("stopped", "paused")
    assert one.domain.state()[1] == libvirt.VIR_DOMAIN_SHUTOFF_SHUTDOWN
    forced = site.done(site.client.farms.stop(farm, timeout_s=1, force=True))
    assert outcomes(forced) == {"power-1": "ready", "power-2": "ready"}
    assert two.state() == "stopped"
    site.done(site.client.clones.delete("power-1"))
    assert (one.state(), two.state()) == ("missing", "stopped")
    site.done(site.client.farms.delete(farm))
    source.remove()


def test_farm_ends_by_itself(site: Site, stopped: Machine) -> None:
    """It lives for as long as it was given from when it was made, is warned of once, and gone
    soon after."""
    operation = site.client.clones.create(
        stopped.id, name="brief-{n}", count=2, start=False, expires_in_h=4 * SECOND
    )
    made = site.done(operation)
    farm = made["result"]["farm"]
    (row,) = site.rows("SELECT expires_at FROM farm WHERE id = ?", farm)  # it may be gone by now
    end = datetime.fromisoformat(row["expires_at"]).replace(tzinfo=UTC)
    life = end - moment(made["finished_at"])
    assert abs(life - timedelta(seconds=4)) < timedelta(milliseconds=1)

    wait_for(lambda: attach(site.hypervisor, "brief-1").state() == "missing", "it ends")

    assert datetime.now(UTC) >= end
    wait_for(lambda: not [e for e in site.client.farms.list() if e["id"] == farm], "it is gone")
    assert not list(site.disks.glob("brief-*"))
    told = [each for each in site.client.events.list() if each["data"].get("farm") == farm]
    facts = [each["type"].removeprefix("triptych.") for each in told]
    assert [facts.count(each) for each in ("farm.expiring", "farm.expired")] == [1, 1]
    (warning,) = [each for each in told if each["type"] == "triptych.farm.expiring"]
    assert moment(warning["data"]["expires_at"]) >= end  # put off where a tick came late
    wait_for(
        lambda: not site.rows("SELECT 1 FROM operation WHERE finished_at IS NULL"),
        "operations have ended",
    )
