"""The links of a domain's network interfaces: whether their cables are in.

Owns: taking them out of a definition, and putting them in on a running domain. A link that the
owner of the domain took out is never put in.
"""

from collections.abc import Collection
from typing import Any

import libvirt
from lxml import etree

from shared.hypervisor.definition import parse_domain, to_text
from shared.hypervisor.domains import Domain


def without_links(definition: str) -> tuple[str, list[str]]:
    """The definition with all links down, and the MACs of the interfaces whose link was up."""
    root = parse_domain(definition)
    macs = []
    for interface in root.iterfind("devices/interface"):
        link, mac = interface.find("link"), interface.find("mac")
        if mac is None or (link is not None and link.get("state") == "down"):
            continue
        if link is None:
            link = etree.SubElement(interface, "link")
        link.set("state", "down")
        macs.append(mac.get("address", ""))
    return to_text(root), macs


def link_up(domain: Domain, macs: Collection[str]) -> None:
    """Put up the links of these interfaces, in the running domain (if it runs) and for its next
    starts."""
    config = libvirt.VIR_DOMAIN_AFFECT_CONFIG
    _link_up(domain, domain.definition(), macs, config)
    if domain.is_active:
        _link_up(domain, domain.live_definition(), macs, libvirt.VIR_DOMAIN_AFFECT_LIVE)


def _link_up(domain: Domain, definition: str, macs: Collection[str], flags: int) -> None:
    for interface in parse_domain(definition).iterfind("devices/interface"):
        link, mac = interface.find("link"), interface.find("mac")
        if link is None or mac is None or mac.get("address", "") not in macs:
            continue
        link.set("state", "up")
        device = etree.tostring(interface, encoding="unicode")

        def put_up(handle: Any, device: str = device) -> Any:
            return handle.updateDeviceFlags(device, flags)

        domain.call("Putting up a link of", put_up)
