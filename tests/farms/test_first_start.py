"""Clones that were made off, of a guest whose agent alone could renew them: their identity is their
own once their farm starts them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import libvirt
import pytest
from farms.farmed import Farmed, killed_at, outcomes
from lxml import etree
from sqlalchemy import select

from lab.guest import Guest, attach
from services.cloner.identity import choice
from shared.commands import CloneSource, CreateClones, StartFarm
from shared.database import reading
from shared.errors import Cancelled
from shared.hypervisor import guest_exec
from shared.hypervisor.domains import Domain
from shared.hypervisor.errors import GuestNotAnswering, LibvirtFailed
from shared.models import Clone, Operation, Server
from shared.operations import runner

pytestmark = pytest.mark.vm
PUT_OFF = ["hostname", "machine-id", "ssh-host-keys"]


@pytest.fixture
def source(farmed: Farmed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Guest]:
    """It runs, its agent answers, and its host has no libguestfs."""
    monkeypatch.setattr(choice, "installed", lambda: False)
    made = Guest.create(farmed.hypervisor, farmed.disks, nic=True)
    farmed.guests.append(made)
    server = Server(name=made.name, host="kvm-1", domain_uuid=made.domain.UUIDString())
    farmed.world.add(server)
    farmed.source = server
    yield made.start()


def made_of(farmed: Farmed, source: Guest, count: int) -> tuple[str, list[Guest]]:
    """The farm's id and its guests, which are off."""
    names = f"{source.name}-{{n}}"
    command = CreateClones(
        source=CloneSource(kind="server", id=farmed.source.id), name=names, count=count, start=False
    )
    done = farmed.done(command)
    assert done.result, done.error
    clones = [attach(farmed.hypervisor, names.format(n=n + 1)) for n in range(count)]
    farmed.guests.extend(clones)
    for each in outcomes(done).values():
        told = each["identity"]
        assert (parts(told["pending"]), told["kept"], "later" in told) == (PUT_OFF, [], False)
    assert [(each.state(), links(each)) for each in clones] == [("stopped", {"up"})] * count
    return done.result["farm"], clones


def parts(told: list[dict[str, str]]) -> list[str]:
    return [each["part"] for each in told]


def links(guest: Guest) -> set[str]:
    """The states of its links, in its definition and where it runs."""
    found = set()
    for flags in (0, libvirt.VIR_DOMAIN_XML_INACTIVE):
        root = etree.fromstring(guest.domain.XMLDesc(flags))
        for interface in root.iterfind("devices/interface"):
            link = interface.find("link")
            found.add("up" if link is None else link.get("state", ""))
    return found


def identity_of(name: str) -> dict[str, Any]:
    row: Any = Clone
    with reading() as session:
        return dict(session.scalars(select(row.identity).where(row.name == name)).one())


def test_they_are_renewed_before_they_are_connected(farmed: Farmed, source: Guest) -> None:
    """By their source's MACs, though that is gone by then; and only the first time."""
    farm, clones = made_of(farmed, source, 2)
    old = source.run("cat /etc/machine-id")
    source.remove()

    started = outcomes(farmed.done(StartFarm(farm=farm)))

    ids = [each.run("cat /etc/machine-id") for each in clones]
    assert len({*ids, old}) == 3
    for each in clones:
        told = started[each.name]
        assert (told["power"], told["identity"]["way"]) == ("running", "agent")
        assert {"name", "uuid", "hostname", "machine-id"} <= {*told["identity"]["renewed"]}
        assert (told["identity"]["pending"], told["identity"]["kept"]) == ([], [])
        assert told["identity"] == identity_of(each.name)
        assert each.run("hostname") == (0, f"{each.name}\n")
        assert links(each) == {"up"}

    again = outcomes(farmed.done(StartFarm(farm=farm)))
    assert not any("identity" in each for each in again.values())
    assert [each.run("cat /etc/machine-id") for each in clones] == ids


@pytest.mark.parametrize("at", ["farm:started", "clone:renewed", "clone:linked"])
def test_whoever_takes_it_over_goes_on(farmed: Farmed, source: Guest, at: str) -> None:
    """One that was renewed is connected, and not made another once more."""
    farm, (clone,) = made_of(farmed, source, 1)
    operation = farmed.world.submit(StartFarm(farm=farm))
    with killed_at(at):
        runner.run(operation)
    assert links(clone) == ({"up"} if at == "clone:linked" else {"down"})
    hostname = clone.wait_ready().run("hostname")
    machine_id = clone.run("cat /etc/machine-id")
    assert (hostname == (0, f"{clone.name}\n")) is (at != "farm:started")

    farmed.world.expire(operation)
    runner.run(operation)

    ended: Operation = farmed.world.row(operation)
    assert ended.state == "succeeded", ended.error
    assert links(clone) == {"up"}
    assert clone.run("hostname") == (0, f"{clone.name}\n")
    assert (clone.run("cat /etc/machine-id") == machine_id) is (at == "clone:linked")
    assert {"hostname", "machine-id"} <= {*identity_of(clone.name)["renewed"]}


def cancelled(*_: Any) -> None:
    raise Cancelled("Cancelled on request.")


