"""Which way a guest's identity is renewed: the one asked for, or what the evidence speaks for.

`auto` never fails a clone for its guest's sake (decision 0031): where nothing speaks for a way,
or the way does not work out, the clone is made and what it shares with its source is named.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from services.cloner.identity import guest
from services.cloner.identity.by_agent import ByAgent
from services.cloner.identity.way import Way
from shared.commands import CreateClones
from shared.errors import Unsupported
from shared.hypervisor import domains
from shared.hypervisor.agent import agent_ready
from shared.hypervisor.connection import connect
from shared.hypervisor.guest_exec import has_agent_channel
from shared.manifest import read_manifest
from shared.models import Server
from shared.settings import settings

NO_CHANNEL = "the server's definition has no channel for a guest agent"
_ASKED = "it was to be kept"


@dataclass(frozen=True)
class Choice:
    """A way for all clones of one operation, and why it is not another."""

    way: Literal["agent", "keep"]
    reason: str = ""
    required: bool = False

    def begin(self, name: str, check: Callable[[], None]) -> Way:
        """The way, for the clone of that name; `check` is called in long waits, and may raise."""
        if self.way == "agent":
            return ByAgent(name, self.required, check)
        return Way(name, False, check, guest.nothing(self.reason))


def choose(command: CreateClones, server: Server, folder: Path | None) -> Choice:
    """The way for clones of the running or stopped `server`, or of the copy of it in `folder`.

    Raises Unsupported for a way that was asked for and cannot work.
    """
    if command.identity == "keep":
        return Choice("keep", _ASKED)
    definition, agent_silent = _evidence(server, folder)
    channel = has_agent_channel(definition)
    if command.identity == "agent":
        if not channel:
            raise Unsupported(
                f"{NO_CHANNEL.capitalize()} (org.qemu.guest_agent.0), so that none can renew its "
                "clones' identity. No clone was made; add the channel and install "
                "qemu-guest-agent in the guest, or choose another `identity`."
            )
        return Choice("agent", required=True)
    if not channel:
        return Choice("keep", NO_CHANNEL)
    if agent_silent:
        return Choice("keep", "no guest agent answers in the server")
    if not command.start:
        return Choice("keep", "the clone was not started, and its agent answers only then")
    return Choice("agent")


def _evidence(server: Server, folder: Path | None) -> tuple[str, bool]:
    """The source's definition, and whether it runs and no agent answers in it.

    Of a stopped server, and of a copy, nobody knows before a clone of it was started.
    """
    if folder is not None:
        return (folder / read_manifest(folder).definition).read_text(), False
    domain = domains.find(connect(settings().libvirt_uri), server.domain_uuid)
    return domain.definition(), domain.state == "running" and not agent_ready(domain)
