"""Owns a network of the lab's own with a DHCP server, for guests that are to see each other."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator
from dataclasses import dataclass

import libvirt

from lab.libvirtd import Hypervisor

# No way leads out of it. The block is set apart for benchmarks (RFC 2544).
_NETWORK = """\
<network>
  <name>{name}</name>
  <bridge name='{name}' stp='off' delay='0'/>
  <ip address='198.18.{number}.1' netmask='255.255.255.0'>
    <dhcp><range start='198.18.{number}.10' end='198.18.{number}.250'/></dhcp>
  </ip>
</network>
"""


@dataclass(frozen=True)
class Lease:
    """What the DHCP server gave to a MAC: the address, and the client id it came with."""

    address: str
    client_id: str


class Network:
    """A libvirt network, by the name that its bridge has too."""

    def __init__(self, hypervisor: Hypervisor, name: str) -> None:
        self.hypervisor = hypervisor
        self.name = name

    @property
    def interface(self) -> str:
        """The XML of a NIC on it."""
        return f"<interface type='network'><source network='{self.name}'/><model type='virtio'/>\
</interface>"

    def leases(self) -> dict[str, Lease]:
        """By MAC, in lower case."""
        with self.hypervisor.connection() as connection:
            found = connection.networkLookupByName(self.name).DHCPLeases()
        return {each["mac"]: Lease(each["ipaddr"], each["clientid"]) for each in found}


@contextlib.contextmanager
def dhcp_network(hypervisor: Hypervisor) -> Iterator[Network]:
    """A network with a DHCP server, gone afterwards; needs dnsmasq."""
    name = f"trip{secrets.token_hex(4)}"
    with hypervisor.connection() as connection:
        connection.networkCreateXML(_NETWORK.format(name=name, number=secrets.randbelow(256)))
    try:
        yield Network(hypervisor, name)
    finally:
        with hypervisor.connection() as connection, contextlib.suppress(libvirt.libvirtError):
            connection.networkLookupByName(name).destroy()
