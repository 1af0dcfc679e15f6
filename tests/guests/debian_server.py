"""A Debian guest as a test sees it: who it is, told from inside and by the DHCP server."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import libvirt
from system.live_site import Site, wait_for

from lab.debian import MEMORY_MIB, debian, make_root
from lab.guest import Guest, attach
from lab.network import Lease, Network

BOOT_S = 900
"""Half a minute on an idle machine; emulated beside others it takes many times that."""


@dataclass(frozen=True)
class Identity:
    """What must differ between a clone and its source, and between clones."""

    hostname: str
    machine_id: str
    ssh_host_keys: frozenset[str]
    mac: str
    lease: Lease

    def shared_with(self, other: Identity) -> list[str]:
        """The names of what both have."""
        mine, theirs = vars(self), vars(other)
        shared = [name for name in mine if mine[name] == theirs[name]]
        keys = self.ssh_host_keys & other.ssh_host_keys
        ids = self.lease.client_id == other.lease.client_id
        addresses = self.lease.address == other.lease.address
        return [*shared, *["a key"] * bool(keys), *["DUID"] * ids, *["address"] * addresses]


@dataclass
class Server:
    """A Debian on the network, by its guest."""

    site: Site
    network: Network
    guest: Guest
    id: str

    def identity(self) -> Identity:
        """Once it answers, has a lease and serves SSH: what is served counts, not the files."""
        self.guest.wait_ready(BOOT_S)
        node = self.guest.xml.find("./devices/interface/mac")
        assert node is not None
        mac = node.attrib["address"]
        wait_for(lambda: mac in self.network.leases(), f"{self.guest.name} has a lease", BOOT_S)
        return Identity(
            hostname=self.guest.run("hostname")[1].strip(),
            machine_id=self.guest.read("/etc/machine-id").strip(),
            ssh_host_keys=wait_for(self._served_keys, f"{self.guest.name} serves SSH", BOOT_S),
            mac=mac,
            lease=self.network.leases()[mac],
        )

    def _served_keys(self) -> frozenset[str]:
        """All of them or none: a key that a busy guest is slow to prove is left out by the scan."""
        output = self.guest.run(
            "ls /etc/ssh/ssh_host_*_key.pub; ssh-keyscan -T 60 localhost", timeout=BOOT_S
        )[1]
        files = [line for line in output.splitlines() if line.startswith("/etc/ssh/")]
        served = [line for line in output.splitlines() if line.startswith("localhost ")]
        return frozenset(served if len(served) == len(files) else ())

    def clone(self, name: str) -> Server:
        """The clone of that name, as a server of this kind."""
        listed = self.site.client.clones.get(name)
        return Server(self.site, self.network, attach(self.site.hypervisor, name), listed["server"])


@contextlib.contextmanager
def debian_on(site: Site, network: Network) -> Iterator[Server]:
    """A registered, running Debian on the site's file system and the network."""
    disk = make_root(site.disks)
    guest = Guest.create(
        site.hypervisor,
        site.disks,
        name=f"golden-{network.name}",
        disks=[str(disk)],
        memory_mib=MEMORY_MIB,
        extra_devices=network.interface,
        boot=debian(),
    )
    with guest:
        guest.start(wait=False)
        yield Server(site, network, guest, site.register(guest))


def reboot(server: Server) -> None:
    """Have the guest restart, and wait until it answers again."""
    guest = server.guest

    def boot_id() -> str:
        with contextlib.suppress(libvirt.libvirtError, OSError):  # it is on its way
            return guest.read("/proc/sys/kernel/random/boot_id")
        return ""

    before = boot_id()
    guest.agent("guest-exec", path="/usr/bin/systemctl", arg=["reboot"])
    wait_for(lambda: boot_id() not in ("", before), f"{guest.name} restarts", BOOT_S)
