"""The guest's identity renewed through its agent, while nothing can reach it by the network.

The clone is started with its links down; they are put up when its identity is its own, so that
no DHCP server, and no known_hosts file, ever sees the source's at a second place.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from services.cloner.identity import guest
from services.cloner.identity.report import Renewal
from services.cloner.identity.way import Way
from shared import faults
from shared.hypervisor import guest_exec
from shared.hypervisor.domains import Domain
from shared.hypervisor.duplicate import CloneDefinition
from shared.hypervisor.errors import HypervisorError
from shared.hypervisor.links import link_up, without_links
from shared.settings import settings

_RENEW_S = 60.0
_CONNECT_S = 30.0
_DOWN = "its interfaces were not brought up through the guest agent, and come up when it boots"
_HOSTS = "it is a function of the host's, so it was on the network before its guest was renewed"


@dataclass
class ByAgent(Way):
    """Links down in the definition; after the start, the agent; then links up."""

    links: list[str] = field(default_factory=list)

    def prepare(self, definition: CloneDefinition) -> CloneDefinition:
        self.macs = definition.macs
        xml, self.links = without_links(definition.xml)
        return dataclasses.replace(definition, xml=xml)

    def renew(self, domain: Domain) -> None:
        self.renewal = renew_in_guest(domain, self.name, self.macs, check=self.check)
        faults.point("clone:renewed")
        self.refuse_half_done()

    def after_start(self, domain: Domain) -> None:
        self.renew(domain)
        if not self.renewal.addresses:
            self.link(domain)

    def link(self, domain: Domain) -> None:
        """Put up the links of a guest that has its own identity, and have it ask for its leases."""
        for mac in link_up(domain, self.links):
            self.renewal.kept.append((f"link of {mac}", _HOSTS))
        faults.point("clone:linked")
        self.connected(domain, ())

    def connected(self, domain: Domain, macs: Collection[str]) -> None:
        reason = connect(domain, macs, check=self.check)
        if reason and self.renewal.renewed:  # otherwise nothing was taken down either
            self.renewal.pending.append(("network", f"{_DOWN}: {reason}"))


def renew_in_guest(
    domain: Domain,
    name: str,
    macs: Mapping[str, str],
    *,
    check: Callable[[], None] = lambda: None,
) -> Renewal:
    """Give a running guest, whose links are down, its own identity through its agent.

    Its hostname becomes `name`, as far as that can be one; `macs` has its MACs by the source's.
    It waits for the agent, `TRIPTYCH_IDENTITY_TIMEOUT` at most, and calls `check` meanwhile, whose
    error ends it. What could not be renewed is named in the result, with the reason; nothing
    that goes wrong with the guest is raised. What DHCP has part in is down afterwards: see
    `connect`.
    """
    before: guest.Facts = {}
    try:
        guest_exec.wait_for_agent(domain, settings().identity_timeout.total_seconds(), check)
        if guest_exec.system_of(domain) == "mswindows":
            return guest.nothing("the guest is Windows; run sysprep in it")
        if reason := guest_exec.refusal(domain):
            return guest.nothing(reason)

        def run(script: str, arguments: list[str]) -> str:
            return guest_exec.run(
                domain,
                "/bin/sh",
                ["-s", "--", *arguments],
                standard_input=script,
                timeout_s=_RENEW_S,
                check=check,
            ).output

        renewal = guest.renew(run, name, macs, before)
    except HypervisorError as error:
        renewal = guest.nothing(error.detail, before)
    renewal.way = "agent"
    return renewal


def connect(
    domain: Domain,
    macs: Collection[str] = (),
    *,
    check: Callable[[], None] = lambda: None,
) -> str | None:
    """Have the guest, whose links are up, bring up what was taken down, and ask for its leases.

    It is waited for until the guest sees the cards of these MACs, which were plugged in just now.
    Gives the reason where that does not work; nothing that goes wrong with the guest is raised.
    """
    try:
        ran = guest_exec.run(
            domain,
            "/bin/sh",
            ["-s", "--", "connect", *macs],
            standard_input=guest.SCRIPT.read_text(),
            timeout_s=_CONNECT_S,
            check=check,
        )
    except HypervisorError as error:
        return error.detail
    return "the guest does not see each of its network cards" if ran.status else None
