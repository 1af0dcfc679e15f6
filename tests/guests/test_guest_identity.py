"""Clones of a real Debian: systemd, openssh-server, cloud-init, the guest agent, DHCP (C3)."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path

import pytest
from guests.debian_server import BOOT_S, Identity, Server, reboot
from system.live_site import Site, wait_for

pytestmark = [pytest.mark.vm, pytest.mark.timeout(3600)]

PENDING = {"hostname", "machine-id", "ssh-host-keys", "dhcp"}
RENEWED = {"name", "uuid", "hostname", "machine-id", "ssh-host-keys", "dhcp"}


def four_machines(before: Identity, golden: Server, clones: list[Server]) -> list[Identity]:
    """Who the source and its clones are: nobody is who another is, and the source who it was."""
    identities = [golden.identity(), *(clone.identity() for clone in clones)]
    for one, other in itertools.combinations(identities, 2):
        assert one.shared_with(other) == []
    assert before == identities[0]
    return identities


def digest(disk: Path) -> str:
    with disk.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def test_three_clones_and_their_source_are_four_machines(site: Site, golden: Server) -> None:
    """On one network they differ in name, machine-id, host keys, MAC, DUID and address."""
    before = golden.identity()
    assert before.hostname == "golden"

    operation = site.done(
        site.client.clones.create(golden.id, name="qa_{n}", count=3, identity="agent"),
        timeout=4 * BOOT_S,
    )

    clones = [golden.clone(name) for name in ("qa_1", "qa_2", "qa_3")]
    for number, made in enumerate(operation["result"]["clones"], start=1):
        told = made["identity"]
        assert set(told["renewed"]) >= RENEWED
        assert (told["way"], told["kept"], told["pending"]) == ("agent", [], [])
        assert told["hostname"] == f"qa-{number}"
    identities = four_machines(before, golden, clones)
    assert [each.hostname for each in identities] == ["golden", "qa-1", "qa-2", "qa-3"]

    reboot(clones[0])  # and it is no identity of one boot
    assert clones[0].identity() == identities[1]
    for clone in clones:
        clone.guest.remove()


def test_a_seed_makes_a_clone_another_machine(site: Site, golden: Server) -> None:
    """cloud-init renews all of it at the first boot, before a DHCP server sees who it was."""
    before = golden.identity()

    operation = site.done(
        site.client.clones.create(golden.id, name="seeded", identity="cloud-init"), timeout=BOOT_S
    )

    (made,) = operation["result"]["clones"]
    assert made["identity"]["way"] == "cloud-init"
    assert {each["part"] for each in made["identity"]["pending"]} == PENDING
    clone = golden.clone("seeded")
    clone.guest.wait_ready(BOOT_S)
    wait_for(
        lambda: "status: done" in clone.guest.run("cloud-init status")[1], "it is done", BOOT_S
    )
    own = clone.identity()
    assert own.shared_with(before) == []
    assert own.hostname == "seeded"
    assert golden.identity() == before

    reboot(clone)
    assert clone.identity() == own
    clone.guest.remove()


def test_disks_changed_offline_make_four_machines(site: Site, golden: Server) -> None:
    """libguestfs makes clones of a server that is off other machines before they first boot, and
    leaves no trace on them; of the source's disk no byte changes."""
    before = golden.identity()
    golden.guest.shutdown(BOOT_S)
    (disk,) = golden.guest.disks
    content = digest(disk)

    operation = site.done(
        site.client.clones.create(
            golden.id, name="off_{n}", count=3, identity="offline", start=False
        ),
        timeout=6 * BOOT_S,
    )

    assert digest(disk) == content
    clones = [golden.clone(name) for name in ("off_1", "off_2", "off_3")]
    for number, made in enumerate(operation["result"]["clones"], start=1):
        told = made["identity"]
        assert set(told["renewed"]) >= RENEWED
        assert (told["way"], told["kept"], told["pending"]) == ("offline", [], [])
        assert told["hostname"] == f"off-{number}"
    for server in (golden, *clones):
        server.guest.start(wait=False)
    identities = four_machines(before, golden, clones)
    assert [each.hostname for each in identities] == ["golden", "off-1", "off-2", "off-3"]
    for clone in clones:
        assert "triptych" not in clone.guest.run("ls -A /")[1]
        clone.guest.remove()
