"""A second guest out of the first one's memory, and what it has of the first one's network."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from operations.waiting import wait_for

from lab.guest import PREFIX, Guest, attach
from lab.libvirtd import Hypervisor
from shared.disks.engine import Capture, capture
from shared.disks.reflink import reflink
from shared.errors import Cancelled
from shared.hypervisor import memory
from shared.hypervisor.connection import connect
from shared.hypervisor.domains import Domain, define, find_by_name
from shared.hypervisor.duplicate import CloneDefinition, clone_definition
from shared.hypervisor.errors import MemoryNotUsable
from shared.hypervisor.memory import resume_from
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


@pytest.fixture(scope="module")
def copied(hypervisor: Hypervisor, xfs: Path, watchdog: Watchdog) -> Iterator[Capture]:
    """Disk and memory of a guest with a card that cannot be unplugged and one that can, and a
    wrong clock; the guest is gone."""
    folder = xfs / "source"
    cards = _card(FIXED, 0, 8) + _card(PLUGGED, 1, 0)
    with Guest.create(hypervisor, folder, extra_devices=cards) as source:
        source.start()
        source.run("ip link set eth0 up; ip link set eth1 up")
        source.agent("guest-set-time", time=WRONG_TIME * 10**9)
        assert _carriers(source) == {FIXED: "1", PLUGGED: "1"}
        domain = find_by_name(connect(hypervisor.uri), source.name)
        (folder / "copy").mkdir(mode=0o711)
        taken = capture(domain, folder / "copy", watchdog=watchdog, memory=True)
    yield taken
    shutil.rmtree(folder)


@pytest.fixture
def clone(
    hypervisor: Hypervisor, copied: Capture
) -> Iterator[tuple[Domain, CloneDefinition, Path]]:
    """Defined and not yet up: its domain, the definition in its save file, and that file."""
    assert copied.memory
    folder, name = copied.memory.parent.parent, f"{PREFIX}{uuid4().hex[:8]}"
    disk, saved = folder / f"{name}.qcow2", folder / f"{name}.save"
    reflink(copied.files[0].path, disk)
    reflink(copied.memory, saved)
    stored = SaveFile.read(saved)
    made = clone_definition(stored.xml, name=name, uuid=str(uuid4()), disk_paths={"vda": str(disk)})
    stored.with_definition(made.xml).write_to(saved)
    with attach(hypervisor, name):
        yield define(connect(hypervisor.uri), made.xml), made, saved


def _carriers(guest: Guest) -> dict[str, str]:
    """Of each card of the guest, by its address; of one that is down it is not known."""
    each = "echo $(cat $i/address) $(cat $i/carrier 2>/dev/null || echo down)"
    words = guest.run(f"cd /sys/class/net; for i in eth*; do {each}; done")[1].split()
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
    cards = unlink(domain, definition)
    domain.resume()
    guest.wait_ready()
    assert _carriers(guest) == {FIXED: "0", PLUGGED: "0"}

    assert set_clock(domain) is None
    kept = exchange(domain, cards)

    assert abs(int(guest.run("date +%s")[1]) - time.time()) < 60
    assert list(kept) == [definition.macs[FIXED]]
    assert "cannot be unplugged" in kept[definition.macs[FIXED]]

    def other_card() -> bool:  # the guest finds it in its own time
        guest.run("ip link set eth1 up 2>/dev/null")
        return _carriers(guest) == {FIXED: "0", definition.macs[PLUGGED]: "1"}

    wait_for(other_card)


def test_a_guest_that_does_not_let_go_of_its_cards(
    clone: tuple[Domain, CloneDefinition, Path],
) -> None:
    """It is not waited for longer than asked, its cards stay, and a clock is not set in vain."""
    domain, definition, saved = clone
    restore_paused(domain, saved)
    cards = unlink(domain, definition)

    kept = exchange(domain, cards, within_s=0.2)

    assert "did not let go" in kept[definition.macs[PLUGGED]]
    assert set(kept) == set(definition.macs.values())
    assert set_clock(domain) == "no guest agent answers in the guest"


def test_a_restore_that_is_cancelled(
    clone: tuple[Domain, CloneDefinition, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once QEMU is there, as before: the domain is off, and it can be restored the next time."""
    domain, _, saved = clone
    cancelled: list[object] = []
    monkeypatch.setattr(memory, "_CHECK_S", 0.005)

    for bring_up in (restore_paused, resume_from):

        def cancel(bring_up: object = bring_up) -> None:
            if domain.is_active:
                cancelled.append(bring_up)
                raise Cancelled("The clone was cancelled.")

        deadline = time.monotonic() + 90
        while bring_up not in cancelled and time.monotonic() < deadline:
            domain.destroy()  # it may be there before it is cancelled
            with contextlib.suppress(Cancelled):
                bring_up(domain, saved, check=cancel)
        assert bring_up in cancelled
        assert domain.state == "stopped"
    restore_paused(domain, saved)
    assert domain.state == "paused"


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
