"""Owns a libvirtd to run lab guests on: the machine's where one answers, else one of our own.

Our own comes in two shapes. With CAP_SYS_ADMIN it runs in a private mount namespace, with
private directories in place of libvirt's five, so that nothing of the machine's is touched and
any number of labs run side by side; its configuration is the distribution's, so the QEMU user
and the file ownership are what users have. Without (root in an ordinary container) it runs on
the container's own directories, with a `qemu.conf` that asks for nothing a container may not
do; the previous one is put back at the end.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import libvirt

from lab import filesystems, kvm, reaper

SYSTEM_URI = "qemu:///system"
SYSTEM_SOCKETS = (Path("/run/libvirt/libvirt-sock"), Path("/run/libvirt/virtqemud-sock"))
REPOSITORY = Path(__file__).resolve().parent.parent
#: What is dear to make and safe to keep: the guest's image, libvirt's findings about QEMU.
CACHE = Path(os.environ.get("TRIPTYCH_LAB_CACHE", REPOSITORY / ".cache"))
START_TIMEOUT_S = 90
# libvirtd 11.3 now and then hangs when told to end, for 30 s and more; its guests do not care.
STOP_TIMEOUT_S = 5
_REAPER = [sys.executable, str(Path(reaper.__file__))]
_UNIX_SOCKET_PATH_MAX = 107
_QEMU_CONF = Path("/etc/libvirt/qemu.conf")
_CONTAINER_QEMU_CONF = """\
user = "root"
group = "root"
security_driver = "none"
namespaces = []
cgroup_controllers = []
remember_owner = 0
"""


class LabUnavailable(RuntimeError):
    """This machine cannot run lab guests; the message tells what is missing."""


class Hypervisor:
    """A libvirtd to use. `ours` tells whether the lab started it, and so may stop it."""

    ours = False
    swtpm = Path("/var/lib/libvirt/swtpm")
    """Where its TPMs' state lies, as seen from outside."""

    def __init__(self, state_dir: Path, uri: str) -> None:
        self.state_dir = state_dir
        self.uri = uri
        self._qemu_user: str | None = None

    @property
    def qemu_user(self) -> str:
        """The name of the user that QEMU processes run as."""
        if self._qemu_user is None:
            with self.connection() as connection:
                self._qemu_user = _qemu_user(connection)
        return self._qemu_user

    @contextlib.contextmanager
    def connection(self) -> Iterator[libvirt.virConnect]:
        """Open a connection and close it afterwards."""
        connection = connect(self.uri)
        try:
            yield connection
        finally:
            connection.close()

    def start(self) -> None:
        """Start the daemon again after `stop`."""
        raise RuntimeError("this libvirtd is the machine's own; the lab does not start it")

    def stop(self, *, kill: bool = False) -> None:
        """Stop the daemon, or with `kill` let it die on the spot; its guests run on."""
        raise RuntimeError("this libvirtd is the machine's own; the lab does not stop it")


