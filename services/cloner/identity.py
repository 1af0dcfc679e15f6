"""What of a clone's identity is its own, and what it still shares with its source (C3)."""

from typing import Any

from shared.hypervisor.duplicate import CloneDefinition

KEPT_IN_GUEST = (
    ("hostname", "inside the guest; set it there, or let cloud-init do so"),
    ("machine-id", "inside the guest; write a new one to /etc/machine-id and reboot"),
    ("ssh-host-keys", "inside the guest; delete them and run `ssh-keygen -A`"),
)

KEPT_IN_MEMORY = (
    "smbios-uuid",
    "in the memory of the guest, which has read it; it is its own once it boots",
)


def report(definition: CloneDefinition, has_nvram: bool) -> dict[str, Any]:
    """`{renewed: […], kept: [{part, reason}], left_out: […]}` of a clone.

    The host's side is renewed with the definition; nothing inside the guest is touched.
    """
    renewed = ["name", "uuid", *(f"mac {mac}" for mac in definition.macs.values())]
    if has_nvram:
        renewed.append("nvram")
    return {
        "renewed": renewed,
        "kept": [{"part": part, "reason": reason} for part, reason in KEPT_IN_GUEST],
        "left_out": [
            {"target": each.target, "reason": each.reason} for each in definition.left_out
        ],
    }
