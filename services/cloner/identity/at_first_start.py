"""The guest's identity renewed through its agent once its farm starts a clone that was made off.

What will be needed of the source by then is written down with the clone, since the source may be
gone. Its links are down from its start until it is renewed, and which of them are to go up again is
written down before.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.cloner.identity import guest
from services.cloner.identity.by_agent import ByAgent
from services.cloner.identity.report import LATER, Renewal, once_started, public
from services.cloner.identity.way import Way
from shared.hypervisor.domains import Domain
from shared.hypervisor.duplicate import CloneDefinition
from shared.hypervisor.errors import GuestNotAnswering, HypervisorError
from shared.hypervisor.links import link_down, link_up, without_links

Note = Callable[[dict[str, Any]], None]
"""Given what is to be told of a clone's identity from now on."""
_PENDING = "its guest's agent is to renew it when `triptych farm start` starts it"
_IN_USE = "it was started, or connected, by other means than `triptych farm start`"


@dataclass
class AtFirstStart(Way):
    """Nothing is done yet."""

    def prepare(self, definition: CloneDefinition) -> CloneDefinition:
        self.renewal = Renewal(
            way="agent",
            hostname=guest.hostname_for(self.name),
            pending=[(part, _PENDING) for part in guest.SYSTEM_PARTS],
            later={"macs": dict(definition.macs)},
        )
        return definition


def is_put_off(identity: dict[str, Any]) -> bool:
    """Whether the clone of which this is told is to be renewed, or connected, by its farm's
    start."""
    return LATER in identity


def start_unlinked(domain: Domain, identity: dict[str, Any], note: Note) -> None:
    """Start the clone with its links down. One that somebody else has started before, as far as
    libvirt knows, is in use as who it is, and stays so; one that was renewed already is started.
    Raises HypervisorError; where it is off then, its links are as they were.
    """
    later = identity[LATER]
    if "macs" not in later:
        _connect_when_it_boots(domain, identity, note)
        return
    if "links" not in later and (domain.is_active or domain.was_on):
        note(once_started(identity, guest.nothing(_IN_USE)))
        domain.start()
        return
    links = sorted({*later.get("links", ()), *without_links(domain.definition())[1]})
    note({**identity, LATER: {**later, "links": links}})
    try:
        link_down(domain)
        domain.start()
    except HypervisorError:
        if domain.is_active:  # it was started after all, whoever did it
            return
        link_up(domain, links)
        note({**identity, LATER: {"macs": later["macs"]}})
        raise


def _connect_when_it_boots(domain: Domain, identity: dict[str, Any], note: Note) -> None:
    """Of one that has its own identity, and went off before its links were up."""
    if not domain.is_active:
        link_up(domain, identity[LATER]["links"])
        note(public(identity))
        domain.start()


def renew_started(
    domain: Domain, name: str, identity: dict[str, Any], note: Note, check: Callable[[], None]
) -> None:
    """Renew the clone of that name, which `start_unlinked` has started, and put its links up.
    Where that ends in an error, or dies, to do it again with what was noted last goes on.

    `check` is called in long waits, and its error ends it. Raises HypervisorError where the guest
    went off, or a link cannot be put up.
    """
    later = identity[LATER]
    way = ByAgent(name, Path(), False, check, macs=later.get("macs", {}), links=later["links"])
    if "macs" in later:
        definitions = domain.definition(), domain.live_definition()
        if any({*without_links(each)[1]} & {*way.links} for each in definitions):
            link_up(domain, way.links)
            note(once_started(identity, guest.nothing(_IN_USE)))
            return
        way.renew(domain)
        if not way.renewal.renewed and not domain.is_active:
            raise GuestNotAnswering(
                f"{name} went off before its identity was its own. Its links are down; see to its "
                "console, then start its farm again."
            )
        told = once_started(identity, way.renewal)
        if way.renewal.addresses:
            note(told)
            return
        note({**told, LATER: {"links": way.links, "renewed": way.renewal.renewed}})
    else:
        way.renewal = Renewal("agent", identity["hostname"], renewed=later["renewed"])
        others = [part for part in identity["renewed"] if part not in later["renewed"]]
        identity = {**identity, "renewed": others}
    way.link(domain)
    note(once_started(identity, way.renewal))
