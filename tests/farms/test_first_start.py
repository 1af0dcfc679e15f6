"""Clones that were made off, of a guest whose agent alone could renew them: their identity is their
own once their farm starts them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
from shared.hypervisor.errors import GuestNotAnswering
from shared.models import Clone, Operation, Server
from shared.operations import runner

pytestmark = pytest.mark.vm
PUT_OFF = ["hostname", "machine-id", "ssh-host-keys", "links"]


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
        assert parts(each["identity"]["pending"]) == PUT_OFF
        assert set(each["identity"]) == {
            "way",
            "hostname",
            "renewed",
            "pending",
            "kept",
            "left_out",
        }
    assert [(each.state(), links(each)) for each in clones] == [("stopped", {"down"})] * count
    return done.result["farm"], clones


def parts(told: list[dict[str, str]]) -> list[str]:
    return [each["part"] for each in told]


def links(guest: Guest, *flags: int) -> set[str]:
    """The states of its links, in its definition and where it runs."""
    found = set()
    for flag in flags or (0, 2):  # the second is VIR_DOMAIN_XML_INACTIVE
        root = etree.fromstring(guest.domain.XMLDesc(flag))
        found |= {each.get("state", "") for each in root.iterfind("devices/interface/link")}
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


def test_a_cancel_leaves_it_without_links(
    farmed: Farmed, source: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And to ask again goes on."""
    farm, (clone,) = made_of(farmed, source, 1)

    def cancelled(*_: Any) -> None:
        raise Cancelled("Cancelled on request.")

    with monkeypatch.context() as patch:
        patch.setattr(guest_exec, "wait_for_agent", cancelled)
        farmed.done(StartFarm(farm=farm))
    assert links(clone) == {"down"}
    assert parts(identity_of(clone.name)["pending"]) == PUT_OFF

    told = outcomes(farmed.done(StartFarm(farm=farm)))[clone.name]

    assert "machine-id" in told["identity"]["renewed"]
    assert links(clone) == {"up"}


def test_one_that_is_silent_is_connected_and_its_parts_are_named(
    farmed: Farmed, source: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that is started when it is made."""

    def silent(*_: Any) -> None:
        raise GuestNotAnswering("Its agent did not answer.")

    farm, (clone,) = made_of(farmed, source, 1)
    monkeypatch.setattr(guest_exec, "wait_for_agent", silent)

    told = outcomes(farmed.done(StartFarm(farm=farm)))[clone.name]["identity"]

    assert (parts(told["kept"]), told["pending"]) == (PUT_OFF[:3], [])
    assert "did not answer" in told["kept"][0]["reason"]
    assert links(clone) == {"up"}


def test_one_that_its_owner_has_connected_is_left_as_it_is(farmed: Farmed, source: Guest) -> None:
    """Somebody knows it by now as who it is."""
    farm, (clone,) = made_of(farmed, source, 1)
    xml = clone.domain.XMLDesc(2)
    clone.connection.defineXML(xml.replace("<link state='down'/>", "<link state='up'/>"))

    told = outcomes(farmed.done(StartFarm(farm=farm)))[clone.name]["identity"]

    assert parts(told["kept"]) == PUT_OFF[:3]
    assert "put up by somebody" in told["kept"][0]["reason"]
    assert clone.wait_ready().run("hostname") != (0, f"{clone.name}\n")
