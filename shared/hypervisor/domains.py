"""A libvirt domain behind a thin typed wrapper.

Owns: looking domains up, their power state, defining and undefining. Knows
nothing of copies. A `Domain` survives a restart of libvirtd: a call that finds
the connection dead is made once more on a fresh one, since every call here is
idempotent.
"""

import os
import time
from collections.abc import Callable, Collection, Iterable
from operator import methodcaller
from pathlib import Path
from typing import Any, Literal, TypeVar

import libvirt

from shared.file_systems import keeps_locks
from shared.hypervisor.connection import connect, is_gone, translate, translated
from shared.hypervisor.definition import DomainDefinition
from shared.hypervisor.errors import DomainMissing, LibvirtBusy, LibvirtFailed
from shared.hypervisor.locks import is_open

State = Literal["running", "stopped", "paused"]
Result = TypeVar("Result")

# "shutdown" is a guest on its way down whose vCPUs still run. A crashed guest
# with on_crash=preserve and one in S3 keep their QEMU but execute nothing.
_STATES: dict[int, State] = {
    libvirt.VIR_DOMAIN_NOSTATE: "running",
    libvirt.VIR_DOMAIN_RUNNING: "running",
    libvirt.VIR_DOMAIN_BLOCKED: "running",
    libvirt.VIR_DOMAIN_SHUTDOWN: "running",
    libvirt.VIR_DOMAIN_PAUSED: "paused",
    libvirt.VIR_DOMAIN_PMSUSPENDED: "paused",
    libvirt.VIR_DOMAIN_CRASHED: "paused",
    libvirt.VIR_DOMAIN_SHUTOFF: "stopped",
}
HELD_BY_SAVE = (
    libvirt.VIR_DOMAIN_PAUSED_UNKNOWN,
    libvirt.VIR_DOMAIN_PAUSED_MIGRATION,
    libvirt.VIR_DOMAIN_PAUSED_SAVE,
)
ASKED_FOR = (
    libvirt.VIR_DOMAIN_PAUSED_USER,
    libvirt.VIR_DOMAIN_PAUSED_SNAPSHOT,
)
"""Why it is paused where somebody asked for that; the second is libvirt's reason for as long as it
saves the memory for a snapshot (qemuDomainSuspend)."""
_ASLEEP = (libvirt.VIR_DOMAIN_CRASHED, libvirt.VIR_DOMAIN_PMSUSPENDED)
_HALTED = (
    libvirt.VIR_DOMAIN_PAUSED_IOERROR,
    libvirt.VIR_DOMAIN_PAUSED_WATCHDOG,
    libvirt.VIR_DOMAIN_PAUSED_CRASHED,
    libvirt.VIR_DOMAIN_PAUSED_STARTING_UP,
)
_ARRIVING = (
    libvirt.VIR_DOMAIN_PAUSED_MIGRATION,
    libvirt.VIR_DOMAIN_PAUSED_POSTCOPY,
    libvirt.VIR_DOMAIN_PAUSED_STARTING_UP,
)
_MOUNTS = Path("/proc/self/mounts")
_CONTAINERS_OWN = ("/", "/tmp", "/run", "/dev", "/proc", "/sys")  # noqa: S108 - not to write there
_RAN = (
    libvirt.VIR_DOMAIN_SHUTOFF_SHUTDOWN,
    libvirt.VIR_DOMAIN_SHUTOFF_DESTROYED,
    libvirt.VIR_DOMAIN_SHUTOFF_CRASHED,
    libvirt.VIR_DOMAIN_SHUTOFF_SAVED,
)
DESTROY_TIMEOUT_S = 60.0
GOES_DOWN_S = 3.0
"""From a QEMU that lets go of its disks to libvirt that calls its domain off."""
OTHERS_JOB_S = 30.0
"""What libvirt itself waits for a domain's job; hard-coded there."""
_TPM_FLAGS_SINCE = 8_009_000  # libvirt 8.9.0; before, the TPM's state always went