class OwnHypervisor(Hypervisor):
    """A libvirtd and a virtlogd that the lab started and will stop."""

    ours = True

    def __init__(self, state_dir: Path, uri: str, enter: list[str], run_dir: Path) -> None:
        super().__init__(state_dir, uri)
        self._enter = enter
        self._run_dir = run_dir
        self._virtlogd: subprocess.Popen[bytes] | None = None
        self._libvirtd: subprocess.Popen[bytes] | None = None
        self._found: set[str] = set()

    def start(self) -> None:
        """Start libvirtd (and virtlogd with the first start), and wait until it answers."""
        if self._virtlogd is None:
            self._start_virtlogd()
        if self._libvirtd is not None:
            raise RuntimeError("libvirtd is running already")
        self._libvirtd = self._spawn([*_REAPER, *self._inside()], "libvirtd")
        _wait_for(self._run_dir / "libvirt-sock", self._libvirtd, self.state_dir / "libvirtd.out")
        with self.connection() as connection:
            self._found = self._found or {d.UUIDString() for d in connection.listAllDomains()}

    def stop(self, *, kill: bool = False) -> None:
        """Stop libvirtd and wait for it to be gone; with `kill` by SIGKILL. Guests run on."""
        if self._libvirtd is not None:
            _end(self._libvirtd, reaper.KILL if kill else signal.SIGTERM)
            self._libvirtd = None
            (self._run_dir / "libvirt-sock").unlink(missing_ok=True)

    def close(self) -> None:
        """End every guest that came into being on this libvirtd, then both daemons."""
        with contextlib.suppress(libvirt.libvirtError, LabUnavailable):
            if self._libvirtd is None or self._libvirtd.poll() is not None:
                self._libvirtd = None
                self.start()
            with self.connection() as connection:
                for domain in connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE):
                    if domain.UUIDString() not in self._found:
                        with contextlib.suppress(libvirt.libvirtError):
                            domain.destroy()
        self.stop()
        if self._virtlogd is not None:
            _end(self._virtlogd)
            self._virtlogd = None

    def _start_virtlogd(self) -> None:
        if _answers(self._run_dir / "virtlogd-sock"):  # a container's, started by someone else
            return
        self._virtlogd = self._spawn(self._enter, "virtlogd")
        _wait_for(self._run_dir / "virtlogd-sock", self._virtlogd, self.state_dir / "virtlogd.out")

    def _inside(self) -> list[str]:
        """Join the mount namespace that virtlogd holds, if it has one of its own."""
        if not self._enter or self._virtlogd is None:
            return []
        return ["nsenter", f"--mount=/proc/{self._virtlogd.pid}/ns/mnt", "--wd=/", "--"]

    def _spawn(self, enter: list[str], daemon: str) -> subprocess.Popen[bytes]:
        # Its own pid file: the default one would be the machine's.
        command = [*enter, _which(daemon), "--pid-file", f"/run/libvirt/{daemon}.pid"]
        with (self.state_dir / f"{daemon}.out").open("ab") as output:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )


@contextlib.contextmanager
def libvirtd(state_dir: Path | None = None, *, own: bool = False) -> Iterator[Hypervisor]:
    """Yield a hypervisor to run lab guests on; see the module for which.

    `own` (or TRIPTYCH_LAB_LIBVIRTD=own) asks for one of our own, which can be stopped and
    started, also beside one that answers. `state_dir` is kept, a temporary directory is not.
    QEMU's user must be able to reach it. Raises `LabUnavailable` with what is missing.
    """
    own = own or os.environ.get("TRIPTYCH_LAB_LIBVIRTD") == "own"
    answering = any(_answers(path) for path in SYSTEM_SOCKETS)
    if own and answering and not filesystems.has_sys_admin():
        raise LabUnavailable("a libvirtd runs already, and two need CAP_SYS_ADMIN")
    if answering and not own:
        with _directory(state_dir) as directory:
            hypervisor = Hypervisor(directory, SYSTEM_URI)
            with kvm.opened_for(hypervisor.qemu_user):
                yield hypervisor
        return
    if os.geteuid() != 0:
        raise LabUnavailable(
            f"no libvirtd answers at {SYSTEM_URI}; start one, or be root so that the lab can"
        )
    with _directory(state_dir) as directory, kvm.opened_for(_distribution_qemu_user()):
        starter = _private if filesystems.has_sys_admin() else _in_container
        with starter(directory) as hypervisor:
            try:
                hypervisor.start()
                yield hypervisor
            finally:
                hypervisor.close()


def connect(uri: str) -> libvirt.virConnect:
    """Open a connection to `uri`, with libvirt's habit of writing to stderr turned off."""
    libvirt.registerErrorHandler(lambda *_: None, None)
    return libvirt.open(uri)


def check_reachable(path: Path, user: str) -> None:
    """Raise ValueError if `user` cannot walk to `path` (pytest's `tmp_path`, for one)."""
    account = pwd.getpwnam(user)
    if account.pw_uid == 0:
        return
    groups = os.getgrouplist(user, account.pw_gid)
    for directory in [path, *path.parents]:
        info = directory.stat()
        bit = 0o001
        if info.st_uid == account.pw_uid:
            bit = 0o100
        elif info.st_gid in groups:
            bit = 0o010
        if not info.st_mode & bit:
            raise ValueError(
                f"QEMU runs as {user}, who cannot enter {directory}; use lab.libvirtd.scratch()"
            )


