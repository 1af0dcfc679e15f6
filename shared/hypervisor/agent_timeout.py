"""How long libvirt waits for an answer of a guest's agent.

It is a setting of the domain, for whoever asks its agent, and outlives its connection: an owner's
own freeze, which may take longer than ours may, would fail by it. So it is given back each time.
What it was before libvirt does not tell; by default it waits for as long as the agent takes
(virDomainAgentSetResponseTimeout).
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import libvirt


@contextlib.contextmanager
def answers_within(handle: Any, seconds: int) -> Iterator[None]:
    """Have a running domain's agent answer within so many seconds in the block. Raises
    libvirt.libvirtError."""
    handle.agentSetResponseTimeout(seconds)
    try:
        yield
    finally:
        unlimited(handle)


def unlimited(handle: Any) -> None:
    """Have libvirt wait for the agent as it does by default, if the domain is there to be told."""
    with contextlib.suppress(libvirt.libvirtError):
        handle.agentSetResponseTimeout(libvirt.VIR_DOMAIN_AGENT_RESPONSE_TIMEOUT_BLOCK)
