"""Which way a guest's identity is renewed: the one asked for, or what the evidence speaks for.

`auto` never fails a clone for its guest's sake (decision 0031): where nothing speaks for a way,
or the way does not work out, the clone is made and what it shares with its source is named.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from services.cloner.identity import guest
from services.cloner.identity.at_first_start import AtFirstStart
from services.cloner.identity.by_agent import ByAgent
from services.cloner.identity.by_seed import BySeed
from services.cloner.identity.offline import Offline, installed
from services.cloner.identity.way import Way
from shared.commands import CreateClones
from shared.errors import Unsupported
from shared.hypervisor import domains
from shared.hypervisor.agent import FROZEN, NO_AGENT, agent_ready
from shared.hypervisor.connection import connect
from shared.hypervisor.guest_exec import has_agent_channel, has_file
from shared.hypervisor.seed_drive import had_seed
from shared.manifest import read_manifest
from shared.models import Server
from shared.settings import settings

NO_CHANNEL = "the server's definition has no channel for a guest agent"
_CLOUD_INIT, _DISABLED = "/usr/bin/cloud-init", "/etc/cloud/cloud-init.disabled"
_ASKED = "it was to be kept"
_WAYS: dict[str, type[Way]] = {
    "agent": ByAgent,
    "agent-later": AtFirstStart,
    "cloud-init": BySeed,
    "offline": Offline,
}


@dataclass(frozen=True)
class Choice:
    """A way for all clones of one operation, and why it is not another."""

    way: Literal["agent", "agent-later", "cloud-init", "offline", "keep"]
    reason: str = ""
    required: bool = False

    def begin(self, name: str, folder: Path, check: Callable[[], None]) -> Way:
        """The way, for the clone of that name, whose disks will be in `folder`.

        `check` is called in long waits, and may raise.
        """
        if self.way == "keep":
            return Way(name, folder, False, check, guest.nothing(self.reason))
        return _WAYS[self.way](name, folder, self.required, check)


def choose(command: CreateClones, server: Server, folder: Path | None) -> Choice:
    """The way for clones of the running or stopped `server`, or of the copy of it in `folder`.

    Raises Unsupported for a way that was asked for and cannot work.
    """
    match command.identity:
        case "keep":
            return Choice("keep", _ASKED)
        case "auto":
            found = _evidence(server, folder, ask_guest=not command.start)
            if command.with_memory:
                return _of_the_running(found)
            return _by_evidence(found, command.start)
        case "agent" if not _evidence(server, folder).channel:
            raise Unsupported(
                f"{NO_CHANNEL.capitalize()} (org.qemu.guest_agent.0), so that none can renew its "
                "clones' identity. No clone was made; add the channel and install "
                "qemu-guest-agent in the guest, or choose another `identity`."
            )
        case "offline" if not installed():
            raise Unsupported(
                "libguestfs is not installed on the host, so that no disk can be changed offline. "
                "No clone was made; install libguestfs-tools, or choose another `identity`."
            )
        case way:
            return Choice(way, required=True)


def _by_evidence(found: "_Evidence", start: bool) -> Choice:
    """The agent's work is read back, and done before anybody sees the clone: so it comes first.

    Where nobody knows whether one answers a seed is surer, and costs nothing; libguestfs takes its
    time, and is asked when nothing else is left. Then the agent of a clone that is not started has
    its turn later, if there is known to be one.
    """
    if start and found.channel and (found.answers or not (found.silent or found.cloud_init)):
        return Choice("agent")
    if found.cloud_init:
        return Choice("cloud-init")
    if installed():
        return Choice("offline")
    if found.channel and found.answers:
        return Choice("agent-later")
    if not found.channel:
        return Choice("keep", f"{NO_CHANNEL}, and nothing tells of cloud-init in the guest")
    if found.silent:
        return Choice("keep", "no guest agent answers in the server")
    return Choice("keep", "the clone was not started, and its agent answers only then")


def _of_the_running(found: "_Evidence") -> Choice:
    """For clones that go on with memory: nothing else may change the disks of their guests."""
    if found.silent or not found.channel:
        return Choice(
            "keep", "no guest agent answers in the server" if found.channel else NO_CHANNEL
        )
    return Choice("agent")


@dataclass(frozen=True)
class _Evidence:
    """What is known of a source without having started a clone of it."""

    channel: bool
    answers: bool
    silent: bool
    """It runs or ran, and no agent answers in it. Of one that is off neither is known."""
    cloud_init: bool


def _evidence(server: Server, folder: Path | None, *, ask_guest: bool = False) -> _Evidence:
    """`ask_guest`: the agent of a running server is to say whether it has cloud-init."""
    if folder is not None:
        manifest = read_manifest(folder)
        definition = (folder / manifest.definition).read_text()
        answers = manifest.consistency_reason == FROZEN
        silent = manifest.consistency_reason == NO_AGENT
        return _Evidence(has_agent_channel(definition), answers, silent, had_seed(definition))
    domain = domains.find(connect(settings().libvirt_uri), server.domain_uuid)
    definition = domain.definition()
    cloud_init = had_seed(definition)
    answers = agent_ready(domain)
    if ask_guest and answers and not cloud_init:
        cloud_init = has_file(domain, _CLOUD_INIT) and not has_file(domain, _DISABLED)
    silent = domain.state == "running" and not answers
    return _Evidence(has_agent_channel(definition), answers, silent, cloud_init)
