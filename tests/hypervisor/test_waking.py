"""A second guest out of the first one's memory, and what it has of the first one's network."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from lab.guest import Guest, attach
from lab.libvirtd import Hypervisor
from shared.disks.engine import capture
from shared.disks.reflink import reflink
from shared.hypervisor.connection import connect
from shared.hypervisor.domains import Domain, define, find_by_name
from shared.hypervisor.duplicate import CloneDefinition, clone_definition
from shared.hypervisor.errors import MemoryNotUsable
from shared.hypervisor.savefile import SaveFile
from shared.hypervisor.waking import exchange, restore_paused, set_clock, unlink
from shared.hypervisor.watchdog import Watchdog

pytestmark = pytest.mark.vm
FIXED, PLUGGED = "52:54:00:0f:00:01", "52:54:00:0f:00:02"
WRONG_TIME = 1_000_000_000


def _card(mac: str, bus: int, slot: int) -> str:
    return (
        f"<interface type='user'><mac address='{mac}'/><model type='virtio'/>"
        f"<address type='pci' bus='{bus}' slot='{slot}'/></interface>"
    )


@pytest.fixture
def clone(
    hypervisor: Hypervisor, xfs: Path, watchdog: Watchdog, folder: Path
) -> Iterator[tuple[Domain, CloneDefinition, Path]]:
    """Defined and not yet up: its domain, the definition in its save file, and that file.

    Its source has a card that cannot be unplugged and one that can, and a wrong clock.
    """
    cards = _card(FIXED, 0, 8) + _card(PLUGGED, 1, 0)
    with Guest.create(hypervisor, xfs / "source", extra_devices=cards) as source:
        source.start()
        source.run("ip link set eth0 up; ip link set eth1 up")
        source.agent("guest-set-time", time=WRONG_TIME * 10**9)
        assert _carriers(source) == {FIXED: "1", PLUGGED: "1"}
        domain = find_by_name(connect(hypervisor.uri), source.name)
        taken = capture(domain, folder, watchdog=watchdog, memory=True)
        assert taken.memory
        name, disk = f"{source.name}-c", xfs / "source" / "clone.qcow2"
        stored = SaveFile.read(taken.memory)
        made = clone_definition(
            stored.xml, name=name, uuid=str(uuid4()), disk_paths={"vda": str(disk)}
        )
        reflink(taken.files[0].path, disk)
        stored.with_definition(made.xml).write_to(taken.memory)
        with attach(hypervisor, name):
            yield define(connect(hypervisor.uri), made.xml), made, taken.memory


def _carriers(guest: Guest) -> dict[str, str]:
    """Of each card of the guest, by its address."""
    told = guest.run("cd /sys/class/net; for i in eth*; do cat $i/address $i/carrier; done")[1]
    words = told.split()
    return dict(zip(words[::2], words[1::2], strict=True))


def test_a_clone_wakes_without_a_link_and_gets_another_card(
    hypervisor: Hypervisor, clone: tuple[Domain, CloneDefinition, Path]
) -> None:
    """Neither card has a carrier when the guest runs; the one that can be is exchanged, the
    other stays as it is; and the clock is the host's."""
    domain, definition, saved = clone
    guest = attach(hypervisor, domain.name)
    restore_paused(domain, saved)
    assert domain.state == "paused"
    cards = unlink(domain, definition.xml)
    domain.resume()
    assert _carriers(guest) == {FIXED: "0", PLUGGED: "0"}

    assert set_clock(domain) is None
    kept = exchange(domain, cards)

    assert abs(int(guest.run("date +%s")[1]) - time.time()) < 10
    assert list(kept) == [definition.macs[FIXED]]
    assert "cannot be unplugged" in kept[definition.macs[FIXED]]
    guest.run("ip link set eth1 up")
    assert _carriers(guest) == {FIXED: "0", definition.macs[PLUGGED]: "1"}


def test_a_guest_that_does_not_let_go_of_its_cards(
    clone: tuple[Domain, CloneDefinition, Path],
) -> None:
    """It is not waited for longer than asked, its cards stay, and a clock is not set in vain."""
    domain, definition, saved = clone
    restore_paused(domain, saved)
    cards = unlink(domain, definition.xml)

    kept = exchange(domain, cards, within_s=0.2)

    assert "did not let go" in kept[definition.macs[PLUGGED]]
    assert set(kept) == set(definition.macs.values())
    assert set_clock(domain) == "no guest agent answers in the guest"


def test_a_memory_that_libvirt_cannot_take_is_refused(
    clone: tuple[Domain, CloneDefinition, Path],
) -> None:
    """Cut off in the middle of QEMU's stream: the error says so, and nothing is left running."""
    domain, _, saved = clone
    with saved.open("r+b") as file:
        file.truncate(saved.stat().st_size // 2)
    with pytest.raises(MemoryNotUsable, match="without memory"):
        restore_paused(domain, saved)
    assert domain.state == "stopped"
