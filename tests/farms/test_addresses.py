"""MAC addresses of clones are nobody else's on the host."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from farms.farmed import Farmed, outcomes

from lab.guest import Guest, attach
from services.cloner import addresses
from shared.commands import CloneSource, CreateClones, TakeSnapshot
from shared.hypervisor import duplicate, inventory
from shared.models import Clone, Server
from shared.operations.context import Context
from shared.settings import settings
from shared.vault import Vault

pytestmark = pytest.mark.vm


def with_card(farmed: Farmed) -> Guest:
    made = Guest.create(farmed.hypervisor, farmed.disks, None, [str(farmed.disk())], nic=True)
    farmed.guests.append(made)
    return made


def address(guest: Guest) -> str:
    found = guest.xml.find("devices/interface/mac")
    assert found is not None
    return found.get("address", "")


def tail(mac: str) -> bytes:
    """What follows the prefix."""
    return bytes.fromhex(mac.replace(":", ""))[3:]


def draw(monkeypatch: pytest.MonkeyPatch, *tails: bytes) -> Iterator[bytes]:
    """Have these be drawn, in this order."""
    left = iter(tails)
    monkeypatch.setattr(duplicate, "secrets", SimpleNamespace(token_bytes=lambda _: next(left)))
    return left


def test_clones_avoid_all_domains_of_the_host(
    farmed: Farmed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is drawn and another domain has, one that is off or one that is on, the source or
    another clone of the farm, is drawn again. The domains are read once for the farm."""
    off, on, guest = with_card(farmed), with_card(farmed), with_card(farmed)
    on.domain.create()
    source = Server(name=guest.name, host="kvm-1", domain_uuid=guest.domain.UUIDString())
    farmed.world.add(source)
    taken = [tail(address(each)) for each in (off, on, guest)]
    left = draw(monkeypatch, *taken, b"\1\2\3", b"\1\2\3", *taken, b"\1\2\4")
    readings: list[set[str]] = []
    real = inventory.addresses
    monkeypatch.setattr(
        addresses.inventory,
        "addresses",
        lambda connection: readings.append(real(connection)) or readings[-1],
    )

    made = farmed.done(
        CreateClones(
            source=CloneSource(kind="server", id=source.id),
            name=f"{guest.name}-{{n}}",
            count=2,
            start=False,
            identity="keep",
        )
    )

    for n in (1, 2):
        farmed.adopt(f"{guest.name}-{n}")
    assert {each["state"] for each in outcomes(made).values()} == {"ready"}, made.error
    found = {address(attach(farmed.hypervisor, f"{guest.name}-{n}")) for n in (1, 2)}
    assert found == {"52:54:00:01:02:03", "52:54:00:01:02:04"}
    assert list(left) == []
    assert len(readings) == 1
    folder = Vault(settings().vault).root / addresses.FOLDER
    assert [each.name for each in folder.iterdir()] == [".lock"]


def test_clones_avoid_what_is_being_made(farmed: Farmed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another operation's clones need not be defined yet; once it has ended without them, their
    addresses are free."""
    guest = with_card(farmed)
    xml = guest.domain.XMLDesc()
    clones = [
        Clone(operation_id="op", host="kvm-1", name=n, source_kind="server", source_id="s")
        for n in ("a", "b", "c")
    ]
    contexts = []
    for name in ("web", "db"):
        operation = farmed.world.submit(TakeSnapshot(server=farmed.world.server(name).id))
        contexts.append(Context(farmed.world.row(operation), "me"))
        monkeypatch.setattr(contexts[-1], "undo", lambda *_, **__: None)
    draw(monkeypatch, b"\1\2\3", b"\1\2\3", b"\1\2\4", b"\1\2\3")
    old = address(guest)

    with (
        addresses.reserved(contexts[0], clones[:1], xml) as first,
        addresses.reserved(contexts[1], clones[1:2], xml) as second,
    ):
        assert first[clones[0].id] == {old: "52:54:00:01:02:03"}
        assert second[clones[1].id] == {old: "52:54:00:01:02:04"}
    with addresses.reserved(contexts[1], clones[2:], xml) as third:
        assert third[clones[2].id] == {old: "52:54:00:01:02:03"}
