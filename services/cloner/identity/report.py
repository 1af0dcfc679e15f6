"""What of a clone's identity is its own, and what it still shares with its source (C3)."""

from dataclasses import dataclass, field
from typing import Any

from shared.hypervisor.duplicate import CloneDefinition

LATER = "later"
"""Beside what is told of a clone: what is needed to renew it once it is started."""
_ADVICE = {
    "hostname": "set it in the guest",
    "machine-id": "write a new one to /etc/machine-id and reboot",
    "ssh-host-keys": "delete them in the guest and run `ssh-keygen -A`",
    "links": "see to the rest of this list, then `virsh domif-setlink NAME MAC up`, and once more "
    "with `--config`; `identity: keep` connects such clones as they are",
    "ip-address": "its links are down. Give it another on its console and shut it down, then "
    "`virsh domif-setlink NAME MAC up --config` and start it",
}


@dataclass
class Renewal:
    """What became of the identity inside a guest.

    `kept` has (part, reason); `pending` what the guest is to do by itself when it boots;
    `addresses` are the source's static ones, which its owner has to change: two machines of one
    address on a network harm each other, so its links stay down.
    """

    way: str = "keep"
    hostname: str | None = None
    renewed: list[str] = field(default_factory=list)
    pending: list[tuple[str, str]] = field(default_factory=list)
    kept: list[tuple[str, str]] = field(default_factory=list)
    addresses: list[str] = field(default_factory=list)
    later: dict[str, Any] | None = None
    """What is needed to renew it once it is started (`at_first_start`)."""


def report(definition: CloneDefinition, has_nvram: bool, renewal: Renewal) -> dict[str, Any]:
    """`{way, hostname, renewed: […], pending: […], kept: [{part, reason}], left_out: […]}`."""
    on_host = ["name", "uuid", *(f"mac {mac}" for mac in definition.macs.values())]
    if has_nvram:
        on_host.append("nvram")
    of_source = [(part, f"{which}: its source's") for part, which in definition.kept]
    told = _told(renewal, on_host, _parts(of_source))
    told["left_out"] = [
        {"target": each.target, "reason": each.reason} for each in definition.left_out
    ]
    return told if renewal.later is None else {**told, LATER: renewal.later}


def once_started(told: dict[str, Any], renewal: Renewal) -> dict[str, Any]:
    """What is told of a clone that was made off, with what came of its renewal."""
    return {**_told(renewal, told["renewed"], told["kept"]), "left_out": told["left_out"]}


def public(told: dict[str, Any]) -> dict[str, Any]:
    """What of it is for users."""
    return {key: value for key, value in told.items() if key != LATER}


def _told(renewal: Renewal, on_host: list[str], of_source: list[dict[str, str]]) -> dict[str, Any]:
    kept = _parts(renewal.kept) + of_source
    if renewal.addresses:
        kept += _parts([("ip-address", f"its source's is {', '.join(renewal.addresses)}")])
    return {
        "way": renewal.way,
        "hostname": renewal.hostname,
        "renewed": on_host + renewal.renewed,
        "pending": [{"part": part, "reason": reason} for part, reason in renewal.pending],
        "kept": kept,
    }


def _parts(kept: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"part": part, "reason": _with_advice(part, reason)} for part, reason in kept]


def _with_advice(part: str, reason: str) -> str:
    return "; ".join(filter(None, [reason.rstrip("."), _ADVICE.get(part)]))