@contextlib.contextmanager
def scratch(prefix: str = "triptych-lab-") -> Iterator[Path]:
    """Yield a temporary directory that QEMU's user can enter; it is deleted at the end."""
    directory = Path(tempfile.mkdtemp(prefix=prefix))
    directory.chmod(0o755)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def _directory(given: Path | None) -> Iterator[Path]:
    if given is None:
        with scratch("triptych-lab-libvirt-") as directory:
            yield directory
    else:
        given.mkdir(parents=True, exist_ok=True)
        yield given.resolve()


@contextlib.contextmanager
def _private(state: Path) -> Iterator[OwnHypervisor]:
    """Prepare directories and a mount namespace of our own."""
    filesystems.mount_root()  # shared before the namespace is made, or it sees no later mount
    places = {
        state / "etc": "/etc/libvirt",
        state / "run": "/run/libvirt",
        state / "lib": "/var/lib/libvirt",
        state / "log": "/var/log/libvirt",
        CACHE / "libvirt": "/var/cache/libvirt",
    }
    control = state / "run" / "libvirt-sock"
    if len(str(control)) > _UNIX_SOCKET_PATH_MAX:
        raise ValueError(f"too long for a unix socket: {control}")
    for ours in places:
        ours.mkdir(parents=True, exist_ok=True)
    for conf in Path("/etc/libvirt").glob("*.conf"):  # its settings; not its domains, networks
        shutil.copy2(conf, state / "etc")
    binds = [
        f"mkdir -p {theirs} && mount --bind {shlex.quote(str(ours))} {theirs}"
        for ours, theirs in places.items()
    ]
    script = " && ".join([*binds, 'exec "$@"'])
    enter = ["unshare", "--mount", "--propagation", "slave", "--", "sh", "-c", script, "sh"]
    made = OwnHypervisor(state, f"qemu+unix:///system?socket={control}", enter, state / "run")
    made.swtpm = state / "lib" / "swtpm"
    yield made


@contextlib.contextmanager
def _in_container(state: Path) -> Iterator[OwnHypervisor]:
    """Make the container's `qemu.conf` one that works there, and put it back."""
    before = _QEMU_CONF.read_bytes() if _QEMU_CONF.exists() else None
    _QEMU_CONF.parent.mkdir(parents=True, exist_ok=True)
    _QEMU_CONF.write_text(_CONTAINER_QEMU_CONF)
    try:
        yield OwnHypervisor(state, SYSTEM_URI, [], Path("/run/libvirt"))
    finally:
        if before is None:
            _QEMU_CONF.unlink()
        else:
            _QEMU_CONF.write_bytes(before)


def _qemu_user(connection: libvirt.virConnect) -> str:
    capabilities = ElementTree.fromstring(connection.getCapabilities())  # noqa: S314
    for model in capabilities.iterfind("./host/secmodel"):
        if model.findtext("model") == "dac":
            label = model.findtext("baselabel[@type='qemu']") or model.findtext("baselabel") or ""
            uid = label.split(":")[0].lstrip("+")
            if uid.isdigit():
                return pwd.getpwuid(int(uid)).pw_name
    return "root"


def _distribution_qemu_user() -> str:
    for name in ("libvirt-qemu", "qemu"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name).pw_name
    return "root"


def _which(daemon: str) -> str:
    path = shutil.which(daemon, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if path is None:
        raise LabUnavailable(f"{daemon} is not installed; scripts/setup installs it")
    return path


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(str(path))
        except OSError:
            return False
    return True


def _wait_for(path: Path, process: subprocess.Popen[bytes], output: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not _answers(path):
        if process.poll() is not None or time.monotonic() > deadline:
            _end(process)
            tail = output.read_text(errors="replace")[-2000:]
            raise LabUnavailable(f"{output.stem} did not come up: {tail}")
        time.sleep(0.02)


def _end(process: subprocess.Popen[bytes], how: signal.Signals = signal.SIGTERM) -> None:
    if process.poll() is None:
        process.send_signal(how)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
