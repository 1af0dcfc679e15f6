"""The links of a domain's network interfaces: whether their cables are in.

Owns: taking them out of a definition, or for a domain's next starts, and putting them in. A link
that the owner of the domain took out is never put in.
"""

from collections.abc import Collection, Iterator

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
        _set_link(interface, "down")
        macs.append(mac.get("address", ""))
    return to_text(root), macs


def without_link(interface: str) -> str:
    """The definition of an interface with its link down."""
    return _set_link(etree.fromstring(interface), "down")


def link_down(domain: Domain) -> None:
    """Take out the links of all interfaces for the domain's next starts."""
    config = libvirt.VIR_DOMAIN_AFFECT_CONFIG
    for interface in parse_domain(domain.definition()).iterfind("devices/interface"):
        _update(domain, _set_link(interface, "down"), config)


def link_up(domain: Domain, macs: Collection[str]) -> list[str]:
    """Put up the links of these interfaces, in the running domain (if it runs) and for its next
    starts; returns those whose link never was down."""
    config, live = libvirt.VIR_DOMAIN_AFFECT_CONFIG, libvirt.VIR_DOMAIN_AFFECT_LIVE
    for _, device in linked(domain.definition(), macs):
        if device:
            _update(domain, device, config)
    if not domain.is_active:
        return []
    never_down = []
    for mac, device in linked(domain.live_definition(), macs):
        if device is None:
            never_down.append(mac)
        else:
            _update(domain, device, live)
    return never_down


def linked(definition: str, macs: Collection[str]) -> Iterator[tuple[str, str | None]]:
    """Those of these interfaces that have a `<link>`, with it up, by MAC. None for a function of
    the host's that stands for one of a pool while the domain runs: that has no link of QEMU's, and
    libvirt changes nothing about it (qemuDomainChangeNet)."""
    for interface in parse_domain(definition).iterfind("devices/interface"):
        mac = interface.find("mac")
        address = mac.get("address", "") if mac is not None else ""
        if interface.find("link") is not None and address in macs:
            hosts = interface.get("type") in ("hostdev", "vdpa")
            yield address, None if hosts else _set_link(interface, "up")


def _set_link(interface: etree._Element, state: str) -> str:
    """Change it in place; returns it as text."""
    link = interface.find("link")
    if link is None:
        link = etree.SubElement(interface, "link")
    link.set("state", state)
    return to_text(interface)


def _update(domain: Domain, device: str, flags: int) -> None:
    domain.call("Setting a link of", lambda handle: handle.updateDeviceFlags(device, flags))
