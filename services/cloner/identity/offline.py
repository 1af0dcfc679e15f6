"""The guest's identity renewed in the files of its disks, before it ever starts, by libguestfs.

Only ever on the clone's own disks: the paths come from the definition that was made for it.
libguestfs starts a small machine of its own that opens them, finds the operating system and runs
`renew.sh` in it; so it takes what has no agent, and it takes seconds per clone.
"""

import contextlib
import os
import re
import secrets
import select
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import structlog

from services.cloner.identity import guest
from services.cloner.identity.way import Way
from shared import faults
from shared.hypervisor.definition import DiskDefinition, DomainDefinition
from shared.hypervisor.domains import Domain
from shared.hypervisor.duplicate import CloneDefinition
from shared.hypervisor.links import link_down

log = structlog.get_logger()

_PATIENCE_S = 900.0
_KVM_PATIENCE_S = 120.0
"""With KVM it takes seconds; the first time on a host it also makes its machine."""
_TIDY_S = 3.0
_GONE_S = 3.0
_POLL_S = 0.5
_PLACE = "/triptych-renew.sh"
_COMPLAINT = re.compile(r"^(?:\*stdin\*:\d+: )?((?:guestfish|libguestfs: error): .*)", re.MULTILINE)
_KVM = Path("/dev/kvm")
_finding = threading.Lock()
_found: Mapping[str, str] | None = None
"""What `_acceleration` found out in this process."""


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
        before: guest.Facts = {}
        try:
            with _system(own, self.check) as run:
                self.renewal = guest.renew(run, self.name, self.macs, before)
        except (OfflineFailed, OSError) as error:
            self.renewal = guest.nothing(f"libguestfs could not change its disks: {error}", before)
        self.renewal.way = "offline"
        if self.renewal.addresses:
            link_down(domain)
        faults.point("clone:edited")
        self.refuse_half_done()


@contextmanager
def _system(disks: list[DiskDefinition], check: Callable[[], None]) -> Iterator[guest.Run]:
    """Runs scripts in the system on these disks, for as long as the block lasts.

    `check` is called meanwhile and may raise. Raises OfflineFailed.
    """
    drives = [word for disk in disks for word in (f"--format={disk.format}", "-a", str(disk.path))]
    with _guestfish(["--rw", *drives, "-i"], check, _acceleration(check)) as session:
        yield session.run
        session.tell(f"rm-f {_PLACE}")
        session.tell("umount-all")
        session.tell("shutdown")  # says whether all was written


def _acceleration(check: Callable[[], None]) -> Mapping[str, str]:
    """The environment in which libguestfs' machine comes up on this host.

    libguestfs uses KVM where /dev/kvm can be opened. There are hosts, nested ones above all, on
    which it can and each guest hangs or dies. So its machine is started once with nothing in it.
    """
    global _found
    if "LIBGUESTFS_BACKEND_SETTINGS" in os.environ or not os.access(_KVM, os.R_OK | os.W_OK):
        return {}
    while not _finding.acquire(timeout=_POLL_S):
        check()
    try:
        if _found is None:
            try:
                with _guestfish(["-a", os.devnull], check, {}) as session:
                    session.tell("run", _KVM_PATIENCE_S)
                _found = {}
            except OfflineFailed as error:
                log.warning("libguestfs.kvm_unusable", reason=str(error))
                _found = {"LIBGUESTFS_BACKEND_SETTINGS": "force_tcg"}
        return _found
    finally:
        _finding.release()


@contextmanager
def _guestfish(
    arguments: list[str], check: Callable[[], None], environment: Mapping[str, str]
) -> Iterator["_Session"]:
    """A guestfish, gone with all that it started when the block ends."""
    with tempfile.TemporaryDirectory(prefix="triptych-") as folder:
        errors = Path(folder) / "errors"
        with (
            errors.open("wb") as stderr,
            subprocess.Popen(
                # Of a worker that dies nothing is left that goes on changing disks.
                ["setpriv", "--pdeathsig", "KILL", "--", "guestfish", *arguments],
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                # Without libvirt: the clone's disks keep their owner, and no domain appears. The
                # machine that all share is not among what is in TMPDIR, but in CACHEDIR.
                env={
                    "LIBGUESTFS_BACKEND": "direct",
                    **os.environ,
                    **environment,
                    "LIBGUESTFS_TMPDIR": folder,
                },
                start_new_session=True,
            ) as process,
        ):
            try:
                yield _Session(process, errors, check, Path(folder) / "script")
            finally:
                _end(process)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Kill guestfish's QEMU, which has the disks open and would live for two seconds more.

    guestfish has nothing to wait for then: it ends, and removes its sockets, which are in /tmp
    whatever it is told. One that does not is killed as well.
    """
    for pid in _started_by(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert process.stdin  # noqa: S101
    process.stdin.close()
    deadline = time.monotonic() + _TIDY_S
    ended = os.WEXITED | os.WNOHANG | os.WNOWAIT  # its number stays taken
    while not os.waitid(os.P_PID, process.pid, ended) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + _GONE_S
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.02)


def _started_by(leader: int) -> list[int]:
    """The other processes of its group."""
    found = []
    for each in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            group = int((each / "stat").read_text().rpartition(")")[2].split()[2])
            if group == leader != int(each.name):
                found.append(int(each.name))
    return found


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

    def tell(self, command: str, patience_s: float | None = None) -> str:
        """The command's output. guestfish ends at the first that fails."""
        patience_s = patience_s or _PATIENCE_S
        mark = secrets.token_hex(8)
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin and stdout  # noqa: S101
        output, deadline = b"", time.monotonic() + patience_s
        try:
            stdin.write(f"{command}\necho {mark}\n".encode())
        except BrokenPipeError as error:
            raise OfflineFailed(self._why()) from error
        while not output.endswith(f"{mark}\n".encode()):
            self._check()
            if time.monotonic() > deadline:
                raise OfflineFailed(f"it took longer than {patience_s:g} s")
            if select.select([stdout], [], [], _POLL_S)[0]:
                if not (chunk := os.read(stdout.fileno(), 65536)):
                    raise OfflineFailed(self._why())
                output += chunk
        return output.decode(errors="replace")

    def _why(self) -> str:
        """Its first complaint: advice comes after it, many lines of it."""
        said = self._errors.read_text(errors="replace").strip()
        if found := _COMPLAINT.search(said):
            return found[1]
        return said.rpartition("\n")[2] or "guestfish ended without a word"
