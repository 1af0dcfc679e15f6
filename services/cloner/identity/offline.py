"""The guest's identity renewed in the files of its disks, before it ever starts, by libguestfs.

Only ever on the clone's own disks: the paths come from the definition that was made for it.
libguestfs starts a small machine of its own that opens them, finds the operating system and runs
`renew.sh` in it; so it takes what has no agent, and it takes seconds per clone, minutes where
there is no KVM.
"""

import os
import secrets
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from services.cloner.identity import guest
from services.cloner.identity.way import Way
from shared import faults
from shared.hypervisor.definition import DiskDefinition, DomainDefinition
from shared.hypervisor.domains import Domain
from shared.hypervisor.duplicate import CloneDefinition

_PATIENCE_S = 900.0
_POLL_S = 0.5
_PLACE = "/triptych-renew.sh"


def installed() -> bool:
    """Whether libguestfs is installed on this host."""
    return shutil.which("guestfish") is not None


class OfflineFailed(Exception):
    """libguestfs could not do it; says why."""


@dataclass
class Offline(Way):
    """Files are changed once the disks are whole, and nothing else is."""

    def prepare(self, definition: CloneDefinition) -> CloneDefinition:
        self.macs = definition.macs
        return definition

    def before_start(self, domain: Domain) -> None:
        disks = DomainDefinition.parse(domain.definition()).disks
        own = [disk for disk in disks if disk.device == "disk" and not disk.readonly]
        try:
            with _guestfish(own, self.check) as run:
                self.renewal = guest.renew(run, self.name, self.macs)
        except (OfflineFailed, OSError) as error:
            self.renewal = guest.nothing(f"libguestfs could not change its disks: {error}")
        self.renewal.way = "offline"
        faults.point("clone:edited")
        self.refuse_half_done()


@contextmanager
def _guestfish(disks: list[DiskDefinition], check: Callable[[], None]) -> Iterator[guest.Run]:
    """Runs scripts in the system on these disks, for as long as the block lasts.

    `check` is called meanwhile and may raise. Raises OfflineFailed.
    """
    command = ["guestfish", "--rw"]
    for disk in disks:
        command += [f"--format={disk.format}", "-a", str(disk.path)]
    with tempfile.TemporaryDirectory(prefix="triptych-") as folder:
        errors = Path(folder) / "errors"
        with errors.open("wb") as stderr:
            process = subprocess.Popen(
                [*command, "-i"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                # Without libvirt: the clone's disks keep their owner, and no domain appears.
                env={"LIBGUESTFS_BACKEND": "direct", **os.environ},
                start_new_session=True,
            )
        session = _Session(process, errors, check, Path(folder) / "script")
        try:
            yield session.run
            session.tell(f"rm-f {_PLACE}")
            session.tell("umount-all")
            session.tell("shutdown")  # says whether all was written
        finally:
            process.kill()
            process.wait()


class _Session:
    """One guestfish, told one command after the other."""

    def __init__(
        self,
        process: "subprocess.Popen[bytes]",
        errors: Path,
        check: Callable[[], None],
        script: Path,
    ) -> None:
        self._process, self._errors, self._check, self._script = process, errors, check, script

    def run(self, script: str, arguments: list[str]) -> str:
        """See `guest.Run`; the arguments have no character that guestfish would take apart."""
        self._script.write_text(f"OFFLINE=1\n{script}")
        self.tell(f"upload {self._script} {_PLACE}")
        return self.tell(f'command "sh {_PLACE} {" ".join(arguments)}"')

    def tell(self, command: str) -> str:
        """The command's output. guestfish ends at the first that fails."""
        mark = secrets.token_hex(8)
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin and stdout  # noqa: S101
        output, deadline = b"", time.monotonic() + _PATIENCE_S
        try:
            stdin.write(f"{command}\necho {mark}\n".encode())
            stdin.flush()
        except BrokenPipeError as error:
            raise OfflineFailed(self._why()) from error
        while not output.endswith(f"{mark}\n".encode()):
            self._check()
            if time.monotonic() > deadline:
                raise OfflineFailed(f"it took longer than {_PATIENCE_S:.0f} s")
            if select.select([stdout], [], [], _POLL_S)[0]:
                if not (chunk := os.read(stdout.fileno(), 65536)):
                    raise OfflineFailed(self._why())
                output += chunk
        return output.decode(errors="replace")

    def _why(self) -> str:
        lines = self._errors.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "guestfish ended without a word"
