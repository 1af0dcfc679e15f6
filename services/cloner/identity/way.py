"""What the ways have in common: the moments in a clone's making at which one may act."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from services.cloner.identity.report import Renewal
from shared.errors import CloneNameTaken, IdentityNotRenewed
from shared.hypervisor.domains import Domain
from shared.hypervisor.duplicate import CloneDefinition


@dataclass
class Way:
    """Leaves the guest as it is: `keep`. The others act at the moments that suit them."""

    name: str
    folder: Path
    """Where the clone's disks are."""
    required: bool
    """Whether it was asked for by name: then what it does not achieve fails the clone."""
    check: Callable[[], None]
    renewal: Renewal = field(default_factory=Renewal)
    macs: Mapping[str, str] = field(default_factory=dict)
    """The clone's by its source's, from `prepare` on."""

    @property
    def files(self) -> list[Path]:
        """What it makes beside the clone's disks, known after `prepare`."""
        return []

    def prepare(self, definition: CloneDefinition) -> CloneDefinition:
        """The definition as this way wants it, before it is defined."""
        return definition

    def before_start(self, domain: Domain) -> None:
        """The disks are whole, and nothing runs."""

    def renew(self, domain: Domain) -> None:
        """The guest runs, and its links are down."""

    def connected(self, domain: Domain, macs: Collection[str]) -> None:
        """The guest was renewed, and its links are up; the cards of these MACs are new to it."""

    def after_start(self, domain: Domain) -> None:
        """The clone was started from its disks."""

    def refuse_half_done(self) -> None:
        """Raises IdentityNotRenewed if this way was asked for and left something as it was."""
        if self.required and self.renewal.kept:
            what = "; ".join(f"{part}: {reason}" for part, reason in self.renewal.kept)
            raise IdentityNotRenewed(
                f"The identity of {self.name} could not be made its own. {what}. This clone was "
                "undone; see to the guest, or ask for `identity: auto`, which makes the clone and "
                "names what it keeps."
            )


def refuse_taken(path: Path) -> None:
    """Raises CloneNameTaken if a file of the clone's is there already."""
    if path.exists():
        raise CloneNameTaken(
            f"{path} exists already; this clone was not made and the file is as it was. "
            "Choose another name, or remove the file if nothing uses it.",
            conflict=str(path),
        )
