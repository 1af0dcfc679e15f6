"""Clones of a running server with what it has in memory (C5)."""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import subprocess
import threading
import time
from collections import defaultdict
from collections.abc import Iterator

import libvirt
import libvirt_qemu
import pytest
from live_site import Machine, Site, wait_for
from lxml import etree
from triptych import Problem

from lab.guest import Guest, attach
from shared.hypervisor.savefile import SaveFile

pytestmark = [pytest.mark.vm, pytest.mark.parametrize("site", ["xfs"], indirect=True)]
FARM = 3
COUNT = (
    "mkdir -p /run/held; mount -t tmpfs none /run/held; echo 0 >/run/held/count; "
    "sh -c 'i=0; while :; do i=$((i+1)); "
    "echo $i >>/run/held/count; sleep 0.2; done' </dev/null >/dev/null 2>&1 &"
)
"""Counts in memory alone."""
WRONG_TIME = 1_000_000_000
FIXED, PLUGGED = "52:54:00:0f:00:01", "52:54:00:0f:00:02"
"""The addresses of a card that cannot be unplugged, since it is not in a port, and of one that
can."""
ETH_P_ALL = 3
ADDRESS = "10.0.3.15"
INTERFACES = (
    f"iface eth1 inet manual\n  up ip address add {ADDRESS}/24 dev eth1; ip link set eth1 up\n"
    "  down ip address flush dev eth1\n"
)
STATIC = f"iface eth1 inet static\n  address {ADDRESS}\n  netmask 255.255.255.0\n"
"""For the ifupdown of busybox."""


@pytest.fixture(scope="module")
def bridge() -> Iterator[str]:
    name = f"trip{secrets.token_hex(4)}"
    subprocess.run(["ip", "link", "add", name, "type", "bridge"], check=True)
    subprocess.run(["ip", "link", "set", name, "up"], check=True)
    yield name
    subprocess.run(["ip", "link", "del", name], check=True)


@pytest.fixture(scope="module")
def counting(site: Site, bridge: str) -> Iterator[Machine]:
    """A running server that counts in memory, with two disks and two cards on one network."""

    def card(mac: str, bus: int, slot: int) -> str:
        return (
            f"<interface type='bridge'><mac address='{mac}'/><source bridge='{bridge}'/>"
            f"<model type='virtio'/><address type='pci' bus='{bus}' slot='{slot}'/></interface>"
        )

    cards = card(FIXED, 0, 8) + card(PLUGGED, 1, 0)
    guest = Guest.create(site.hypervisor, site.disks, disks=["qcow2", "raw"], extra_devices=cards)
    root = etree.fromstring(guest.domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE))
    root.insert(2, etree.Element("genid"))
    guest.connection.defineXML(etree.tostring(root, encoding="unicode"))
    guest.start()
    machine = Machine(site, guest, "running", site.register(guest))
    machine.write("common")
    guest.run("mkdir -p /etc/network; ln -s /run /var/run")
    guest.write("/etc/network/interfaces", INTERFACES)
    guest.write("/etc/machine-id", "a" * 32)
    assert guest.run("ifup eth1")[0] == 0
    guest.run(COUNT)
    guest.agent("guest-set-time", time=WRONG_TIME * 10**9)
    yield machine
    site.remove(machine)


def _count(guest: Guest) -> int:
    return int(guest.read("/run/held/count").split()[-1])


def _generation(guest: Guest) -> str:
    """The VM generation id as QEMU has it."""
    asked = '{"execute": "query-vm-generation-id"}'
    return str(json.loads(libvirt_qemu.qemuMonitorCommand(guest.domain, asked, 0))["return"])


def _card(guest: Guest, mac: str) -> tuple[str, str]:
    """A card's carrier in the guest, "0" or "1", and its name; "" where there is none."""
    found = guest.run(
        "for card in /sys/class/net/eth*; do ip link set ${card##*/} up; "
        f'[ "$(cat $card/address)" = {mac} ] && cat $card/carrier && echo ${{card##*/}}; done'
    )[1].split()
    return (found[0], found[1]) if found else ("", "")


def _address(guest: Guest) -> bool:
    return ADDRESS in guest.run("ip -4 address show dev eth1")[1]


def _agent_is_gone(guest: Guest) -> bool:
    """Whether nobody has its channel open inside: one that is only slow has."""
    channels = etree.fromstring(guest.domain.XMLDesc()).iterfind("devices/channel/target")
    return [channel.get("state") for channel in channels] == ["disconnected"]


