"""The guest's identity renewed by its own cloud-init, from a NoCloud seed with a new instance-id.

cloud-init takes a new instance-id for a new machine: it sets the hostname, makes SSH host keys
and writes its network configuration for the MACs that it finds. It does not know the machine-id,
so the seed brings what renews that, and the DHCP state that hangs on it, at the first boot.
Whether a guest has cloud-init, and does so, cannot be seen from outside before it has booted.
"""

import dataclasses
import io
import json
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

import pycdlib

from services.cloner.identity import guest
from services.cloner.identity.report import Renewal
from services.cloner.identity.way import Way, refuse_taken
from shared import faults
from shared.disks.space import full_is_said
from shared.hypervisor.domains import Domain
from shared.hypervisor.duplicate import CloneDefinition
from shared.hypervisor.errors import DefinitionInvalid
from shared.hypervisor.seed_drive import SUFFIX, with_seed

LABEL = "cidata"
_PENDING = "cloud-init is to renew it when the clone boots; it was given a new instance-id"
_BY_SEED = "cloud-init is to run what the seed brings for it when the clone boots"


@dataclass
class BySeed(Way):
    """A seed beside the clone's disks, in a drive of its own."""

    instance: str = ""
    seed: Path | None = None

    @property
    def files(self) -> list[Path]:
        return [self.seed] if self.seed else []

    def prepare(self, definition: CloneDefinition) -> CloneDefinition:
        path = self.folder / f"{self.name}{SUFFIX}"
        refuse_taken(path)
        try:
            xml = with_seed(definition.xml, path)
        except DefinitionInvalid as error:
            self.renewal = guest.nothing(error.detail)
            self.refuse_half_done()
            return definition
        self.seed, self.instance = path, f"triptych-{definition.uuid}"
        return dataclasses.replace(definition, xml=xml)

    def before_start(self, domain: Domain) -> None:
        if self.seed is None:
            return
        hostname = guest.hostname_for(self.name)
        write_seed(self.seed, self.instance, hostname, secrets.token_hex(16))
        faults.point("clone:seeded")
        self.renewal = Renewal(
            way="cloud-init",
            hostname=hostname,
            pending=[
                ("hostname", _PENDING),
                ("machine-id", _BY_SEED),
                ("ssh-host-keys", _PENDING),
                ("dhcp", _BY_SEED),
            ],
        )


def write_seed(path: Path, instance: str, hostname: str, machine_id: str) -> None:
    """Make a NoCloud seed, an ISO image, at `path`; only its owner may read it.

    Raises FileExistsError.
    """
    script = f"SEED={secrets.token_hex(32)}\n{guest.SCRIPT.read_text()}"
    once = ["cloud-init-per", "instance", "triptych-identity"]
    user_data = {
        "ssh_deletekeys": True,
        "preserve_hostname": False,
        # As they are in the source; a new machine's defaults would be set up otherwise.
        "users": [],
        "disable_root": False,
        "bootcmd": [[*once, "sh", "-c", script, "sh", "machine", hostname, machine_id]],
    }
    files = {
        # `local` has it act before the network comes up, with a machine-id of its own by then.
        "meta-data": {"instance-id": instance, "local-hostname": hostname, "dsmode": "local"},
        "user-data": user_data,
    }
    image = pycdlib.PyCdlib()
    image.new(interchange_level=3, vol_ident=LABEL, joliet=3, rock_ridge="1.09")
    for name, content in files.items():
        # JSON is YAML, and needs no care with what stands in the script.
        text = ("#cloud-config\n" if name == "user-data" else "") + json.dumps(content) + "\n"
        data = text.encode()
        short = name.replace("-", "").upper()
        image.add_fp(
            io.BytesIO(data), len(data), f"/{short}.;1", rr_name=name, joliet_path=f"/{name}"
        )
    with full_is_said(path.parent):
        path.touch(mode=0o600, exist_ok=False)
        with path.open("wb") as file:
            image.write_fp(file)
            os.fsync(file.fileno())
    image.close()
