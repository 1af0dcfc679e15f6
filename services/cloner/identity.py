"""What of a clone's identity is its own, and what it still shares with its source (C3)."""

from shared.hypervisor.definition import DomainDefinition

KEPT_IN_GUEST = (
    ("hostname", "inside the guest; set it there, or let cloud-init do so"),
    ("machine-id", "inside the guest; write a new one to /etc/machine-id and reboot"),
    ("ssh-host-keys", "inside the guest; delete them and run `ssh-keygen -A`"),
)


def report(definition: str) -> dict[str, list[dict[str, str]] | list[str]]:
    """`{renewed: […], kept: [{part, reason}]}` of a clone that was defined from `definition`.

    The host's side is renewed with the definition; nothing inside the guest is touched.
    """
    parsed = DomainDefinition.parse(definition)
    renewed = ["name", "uuid"]
    renewed += [f"mac {mac}" for mac in parsed.macs]
    renewed += ["nvram"] if parsed.nvram_path else []
    kept = [{"part": part, "reason": reason} for part, reason in KEPT_IN_GUEST]
    return {"renewed": renewed, "kept": kept}
