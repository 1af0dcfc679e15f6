"""A Linux guest's identity: asked for, renewed and judged, by whatever runs `renew.sh` in it.

What counts is what the guest tells afterwards, never that a command ended well:
systemd-machine-id-setup, for one, succeeds and gives the old id back.
"""

import re
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path

from services.cloner.identity.report import Renewal

SCRIPT = Path(__file__).with_name("renew.sh")
SYSTEM_PARTS = ("hostname", "machine-id", "ssh-host-keys")
"""What is named as kept where nobody could look into the guest."""
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")

Run = Callable[[str, list[str]], str]
"""Runs a script with `sh` in the guest, with these arguments; gives its output."""
Facts = dict[str, list[str]]


def hostname_for(name: str) -> str:
    """A clone's name as the name of a host (RFC 1123): letters, digits and dashes, in labels."""
    labels = (re.sub(r"[^A-Za-z0-9-]", "-", label).strip("-") for label in name.split("."))
    return ".".join(filter(None, labels))


def renew(run: Run, name: str, macs: Mapping[str, str], before: Facts) -> Renewal:
    """Give the guest its own identity; `macs` has the clone's MACs by the source's. What the guest
    told of itself is in `before` then, also where it ends in an error.

    Raises what `run` raises.
    """
    pairs = [f"{old}={new}".lower() for old, new in macs.items() if old.lower() != new.lower()]
    pairs = [pair for pair in pairs if all(map(_MAC.fullmatch, pair.split("=")))]
    hostname, machine_id = hostname_for(name), secrets.token_hex(16)
    script = SCRIPT.read_text()
    before.update(_facts(run(script, ["look", *pairs])))
    if before.get("kernel") != ["Linux"]:
        return nothing("the guest is not Linux")
    seed = f"SEED={secrets.token_hex(32)}\n"
    run(seed + script, ["renew", hostname, machine_id, *pairs])
    return judge(before, _facts(run(script, ["look", *pairs])), hostname, machine_id)


def nothing(reason: str, before: Facts | None = None) -> Renewal:
    """Nothing in the guest is known to be renewed, for that reason; `before` is what it told of
    itself."""
    kept = [(part, reason) for part in SYSTEM_PARTS]
    return Renewal(kept=kept, addresses=(before or {}).get("static-address", []))


def judge(before: Facts, after: Facts, hostname: str, machine_id: str) -> Renewal:
    """What the guest tells of itself, before and after, in terms of what is its own now.

    What a guest does not have (an SSH server, a DHCP client) is neither renewed nor kept.
    """
    result = Renewal(hostname=hostname, addresses=after.get("static-address", []))

    def part(name: str, is_own: bool, otherwise: str) -> None:
        if is_own:
            result.renewed.append(name)
        else:
            result.kept.append((name, otherwise))

    names = after.get("hostname", []) + after.get("stored-hostname", [])
    part("hostname", bool(names) and set(names) == {hostname}, f"the guest still says {names}")
    if "machine-id" in before:
        ids = after.get("machine-id", []) + after.get("dbus-machine-id", [])
        own = after.get("machine-id") == [machine_id] and set(ids) == {machine_id}
        part("machine-id", own, "it could not be written in the guest; is /etc read-only?")
    if old_keys := before.get("ssh-host-key"):
        keys = after.get("ssh-host-key")
        own = bool(keys) and not set(keys or []) & set(old_keys)
        part("ssh-host-keys", own, "no new ones could be made in the guest, so the old ones stay")
    if before.get("source-mac"):
        left = after.get("source-mac", [])
        part("network-config", not left, f"it still names the source's MAC: {', '.join(left)}")
    if bridges := before.get("bridge-mac"):
        left = sorted(set(bridges) & set(after.get("bridge-mac", [])))
        part("bridge-mac", not left, f"{', '.join(left)} is the source's until it is made anew")
    if after.get("dhcp-client"):
        stale = set(before.get("dhcp-state", [])) & set(after.get("dhcp-state", []))
        files = ", ".join(sorted(each.split(" ", 2)[-1] for each in stale))
        part("dhcp", not stale, f"the lease or DUID in {files} could not be dropped")
    return result


def _facts(output: str) -> Facts:
    facts: Facts = {}
    for line in output.splitlines():
        key, tab, value = line.partition("\t")
        if tab:
            facts.setdefault(key, []).append(value.strip())
    return facts
