"""A real Debian, registered with a whole Triptych, on a network with a DHCP server."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from guests.debian_server import Server, debian_on
from system.live_site import Site, open_site

from lab.libvirtd import Hypervisor
from lab.network import Network, dhcp_network


@pytest.fixture(scope="session")
def network(hypervisor: Hypervisor) -> Iterator[Network]:
    with dhcp_network(hypervisor) as made:
        yield made


@pytest.fixture(scope="session")
def site(hypervisor: Hypervisor, network: Network) -> Iterator[Site]:
    """A stack on XFS; the network outlives its guests."""
    with open_site(hypervisor, "xfs", TRIPTYCH_IDENTITY_TIMEOUT="900") as made:
        yield made


@pytest.fixture(scope="session")
def golden(site: Site, network: Network) -> Iterator[Server]:
    """The server that is cloned, running, with an address."""
    with debian_on(site, network) as made:
        yield made
