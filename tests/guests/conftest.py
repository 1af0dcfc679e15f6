"""A real Debian, registered with a whole Triptych, on a network with a DHCP server."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from guests.debian_server import Server, debian_on
from system.live_site import Site, open_site

from lab import guestfs
from lab.libvirtd import Hypervisor
from lab.network import Network, dhcp_network


@pytest.fixture(scope="session")
def network(hypervisor: Hypervisor) -> Iterator[Network]:
    with dhcp_network(hypervisor) as made:
        yield made


@pytest.fixture(scope="session")
def site(hypervisor: Hypervisor, network: Network) -> Iterator[Site]:
    """A stack on XFS that finds a guestfish; the network outlives its guests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{guestfs.programs()}:{os.environ['PATH']}")
        with open_site(hypervisor, "xfs", TRIPTYCH_IDENTITY_TIMEOUT="900") as made:
            yield made


@pytest.fixture(scope="session")
def golden(site: Site, network: Network) -> Iterator[Server]:
    """The server that is cloned, running, with an address."""
    with debian_on(site, network) as made:
        yield made
