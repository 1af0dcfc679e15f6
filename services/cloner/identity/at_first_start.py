"""The guest's identity renewed through its agent once Triptych starts a clone that was made off.

Until then its links are down. What will be needed of the source by then is written down with the
clone, since the source may be gone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.cloner.identity import guest
from services.cloner.identity.by_agent import ByAgent
from services.cloner.identity.report import LATER, Renewal, once_started
from shared.hypervisor.domains import Domain
from shared.hypervisor.links import without_links

_PENDING = "its guest's agent is to renew it when `triptych farm start` starts it"
_LINKS_DOWN = "they are down until then"
_TAKEN_OVER = "its links were put up by somebody before `triptych farm start` started it"


@dataclass
class AtFirstStart(ByAgent):
    """Links down in the definition, and the rest put off."""

    def before_start(self, domain: Domain) -> None:
        self.renewal = Renewal(
            way="agent",
            hostname=guest.hostname_for(self.name),
            pending=[*((part, _PENDING) for part in guest.SYSTEM_PARTS), ("links", _LINKS_DOWN)],
            later={"macs": dict(self.macs), "links": self.links},
        )


def is_put_off(identity: dict[str, Any]) -> bool:
    """Whether the clone of which this is told is to be renewed, or connected, once it runs."""
    return LATER in identity


def renew_started(
    domain: Domain,
    name: str,
    identity: dict[str, Any],
    note: Callable[[dict[str, Any]], None],
    check: Callable[[], None],
) -> None:
    """Do in the running clone of that name what was put off; `note` is given what is to be told of
    its identity from then on, before its links go up and at the end. Where it ends in an error, or
    dies, to do it again with what was noted last goes on.

    One whose links its owner has put up is somebody's already, and stays as it is. `check` is
    called in long waits, and its error ends it. Raises HypervisorError where a link cannot be put
    up.
    """
    later = identity[LATER]
    way = ByAgent(name, Path(), False, check, macs=later.get("macs", {}), links=later["links"])
    if "macs" not in later:  # it is its own already
        way.renewal = Renewal("agent", identity["hostname"])
    else:
        up = without_links(domain.definition())[1]
        if set(up) & set(way.links):
            note(once_started(identity, guest.nothing(_TAKEN_OVER)))
            return
        way.renew(domain)
        told = once_started(identity, way.renewal)
        if way.renewal.addresses:
            note(told)
            return
        note({**told, LATER: {"links": way.links}})
    way.link(domain)
    note(once_started(identity, way.renewal))
