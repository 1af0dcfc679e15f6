"""Whose a clone is: what it has of its own, inside the guest too, and what is its source's still.

Owns: which way a guest's identity is renewed, the ways, and the report (C3). The host's side
(UUID, MACs, sockets, ports) is renewed with the definition, by `shared.hypervisor.duplicate`.
`renew.sh` is what is done in a Linux guest, whichever way it gets there.
"""

from services.cloner.identity.at_first_start import is_put_off, renew_started, start_unlinked
from services.cloner.identity.by_agent import connect, renew_in_guest
from services.cloner.identity.choice import Choice, choose
from services.cloner.identity.report import public, report
from services.cloner.identity.way import Way, refuse_taken

__all__ = [
    "Choice",
    "Way",
    "choose",
    "connect",
    "is_put_off",
    "public",
    "refuse_taken",
    "renew_in_guest",
    "renew_started",
    "report",
    "start_unlinked",
]