@contextlib.contextmanager
def _watched() -> Iterator[dict[str, set[str]]]:
    """The addresses that come out of guests meanwhile, by the host's name of their card."""
    seen: dict[str, set[str]] = defaultdict(set)
    over = threading.Event()

    def listen() -> None:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL)) as wire:
            wire.settimeout(0.2)
            while not over.is_set():
                with contextlib.suppress(TimeoutError):
                    frame, (name, _, kind, *_) = wire.recvfrom(64)
                    if kind != socket.PACKET_OUTGOING:
                        seen[name].add(frame[6:12].hex(":"))

    thread = threading.Thread(target=listen)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def _taps(guest: Guest) -> set[str]:
    targets = etree.fromstring(guest.domain.XMLDesc()).iterfind("devices/interface/target")
    return {target.get("dev", "") for target in targets}


def test_clones_go_on_from_one_instant(site: Site, counting: Machine) -> None:
    """Each goes on counting by itself, with an identity, disks and a network card of its own,
    which its ifupdown has brought up; no address of the source's comes out of any, and the source
    runs on."""
    source = counting.guest
    before = _count(source)
    stem = f"{counting.name}-c"
    with _watched() as seen:
        operation = site.done(
            site.client.clones.create(
                counting.id, name=f"{stem}{{n}}", count=FARM, with_memory=True
            )
        )
        made = operation["result"]["clones"]
        clones = [attach(site.hypervisor, each["name"]).wait_ready() for each in made]
        taps = {tap for clone in clones for tap in _taps(clone)}
        wait_for(lambda: any(seen[tap] for tap in taps), "a clone says something")
        time.sleep(1)
    machines = [
        Machine(site, clone, "running", each["server"], 2)
        for clone, each in zip(clones, made, strict=True)
    ]

    counts = [_count(clone) for clone in clones]
    assert min(counts) >= before
    assert counting.read() == {"common"}
    for number, machine in enumerate(machines):
        assert machine.read() == {"common"}
        machine.write(f"clone {number}")
    for number, machine in enumerate(machines):
        assert machine.read() == {f"clone {number}"}
        wait_for(
            lambda number=number: _count(clones[number]) > counts[number], f"clone {number} counts"
        )
    assert counting.read() == {"common"}
    wait_for(lambda: _count(source) > before, "the source counts")

    everybody = [source, *clones]
    assert len({guest.domain.UUIDString() for guest in everybody}) == 1 + FARM
    assert len({_generation(guest) for guest in everybody}) == 1 + FARM
    assert len({guest.run("uname -n")[1] for guest in everybody}) == 1 + FARM
    assert len({guest.read("/etc/machine-id") for guest in everybody}) == 1 + FARM
    assert source.read("/etc/machine-id").strip() == "a" * 32
    for clone, each in zip(clones, made, strict=True):
        wait_for(lambda clone=clone: _address(clone), f"{clone.name} has its address")
        assert each["identity"]["pending"] == []
        assert abs(int(clone.run("date +%s")[1]) - time.time()) < 60
        fixed, plugged = [
            mac.get("address") for mac in clone.xml.findall("./devices/interface/mac")
        ]
        assert clone.xml.find("./devices/interface/link") is None
        assert _card(clone, FIXED)[0] == "0"
        assert _card(clone, plugged)[0] == "1"
        assert _card(clone, PLUGGED) == ("", "")
        identity = each["identity"]
        assert f"mac {plugged}" in identity["renewed"]
        assert f"mac {fixed}" not in identity["renewed"]
        kept = {item["part"]: item["reason"] for item in identity["kept"]}
        assert "it has no link" in kept[f"mac {FIXED}"]
        assert site.client.clones.get(each["id"])["with_memory"] is True
    assert not {mac for tap in taps for mac in seen[tap]} & {FIXED, PLUGGED}
    assert not list(site.disks.glob("*.save"))
    for machine in machines:
        site.remove(machine)


def test_a_clone_goes_on_from_a_snapshot_with_memory(site: Site, counting: Machine) -> None:
    """It goes on from the snapshot's instant, which is over, and the snapshot is as it was. One of
    a machine type that this host's QEMU has not is refused."""
    counting.write("then")
    site.done(site.client.snapshots.take(counting.id, with_memory=True))
    saved = site.copy_of("snapshot", counting) / "memory.save"
    was = saved.read_bytes()
    counting.write("common")

    operation = site.client.clones.create(
        counting.id, source_kind="snapshot", name=f"{counting.name}-s", with_memory=True
    )
    (made,) = site.done(operation)["result"]["clones"]

    clone = Machine(site, attach(site.hypervisor, made["name"]), "running", made["server"], 2)
    assert clone.read() == {"then"}
    assert _count(clone.guest) > 0
    assert saved.read_bytes() == was
    assert counting.read() == {"common"}
    site.remove(clone)

    stored = SaveFile.read(saved)
    stored.with_definition(stored.xml.replace("pc-q35-", "pc-q34-")).write_to(saved)
    try:
        never = {"source_kind": "snapshot", "name": f"{counting.name}-n", "with_memory": True}
        operation = site.client.clones.create(counting.id, **never)
        assert site.refused(operation) == "memory_not_cloneable"
    finally:
        saved.write_bytes(was)


