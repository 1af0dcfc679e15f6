"""A clone that is brought up from a memory: before its guest notices, and once it has to.

Owns: restoring from a save file, and the guest's network cards, which it knows by the addresses
of its source. Two machines of one address on a network harm each other, so until a guest has
other cards it has no link.

A `<link state='down'/>` in a save file does nothing: QEMU takes the link's state from the
stream, and libvirt believes the definition. Measured with libvirt 9.0 and QEMU 7.2: such a clone
announced itself, and its source's address, to the network. So the definition in the save file
has the new address, which is what QEMU announces, and the link is taken down before the guest
runs.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import libvirt
from lxml import etree

from shared.hypervisor.agent import CHANNEL, NO_AGENT, agent_ready
from shared.hypervisor.agent_timeout import answers_within
from shared.hypervisor.definition import parse_domain, to_text
from shared.hypervisor.domains import Domain
from shared.hypervisor.duplicate import CloneDefinition
from shared.hypervisor.errors import LibvirtBusy, LibvirtFailed
from shared.hypervisor.links import without_link
from shared.hypervisor.memory import restore

UNPLUG_S = 10.0
"""A Linux guest lets go of a card within a second through ACPI, and within six through PCIe."""
_POLL_S = 0.05
_AGENT_POLL_S = 0.01
"""It is there some ten milliseconds after the restore."""
_AGENT_TIMEOUT_S = 5
_AGENT_WAIT_S = 2.0
"""libvirt learns only after the restore, from an event, that the agent listens."""
_LIVE = libvirt.VIR_DOMAIN_AFFECT_LIVE


@dataclass(frozen=True)
class Card:
    """A network card, which its guest knows by its source's address (`was`), and
    the definition of what is to come in its place, with `mac`."""

    alias: str
    was: str
    mac: str
    xml: str


def restore_paused(
    domain: Domain, saved: Path, *, check: Callable[[], None] = lambda: None
) -> None:
    """Bring up a defined domain from a save file with its name and UUID; its CPUs stand still.

    Raises what `restore` does.
    """
    restore(
        domain,
        saved,
        libvirt.VIR_DOMAIN_SAVE_PAUSED,
        "This clone was not made; its source was not touched. Clone it without memory.",
        check,
    )


def unlink(domain: Domain, restored: CloneDefinition) -> list[Card]:
    """Take down the link of every card of a domain that was restored with this definition."""
    interfaces = parse_domain(restored.xml).iterfind("devices/interface")
    wanted = {_mac(each): to_text(each) for each in interfaces}
    was = {new: old for old, new in restored.macs.items()}
    cards = []
    for live in _interfaces(domain):
        mac = _mac(live)
        cards.append(Card(_alias(live), was[mac], mac, wanted[mac]))
        _update(domain, without_link(to_text(live)))
    return cards


def _update(domain: Domain, xml: str) -> None:
    domain.call("Unlinking", lambda handle: handle.updateDeviceFlags(xml, _LIVE))


def exchange(
    domain: Domain,
    cards: Sequence[Card],
    *,
    check: Callable[[], None] = lambda: None,
    within_s: float = UNPLUG_S,
) -> dict[str, str]:
    """Unplug these cards of a running guest and plug in others, linked as their definitions say.

    Gives, by MAC, why a card was not exchanged. One that stays has no link; its guest did not
    let go of it within `within_s` seconds. `check` is called meanwhile, and its error ends it.
    """
    kept: dict[str, str] = {}
    waiting = [card for card in cards if not _unplug(domain, card, kept)]
    deadline = time.monotonic() + within_s
    while waiting and time.monotonic() < deadline:
        check()
        there = {_alias(each) for each in _interfaces(domain)}
        for card in waiting:
            if card.alias not in there:
                _plug(domain, card, kept)
        waiting = [card for card in waiting if card.alias in there]
        time.sleep(_POLL_S if waiting else 0)
    late = f"the guest did not let go of its network card within {within_s:.0f} s"
    return kept | {card.mac: late for card in waiting}


def _unplug(domain: Domain, card: Card, kept: dict[str, str]) -> bool:
    """Whether it cannot be; that is in `kept` then. libvirt only asks the guest."""
    try:
        domain.call("Unplugging from", lambda handle: handle.detachDeviceAlias(card.alias, _LIVE))
    except LibvirtFailed as error:
        kept[card.mac] = f"its network card cannot be unplugged ({error.detail})"
    return card.mac in kept


def _plug(domain: Domain, card: Card, kept: dict[str, str]) -> None:
    try:
        domain.call("Plugging into", lambda handle: handle.attachDeviceFlags(card.xml, _LIVE))
    except LibvirtFailed as error:
        kept[card.mac] = f"its network card is unplugged and another cannot be ({error.detail})"


def set_clock(domain: Domain) -> str | None:
    """Give a running guest the host's time through its agent; why not, where that fails."""
    deadline = time.monotonic() + (_AGENT_WAIT_S if _has_channel(domain) else 0)
    while not agent_ready(domain):
        if time.monotonic() > deadline:
            return NO_AGENT
        time.sleep(_AGENT_POLL_S)

    def give(handle: Any) -> None:
        with answers_within(handle, _AGENT_TIMEOUT_S):
            seconds, nanoseconds = divmod(time.time_ns(), 10**9)
            handle.setTime({"seconds": seconds, "nseconds": nanoseconds})

    try:
        domain.call("Setting the clock of", give)
    except (LibvirtBusy, LibvirtFailed) as error:
        return error.detail
    return None


def _has_channel(domain: Domain) -> bool:
    definition = parse_domain(domain.live_definition())
    return definition.find(f"devices/channel/target[@name='{CHANNEL}']") is not None


def _interfaces(domain: Domain) -> list[etree._Element]:
    return parse_domain(domain.live_definition()).findall("devices/interface")


def _mac(interface: etree._Element) -> str:
    mac = interface.find("mac")
    return mac.get("address", "") if mac is not None else ""


def _alias(interface: etree._Element) -> str:
    alias = interface.find("alias")
    return alias.get("name", "") if alias is not None else ""