def test_a_cancel_leaves_it_without_links(
    farmed: Farmed, source: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And to ask again goes on."""
    farm, (clone,) = made_of(farmed, source, 1)
    with monkeypatch.context() as patch:
        patch.setattr(guest_exec, "wait_for_agent", cancelled)
        farmed.done(StartFarm(farm=farm))
    assert (clone.state(), links(clone)) == ("running", {"down"})
    assert parts(identity_of(clone.name)["pending"]) == PUT_OFF

    told = outcomes(farmed.done(StartFarm(farm=farm)))[clone.name]

    assert "machine-id" in told["identity"]["renewed"]
    assert links(clone) == {"up"}


def silent(*_: Any) -> None:
    raise GuestNotAnswering("Its agent did not answer.")


def test_one_that_is_silent_is_connected_and_its_parts_are_named(
    farmed: Farmed, source: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that is started when it is made."""
    farm, (clone,) = made_of(farmed, source, 1)
    monkeypatch.setattr(guest_exec, "wait_for_agent", silent)

    told = outcomes(farmed.done(StartFarm(farm=farm)))[clone.name]["identity"]

    assert (parts(told["kept"]), told["pending"]) == (PUT_OFF, [])
    assert "did not answer" in told["kept"][0]["reason"]
    assert links(clone) == {"up"}


def test_one_that_goes_off_is_renewed_by_the_next_start(
    farmed: Farmed, source: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not connected as who it was."""
    farm, (clone,) = made_of(farmed, source, 1)

    def goes_off(*_: Any) -> None:
        clone.domain.destroy()
        silent()

    with monkeypatch.context() as patch:
        patch.setattr(guest_exec, "wait_for_agent", goes_off)
        failed = farmed.done(StartFarm(farm=farm))
    assert failed.error
    assert failed.error["code"] == "guest_not_answering"
    assert links(clone) == {"down"}
    time.sleep(1)  # else libvirt may take the old QEMU's end for that of the new one

    told = outcomes(farmed.done(StartFarm(farm=farm)))[clone.name]["identity"]

    assert "machine-id" in told["renewed"]
    assert links(clone) == {"up"}


def test_one_that_cannot_be_started_has_its_links(farmed: Farmed, source: Guest) -> None:
    """Who starts it by other means finds it as it was made."""
    farm, (clone,) = made_of(farmed, source, 1)
    away = clone.disks[0].rename(clone.disks[0].with_suffix(".away"))

    assert farmed.done(StartFarm(farm=farm)).error

    assert (clone.state(), links(clone)) == ("stopped", {"up"})
    away.rename(clone.disks[0])
    told = outcomes(farmed.done(StartFarm(farm=farm)))[clone.name]["identity"]
    assert "machine-id" in told["renewed"]
    assert links(clone) == {"up"}


@pytest.mark.parametrize("how", ["started", "was started", "connected"])
def test_one_that_its_owner_uses_stays_who_it_is(
    farmed: Farmed, source: Guest, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Also where its links were put up in the running guest after a start that came to no end: then
    it has them when it boots, too."""
    farm, (clone,) = made_of(farmed, source, 1)
    if how == "connected":
        with monkeypatch.context() as patch:
            patch.setattr(guest_exec, "wait_for_agent", cancelled)
            farmed.done(StartFarm(farm=farm))
        link = etree.fromstring(clone.domain.XMLDesc()).find("devices/interface")
        link.find("link").set("state", "up")
        clone.domain.updateDeviceFlags(
            etree.tostring(link, encoding="unicode"), libvirt.VIR_DOMAIN_AFFECT_LIVE
        )
    else:
        clone.start()
    if how == "was started":
        clone.destroy()

    told = outcomes(farmed.done(StartFarm(farm=farm)))[clone.name]

    assert told["power"] == "running"
    assert (parts(told["identity"]["kept"]), told["identity"]["pending"]) == (PUT_OFF, [])
    assert "other means" in told["identity"]["kept"][0]["reason"]
    assert links(clone) == {"up"}
    assert "later" not in identity_of(clone.name)
    time.sleep(1)
    assert clone.wait_ready().run("hostname") != (0, f"{clone.name}\n")


def test_one_that_was_renewed_and_went_off_is_connected_when_it_boots(
    farmed: Farmed, source: Guest
) -> None:
    """As after a power cut of the host."""
    farm, (clone,) = made_of(farmed, source, 1)
    operation = farmed.world.submit(StartFarm(farm=farm))
    with killed_at("clone:linked"):
        runner.run(operation)
    clone.destroy()
    xml = etree.fromstring(clone.domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE))
    xml.find("devices/interface/link").set("state", "down")  # they are, a moment before
    clone.connection.defineXML(etree.tostring(xml, encoding="unicode"))

    farmed.world.expire(operation)
    runner.run(operation)

    ended: Operation = farmed.world.row(operation)
    assert ended.state == "succeeded", ended.error
    assert (clone.state(), links(clone)) == ("running", {"up"})
    told = identity_of(clone.name)
    assert {"hostname", "machine-id"} <= {*told["renewed"]}
    assert (told["pending"], "later" in told) == ([], False)


def test_one_that_runs_after_all_is_not_connected_unrenewed(
    farmed: Farmed, source: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where libvirt starts again while it starts it: the error is of a second try."""
    farm, (clone,) = made_of(farmed, source, 1)
    start = Domain.start

    def twice(domain: Domain) -> None:
        start(domain)
        assert links(clone) == {"down"}
        raise LibvirtFailed("domain is already running")

    monkeypatch.setattr(Domain, "start", twice)

    told = outcomes(farmed.done(StartFarm(farm=farm)))[clone.name]["identity"]

    assert "machine-id" in told["renewed"]
    assert links(clone) == {"up"}