class Domain:
    """One libvirt domain, held by its UUID."""

    def __init__(self, uri: str, handle: Any) -> None:
        self.uri = uri
        self.uuid: str = handle.UUIDString()
        self.name: str = handle.name()
        self._handle = handle

    def __repr__(self) -> str:
        return f"<Domain {self.name} {self.uuid}>"

    def call(self, doing: str, function: Callable[[Any], Result]) -> Result:
        """Run `function(virDomain)`, once more on a new connection if the old one died.

        Only for calls that may be made twice. Raises the translated error.
        """
        doing = f"{doing} {self.name}"
        try:
            return function(self._handle)
        except libvirt.libvirtError as error:
            if not is_gone(error):
                raise translate(error, doing) from error
        with translated(doing):
            self._handle = connect(self.uri).lookupByUUIDString(self.uuid)
            return function(self._handle)

    @property
    def state(self) -> State:
        return self.state_and_reason()[0]

    def state_and_reason(self) -> tuple[State, int]:
        """The state and libvirt's reason (a `VIR_DOMAIN_<STATE>_<REASON>` number)."""
        number, reason = self.call("Reading the state of", lambda handle: handle.state())
        if number == libvirt.VIR_DOMAIN_CRASHED and not self.is_active:
            return "stopped", reason
        return _STATES.get(number, "running"), reason

    @property
    def is_active(self) -> bool:
        return bool(self.call("Reading the state of", lambda handle: handle.isActive()))

    @property
    def boot(self) -> int:
        """libvirt's number of this run of it, another one for each; -1 while it is off."""

        def fresh(handle: Any) -> int:  # a handle keeps the number that it was found with
            return int(handle.connect().lookupByUUID(handle.UUID()).ID())

        return self.call("Reading the number of", fresh)

    @property
    def is_persistent(self) -> bool:
        """Whether libvirt still knows the domain once it is off."""
        return bool(self.call("Reading the kind of", lambda handle: handle.isPersistent()))

    @property
    def paused_by_user(self) -> bool:
        """Whether it is paused because somebody (its owner or we) asked for it."""
        state, reason = self.call("Reading the state of", lambda handle: handle.state())
        return bool(state == libvirt.VIR_DOMAIN_PAUSED and reason in ASKED_FOR)

    def lost_files(self, definitions: Iterable[str], besides: Collection[str]) -> dict[str, str]:
        """Files that these definitions have in drives, or for other disks than those `besides`, by
        target, and that are gone: a guest that is on may have them open, and does not start again
        without them.

        Those that it has now libvirt looks for, since it sees all of the host's directories, as
        far as they are raw. The others are looked for here, where their directory is the host's.
        """
        parsed = [DomainDefinition.parse(each) for each in (self.live_definition(), *definitions)]
        live = {disk.target: disk.path for disk in parsed[0].disks}
        lost = {}
        for disk in (disk for each in parsed[1:] for disk in each.disks):
            if disk.target in besides or disk.kind != "file" or disk.may_be_missing:
                continue
            if disk.path is None:
                continue
            if live.get(disk.target) == disk.path:
                gone = disk.format == "raw" and self._cannot_read(disk.target)
            else:
                gone = _is_the_hosts(Path(disk.path).parent) and not Path(disk.path).exists()
            if gone:
                lost[disk.target] = disk.path
        return lost

    def lost_disks(self, paths: Iterable[Path]) -> list[str]:
        """Those of these files, disks of a guest that is on, that are gone, or have another file
        by their name now: QEMU has the disk open, and nobody else.

        Only where their directory is the host's, and its file system keeps QEMU's locks. A guest
        that is paused may hold none, and one that goes down gives them up first: it is waited for.
        """
        lost = []
        for path in paths:
            gone = self._is_another(path) if path.exists() else _is_the_hosts(path.parent)
            if gone:
                lost.append(str(path))
        return lost

    def _is_another(self, path: Path) -> bool:
        if not path.is_file() or not keeps_locks(path):
            return False
        deadline = time.monotonic() + GOES_DOWN_S
        while not is_open(path):
            if self.state != "running":
                return False
            if time.monotonic() > deadline:
                return True
            time.sleep(0.05)
        return False

    def _cannot_read(self, target: str) -> bool:
        try:
            self.call("Looking at a disk of", methodcaller("blockPeek", target, 0, 1))
        except LibvirtFailed as error:
            return bool(error.extra.get("libvirt_code") == libvirt.VIR_ERR_SYSTEM_ERROR)
        return False

    @property
    def wanted_state(self) -> State:
        """The state that a fresh start is to bring it to. A guest that halted by itself (an I/O
        error, a crash, its watchdog, asleep), or that is being started, is to run; one that was
        paused is to be paused."""
        number, reason = self.call("Reading the state of", lambda handle: handle.state())
        if number == libvirt.VIR_DOMAIN_CRASHED and not self.is_active:
            return "stopped"
        if number in _ASLEEP or (number == libvirt.VIR_DOMAIN_PAUSED and reason in _HALTED):
            return "running"
        return _STATES.get(number, "running")

    @property
    def is_being_started(self) -> bool:
        """Whether libvirt is at starting it: its QEMU may not have opened its disks yet."""
        state, reason = self.call("Reading the state of", lambda handle: handle.state())
        starting = libvirt.VIR_DOMAIN_PAUSED_STARTING_UP
        return bool(state == libvirt.VIR_DOMAIN_PAUSED and reason == starting)

    @property
    def halted_by_io(self) -> bool:
        """Whether QEMU has stopped it at a write or read that failed, and that it repeats."""
        state, reason = self.state_and_reason()
        return state == "paused" and reason == libvirt.VIR_DOMAIN_PAUSED_IOERROR

    @property
    def held_by_save(self) -> bool:
        """Whether it is paused as saving its memory leaves it.

        To libvirt the reason is unknown when the guest ran until then, and a migration's after
        a restart of the daemon.
        """
        state, reason = self.call("Reading the state of", lambda handle: handle.state())
        return bool(state == libvirt.VIR_DOMAIN_PAUSED and reason in HELD_BY_SAVE)

    @property
    def was_booted(self) -> bool:
        """Whether it runs, and was neither resumed from a saved memory nor paused since."""
        state, reason = self.call("Reading the state of", lambda handle: handle.state())
        booted = libvirt.VIR_DOMAIN_RUNNING_BOOTED
        return bool(state == libvirt.VIR_DOMAIN_RUNNING and reason == booted)

    @property
    def was_shut_down(self) -> bool:
        """Whether it is off because its guest shut down in an orderly way."""
        state, reason = self.call("Reading the state of", lambda handle: handle.state())
        return bool(
            state == libvirt.VIR_DOMAIN_SHUTOFF and reason == libvirt.VIR_DOMAIN_SHUTOFF_SHUTDOWN
        )

    @property
    def was_on(self) -> bool:
        """Whether it is off and was on before, since libvirt was started: it does not know more."""
        state, reason = self.call("Reading the state of", lambda handle: handle.state())
        return bool(state == libvirt.VIR_DOMAIN_SHUTOFF and reason in _RAN)

    @property
    def has_managed_save(self) -> bool:
        return bool(
            self.call("Looking for a saved state of", lambda handle: handle.hasManagedSaveImage())
        )

    @property
    def memory_bytes(self) -> int:
        """The most RAM that it may have."""
        return int(self.call("Reading the memory of", lambda handle: handle.maxMemory())) * 1024

    @property
    def autostart(self) -> bool:
        """Whether it is started with its host."""
        return bool(self.call("Reading autostart of", lambda handle: handle.autostart()))

    def start_with_host(self) -> None:
        self.call("Setting autostart of", lambda handle: handle.setAutostart(1))

    def definition(self) -> str:
        """The XML it will start with next, secrets included; a transient domain's live XML."""
        flags = libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE
        return str(self.call("Reading the definition of", lambda handle: handle.XMLDesc(flags)))

    def live_definition(self) -> str:
        """The XML of the running guest (its disks as they are now); else the inactive one."""
        flags = libvirt.VIR_DOMAIN_XML_SECURE
        return str(self.call("Reading the definition of", lambda handle: handle.XMLDesc(flags)))

    def refuse_arriving(self) -> None:
        """Raise LibvirtBusy where it is paused since it is being started, or comes from another
        host: then its disks may be written to all the same."""
        state, reason = self.call("Reading the state of", lambda handle: handle.state())
        if state == libvirt.VIR_DOMAIN_PAUSED and reason in _ARRIVING:
            raise LibvirtBusy(
                f"{self.name} is being started or comes from another host. It was left alone and "
                "nothing was copied; try again when it runs."
            )

    def refuse_other_job(
        self,
        check: Callable[[], None] = lambda: None,
        *,
        backups: bool = True,
        patience_s: float | None = None,
    ) -> None:
        """Raise LibvirtBusy where somebody's save, migration or, unless they are in nobody's way,
        backup of it goes on for longer than `patience_s` seconds, or than libvirt would wait for
        it. `check` is called meanwhile, and its error ends it.

        While the memory goes elsewhere libvirt pauses a guest, and does not resume it
        (its masks of jobs, qemu_migration.c and virdomainjob.h; a backup's allows both).
        """
        deadline = time.monotonic() + (OTHERS_JOB_S if patience_s is None else patience_s)
        while self._has_job(backups):
            if time.monotonic() >= deadline:
                raise LibvirtBusy(
                    f"A job of {self.name} is under way that somebody else began (`virsh "
                    f"domjobinfo {self.name}` shows it). It was left alone and nothing was copied; "
                    "try again when it is done."
                )
            check()
            time.sleep(0.5)

    def _has_job(self, backups: bool) -> bool:
        try:
            stats = self.call("Looking for jobs of", lambda handle: handle.jobStats())
        except LibvirtFailed:
            if self.is_active:
                raise
            return False  # it went off
        if not stats.get("type", libvirt.VIR_DOMAIN_JOB_NONE):
            return False
        return backups or stats.get("operation") != libvirt.VIR_DOMAIN_JOB_OPERATION_BACKUP

    def start(self, paused: bool = False, *, discard_saved_state: bool = False) -> None:
        """Start it (nothing happens when it is on already).

        `discard_saved_state` boots afresh although a managed save exists, which
        must be so after its disks were replaced.
        """
        flags = libvirt.VIR_DOMAIN_START_PAUSED if paused else 0
        if discard_saved_state:
            flags |= libvirt.VIR_DOMAIN_START_FORCE_BOOT
        if not self.is_active:
            self.call("Starting", lambda handle: handle.createWithFlags(flags))

    def suspend(self) -> None:
        self.call("Pausing", lambda handle: handle.suspend())

    def resume(self) -> None:
        self.call("Resuming", lambda handle: handle.resume())

    def ask_to_shut_down(self) -> None:
        """Have the guest shut down, by its agent where that answers, else by ACPI; returns at once.

        Whether it does is for the guest to say. Raises LibvirtFailed for one that is off.
        """
        self.call("Shutting down", lambda handle: handle.shutdown())

    def destroy(self, timeout_s: float = DESTROY_TIMEOUT_S) -> None:
        """Force it off and wait until it is off. A stopped or vanished domain is fine.

        Raises LibvirtBusy or LibvirtFailed when it is still on after `timeout_s` seconds.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                if not self.is_active:
                    return
                self.call("Forcing off", lambda handle: handle.destroy())
            except DomainMissing:
                return  # it was transient
            except (LibvirtBusy, LibvirtFailed):
                # Lost the race against a guest that went down by itself, or its
                # QEMU is stuck in the kernel and may yet go.
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)

    def undefine(self, *, keep_nvram: bool = True, keep_tpm: bool = True) -> None:
        """Remove it from libvirt with all that libvirt keeps about it; its disks stay.

        A managed save and the metadata of libvirt snapshots and checkpoints go
        with it: libvirt refuses otherwise. Nothing happens when it is gone already.
        """
        flags = (
            libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
            | libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
            | libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA
        )
        keep, drop = libvirt.VIR_DOMAIN_UNDEFINE_KEEP_NVRAM, libvirt.VIR_DOMAIN_UNDEFINE_NVRAM
        flags |= keep if keep_nvram else drop
        version = self.call(
            "Reading the version at", lambda handle: handle.connect().getLibVersion()
        )
        if version >= _TPM_FLAGS_SINCE:
            keep, drop = libvirt.VIR_DOMAIN_UNDEFINE_KEEP_TPM, libvirt.VIR_DOMAIN_UNDEFINE_TPM
            flags |= keep if keep_tpm else drop
        try:
            self.call("Undefining", lambda handle: handle.undefineFlags(flags))
        except DomainMissing:
            return

    def remove_managed_save(self) -> None:
        """Throw away the saved state, if there is one. It cannot be had back."""
        if self.has_managed_save:
            self.call("Removing the saved state of", lambda handle: handle.managedSaveRemove())


def _is_the_hosts(folder: Path) -> bool:
    """Whether a directory that is here is the host's own: in a container what is mounted is."""
    if not folder.is_dir():
        return False
    mounts = [line.split() for line in _MOUNTS.read_text().splitlines()]
    if not any(at == "/" and "overlay" in kind for _, at, kind, *_ in mounts):
        return True
    above = [each for each in (folder, *folder.parents) if str(each) not in _CONTAINERS_OWN]
    return any(os.path.ismount(each) for each in above)


def find(connection: Any, uuid: str) -> Domain:
    """The domain of that UUID. Raises DomainMissing."""
    with translated(f"Looking up the domain {uuid}"):
        return Domain(connection.getURI(), connection.lookupByUUIDString(uuid))


def find_by_name(connection: Any, name: str) -> Domain:
    """The domain of that name. Raises DomainMissing."""
    with translated(f"Looking up the domain {name}"):
        return Domain(connection.getURI(), connection.lookupByName(name))


def define(connection: Any, xml: str) -> Domain:
    """Define, or redefine by UUID, a persistent domain. Raises LibvirtFailed for bad XML."""
    with translated("Defining a domain"):
        return Domain(connection.getURI(), connection.defineXML(xml))