def test_a_clone_whose_agent_ends_before_its_network_is_up(site: Site, counting: Machine) -> None:
    """It is made all the same, and says that its interfaces are down until it boots."""
    name = f"{counting.name}-a"
    asked = {"name": name, "with_memory": True}
    with site.points.held(
        lambda: site.client.clones.create(counting.id, **asked), "clone:connected"
    ) as operation:
        guest = attach(site.hypervisor, name)
        ending = ["-c", "sleep 0.2; rm /usr/sbin/qemu-ga; killall qemu-ga"]
        with contextlib.suppress(libvirt.libvirtError):  # it may be gone before it answers
            guest.agent("guest-exec", path="/bin/sh", arg=ending)
        wait_for(lambda: _agent_is_gone(guest), "the agent has ended")
    (made,) = site.done(operation)["result"]["clones"]

    assert made["state"] == "ready"
    assert "hostname" in made["identity"]["renewed"]
    (pending,) = made["identity"]["pending"]
    assert pending["part"] == "network"
    assert "agent" in pending["reason"]
    site.remove(Machine(site, guest, "running", made["server"], 2))


def test_a_clone_with_its_sources_static_address_has_no_link(site: Site, counting: Machine) -> None:
    """Neither now nor after its next start; its identity says which address, and what to do."""
    counting.guest.write("/etc/network/interfaces", STATIC)
    asked = {"name": f"{counting.name}-ip", "with_memory": True}
    try:
        operation = site.done(site.client.clones.create(counting.id, **asked))
    finally:
        counting.guest.write("/etc/network/interfaces", INTERFACES)
    (made,) = operation["result"]["clones"]

    guest = attach(site.hypervisor, made["name"]).wait_ready()
    kept = {item["part"]: item["reason"] for item in made["identity"]["kept"]}
    assert f"{ADDRESS} in /etc/network/interfaces; its links are down" in kept["ip-address"]
    assert "hostname" in made["identity"]["renewed"]
    macs = [mac.get("address", "") for mac in guest.xml.findall("./devices/interface/mac")]
    assert [_card(guest, mac)[0] for mac in (FIXED, macs[1])] == ["0", "0"]
    for flags in (0, libvirt.VIR_DOMAIN_XML_INACTIVE):
        links = etree.fromstring(guest.domain.XMLDesc(flags)).findall("./devices/interface/link")
        assert [link.get("state") for link in links] == ["down", "down"]
    assert _card(counting.guest, PLUGGED)[0] == "1"
    site.remove(Machine(site, guest, "running", made["server"], 2))


@contextlib.contextmanager
def _machine_id_that_stays(guest: Guest) -> Iterator[None]:
    file = "/etc/machine-id"
    script = f"mount -o bind {file} {file} && mount -o remount,bind,ro {file}"
    assert guest.run(script)[0] == 0
    try:
        yield
    finally:
        guest.run(f"umount {file}")


@pytest.mark.parametrize(("identity", "carrier"), [("auto", "0"), ("keep", "1")])
def test_a_clone_that_is_its_sources_double_has_no_link(
    site: Site, counting: Machine, identity: str, carrier: str
) -> None:
    """Unless that was asked for."""
    asked = {"name": f"{counting.name}-{identity}", "with_memory": True, "identity": identity}
    with _machine_id_that_stays(counting.guest):
        operation = site.done(site.client.clones.create(counting.id, **asked))
    (made,) = operation["result"]["clones"]

    guest = attach(site.hypervisor, made["name"]).wait_ready()
    kept = {item["part"]: item["reason"] for item in made["identity"]["kept"]}
    assert "machine-id" in kept
    assert ("virsh domif-setlink" in kept.get("links", "")) == (identity == "auto")
    (_, plugged) = [mac.get("address", "") for mac in guest.xml.findall("./devices/interface/mac")]
    assert _card(guest, plugged)[0] == carrier
    inactive = etree.fromstring(guest.domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE))
    links = [link.get("state") for link in inactive.findall("./devices/interface/link")]
    assert links == (["down", "down"] if identity == "auto" else [])
    site.remove(Machine(site, guest, "running", made["server"], 2))


def test_what_cannot_be_cloned_hot_is_refused(
    site: Site, counting: Machine, stopped: Machine
) -> None:
    """Before anything is copied: a server that is off, another size, a snapshot without memory."""
    off = site.client.clones.create(stopped.id, name="off", with_memory=True)
    assert site.refused(off) == "server_not_running"
    bigger = site.client.clones.create(counting.id, name="big", vcpus=2, with_memory=True)
    assert site.refused(bigger) == "memory_not_cloneable"
    site.done(site.client.snapshots.take(stopped.id))
    with pytest.raises(Problem) as refusal:
        site.client.clones.create(
            stopped.id, source_kind="snapshot", name="disks", with_memory=True
        )
    assert (refusal.value.status, refusal.value.code) == (409, "snapshot_without_memory")
