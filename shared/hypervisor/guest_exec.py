"""Running a program inside a guest, through its agent.

Owns: whether the agent takes such orders, waiting for it after a start, the order itself with
its input and its output. What is run, and why, is the caller's.
"""

import base64
import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import libvirt
import libvirt_qemu
from lxml import etree

from shared.hypervisor.agent import agent_ready
from shared.hypervisor.domains import Domain
from shared.hypervisor.errors import GuestNotAnswering, HypervisorError

# One answer of the agent: it is idle, so that only a hung guest takes longer.
_ANSWER_S = 5
_POLL_S = 0.1
_FIRST_POLL_S = 0.01
_PART = 1 / 8
"""Of what a program has taken so far, until it is looked at again."""
_TRIES = 3
_ORDERS = ("guest-exec", "guest-exec-status")
_NAME = "org.qemu.guest_agent.0"


@dataclass(frozen=True)
class Ran:
    """What became of a program: its exit status, and what it wrote to its standard output."""

    status: int
    output: str


def has_agent_channel(definition: str) -> bool:
    """Whether a domain of that definition has the channel that a guest agent talks through."""
    target = f"devices/channel/target[@name='{_NAME}']"
    return etree.fromstring(definition).find(target) is not None


def wait_for_agent(domain: Domain, timeout_s: float, check: Callable[[], None]) -> None:
    """Return once the guest's agent answers; `check` is called meanwhile and may raise.

    Raises GuestNotAnswering when it has not within `timeout_s` seconds, or the guest went off.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        check()
        if agent_ready(domain):
            try:
                _order(domain, "guest-ping", timeout_s=2)
                return
            except HypervisorError:
                pass  # the port is open before the agent reads from it
        if not domain.is_active:
            raise GuestNotAnswering(f"{domain.name} went off before its guest agent answered.")
        if time.monotonic() > deadline:
            raise GuestNotAnswering(
                f"the guest agent of {domain.name} did not answer within {timeout_s:.0f} s."
            )
        time.sleep(_POLL_S)


def refusal(domain: Domain) -> str | None:
    """Why no program can be run in the guest, in words; None when one can.

    Raises what the agent's not answering raises.
    """
    known = _order(domain, "guest-info")["supported_commands"]
    enabled = {each["name"] for each in known if each["enabled"]}
    if not enabled.issuperset(_ORDERS):
        return (
            "the guest agent does not allow guest-exec; take it off the agent's block list "
            "(BLACKLIST_RPC or FILTER_RPC_ARGS in /etc/sysconfig/qemu-ga)"
        )
    return None


def is_frozen(domain: Domain) -> bool:
    """Whether the guest's file systems are frozen, as far as its agent tells."""
    if agent_ready(domain):
        for _ in range(_TRIES):
            with contextlib.suppress(HypervisorError):
                return bool(_order(domain, "guest-fsfreeze-status", timeout_s=2) == "frozen")
    return False


def system_of(domain: Domain) -> str:
    """The id of the operating system, such as `debian` or `mswindows`; empty if not told."""
    try:
        return str(_order(domain, "guest-get-osinfo").get("id", ""))
    except HypervisorError:
        return ""


def has_file(domain: Domain, path: str) -> bool:
    """Whether the guest has a file `path`; it is opened for reading, and nothing is run."""
    try:
        handle = _order(domain, "guest-file-open", path=path, mode="r")
    except HypervisorError:
        return False
    with contextlib.suppress(HypervisorError):
        _order(domain, "guest-file-close", handle=handle)
    return True


def run(
    domain: Domain,
    program: str,
    arguments: list[str],
    *,
    standard_input: str = "",
    timeout_s: float,
    check: Callable[[], None] = lambda: None,
) -> Ran:
    """Run `program` in the guest, as the agent's user, and wait for its end.

    No shell is between: `arguments` arrive as they are. `check` is called meanwhile and may
    raise; the program goes on then, as it does past `timeout_s`, which raises GuestNotAnswering.
    Raises LibvirtFailed when it could not be started. After a restart of libvirtd it may be run
    a second time.
    """
    started = _order(
        domain,
        "guest-exec",
        path=program,
        arg=arguments,
        input_data=base64.b64encode(standard_input.encode()).decode(),
        capture_output=True,
    )
    began = time.monotonic()
    while True:
        status = _order(domain, "guest-exec-status", pid=started["pid"])
        if status["exited"]:
            output = base64.b64decode(status.get("out-data", "")).decode(errors="replace")
            return Ran(status.get("exitcode", 128 + status.get("signal", 0)), output)
        if (waited := time.monotonic() - began) > timeout_s:
            raise GuestNotAnswering(
                f"{program} in {domain.name} did not end within {timeout_s:.0f} s."
            )
        check()
        time.sleep(min(max(_FIRST_POLL_S, waited * _PART), _POLL_S))


def _order(domain: Domain, command: str, timeout_s: int = _ANSWER_S, **arguments: Any) -> Any:
    request: dict[str, Any] = {"execute": command}
    if arguments:
        request["arguments"] = {key.replace("_", "-"): each for key, each in arguments.items()}

    def send(handle: libvirt.virDomain) -> str:
        return str(libvirt_qemu.qemuAgentCommand(handle, json.dumps(request), timeout_s, 0))

    answer = domain.call(f"Asking the guest agent ({command}) of", send)
    return json.loads(answer)["return"]
