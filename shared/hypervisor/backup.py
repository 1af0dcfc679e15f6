"""A full copy of all disks of an active domain at one instant, made by QEMU itself.

Owns: one libvirt backup job from begin to verdict. It changes nothing in the
guest's chain; QEMU copies a block before the guest overwrites it. The target
directory must be searchable by the user QEMU runs as (mode 0711 will do).
"No job" is not "succeeded": the verdict is the job's own success flag.
"""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import libvirt
from lxml import etree

from shared.errors import Cancelled
from shared.hypervisor.domains import Domain
from shared.hypervisor.errors import (
    BackupFailed,
    DomainMissing,
    HypervisorError,
    LibvirtFailed,
    LibvirtUnavailable,
)
from shared.hypervisor.locks import is_open

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]

# libvirt before 10.8 has been seen to crash when its job statistics are asked
# for often; the end of the job comes as an event anyway.
POLL_S = 1.0
_CANCEL_POLL_S = 0.1
_ABORT_PATIENCE_S = 60.0
_OUTAGE_PATIENCE_S = 60.0
_RELEASE_PATIENCE_S = 600.0
"""QEMU flushes what it has written before it closes a copy."""
_FLUSH_EVERY_S = 5.0
_EMPTY_PATIENCE_S = 4.0
"""Seen on libvirt 9.0: where QEMU ends a copy while libvirtd is away, libvirt has the job run on
for ever, with no disk in its statistics. It can be aborted then."""


def push_backup(
    domain: Domain,
    targets: Mapping[str, tuple[Path, str]],
    progress: Progress,
    cancelled: Callable[[], bool],
    *,
    instant: AbstractContextManager[Any] | None = None,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Copy the disks named in `targets` (`{"vda": (path, "qcow2")}`) to new files.

    `instant` surrounds the moment the copy is of (a freeze belongs there);
    `progress(done, total)` is in bytes; `check` is called several times a second and
    raises when the copy must not go on. The files are synced, mode 0600. Raises
    BackupFailed, LibvirtBusy (another job runs), Cancelled or what `check` raises;
    then the job is ended, the files are removed, and a guest goes on that stopped by it.
    """

    def check_all() -> None:
        if cancelled():
            raise Cancelled(f"The copy of {domain.name} was cancelled. Nothing of it was kept.")
        check()

    domain.refuse_other_job(check_all)  # libvirt would wait for it, with the guest frozen
    job, ran = _Job(domain), domain.state == "running"
    paths = [path for path, _ in targets.values()]
    try:
        with instant or nullcontext():
            job.begin(_job_xml(domain, targets))
        with _flushed(paths):
            job.wait(progress, check_all)
            job.wait_released(targets, check_all)
        for path in paths:
            settle(path)
    except BaseException:
        job.abort()
        for path in paths:
            path.unlink(missing_ok=True)
        if ran:
            with contextlib.suppress(HypervisorError):  # who undoes the operation tries again
                go_on(domain)
        raise
    finally:
        job.close()


def go_on(domain: Domain) -> bool:
    """Have a guest go on that stopped at a write of its own while QEMU copied; whether it had.

    What a guest is about to overwrite is first written to the copy. Where that finds no room, the
    guest's write fails, and QEMU stops the guest (block/copy-before-write.c, `werror=enospc`).
    So does that of one whose saved memory has filled the file system of its disks. Once the copy
    has ended the write is made again, and has nothing to do with it.
    """
    if not domain.halted_by_io:
        return False
    log.warning("%s had stopped while it was copied, and goes on", domain.name)
    domain.resume()
    return True


@contextlib.contextmanager
def _flushed(paths: Sequence[Path]) -> Iterator[None]:
    """What QEMU writes to these files meanwhile goes to the disk soon. At the end it would take
    minutes, in which QEMU does nothing else."""
    over = threading.Event()

    def flush() -> None:
        while not over.wait(_FLUSH_EVERY_S):
            for path in paths:
                with contextlib.suppress(OSError), path.open("rb") as file:
                    os.fdatasync(file.fileno())

    threading.Thread(target=flush, name="flushing", daemon=True).start()
    try:
        yield
    finally:
        over.set()  # a flush that is under way is not waited for


def job_files(domain: Domain) -> list[Path]:
    """The files that a backup job writes to that runs now, whoever began it; none without one.

    Raises LibvirtUnavailable.
    """
    try:
        xml = domain.call("Reading the copy job of", lambda handle: handle.backupGetXMLDesc())
    except (LibvirtFailed, DomainMissing):  # no job, or no domain any more
        return []
    files = etree.fromstring(xml).iterfind("disks/disk/*[@file]")
    return [Path(each.get("file", "")) for each in files]


class _Job:
    """One backup job: its event, its polling, its end."""

    def __init__(self, domain: Domain) -> None:
        self.domain = domain
        self.begun = False
        self._done = threading.Event()
        self._verdict: dict[str, Any] = {}
        self._listener: tuple[Any, int] | None = None

    def begin(self, xml: str) -> None:
        def listen(handle: Any) -> tuple[Any, int]:
            connection = handle.connect()
            event = libvirt.VIR_DOMAIN_EVENT_ID_JOB_COMPLETED
            return connection, connection.domainEventRegisterAny(
                handle, event, self._on_completed, None
            )

        self._listener = self.domain.call("Watching the jobs of", listen)
        # Asking clears what an earlier job left, so that it is not taken for ours.
        with contextlib.suppress(HypervisorError):
            self._completed()
        self.begun = True  # from here on there may be a job, whatever the call says
        try:
            self.domain.call("Copying", lambda handle: handle.backupBegin(xml, None, 0))
        except HypervisorError as error:
            if not isinstance(error, LibvirtUnavailable):
                self.begun = False  # refused: a job that runs is somebody else's
            raise

    def wait(self, progress: Progress, check: Callable[[], None]) -> None:
        lost_at, empty_at, next_poll = 0.0, 0.0, time.monotonic() + POLL_S
        while True:
            check()
            if self._done.wait(_CANCEL_POLL_S):
                break
            if time.monotonic() < next_poll:
                continue
            next_poll = time.monotonic() + POLL_S
            try:
                stats = self.domain.call("Following the copy of", lambda h: h.jobStats())
                lost_at = 0.0
            except LibvirtUnavailable:
                # QEMU goes on copying without libvirtd, so wait for its return.
                lost_at = lost_at or time.monotonic()
                if time.monotonic() - lost_at > _OUTAGE_PATIENCE_S:
                    raise
                continue
            if stats.get("type", libvirt.VIR_DOMAIN_JOB_NONE) == libvirt.VIR_DOMAIN_JOB_NONE:
                self._done.wait(POLL_S)  # the event is on its way
                self._verdict = self._verdict or self._completed()
                break
            if "disk_total" in stats:
                empty_at = 0.0
                progress(stats["disk_processed"], stats["disk_total"])
                continue
            empty_at = empty_at or time.monotonic()
            if time.monotonic() - empty_at > _EMPTY_PATIENCE_S:
                raise self._failed("libvirt lost track of it when it was restarted")
        self._judge(progress)

    def _judge(self, progress: Progress) -> None:
        verdict = self._verdict
        self.begun = False
        if verdict.get("success") is True or verdict.get("success") == 1:
            total = verdict.get("disk_total", 0)
            progress(total, total)
            return
        reason = verdict.get("errmsg") or (
            "the guest went down or libvirt lost the job" if not verdict else "QEMU gave up"
        )
        raise self._failed(reason)

    def _failed(self, reason: str) -> BackupFailed:
        return BackupFailed(
            f"The copy of {self.domain.name} failed: {reason}. The server was not touched "
            "and nothing of the copy was kept; try again."
        )

    def wait_released(
        self, targets: Mapping[str, tuple[Path, str]], check: Callable[[], None]
    ) -> None:
        """Wait until QEMU has closed the copies: its last metadata is written only then.

        The job's success is announced 10 to 300 ms earlier (seen on libvirt 9.0). Any
        call that takes the domain's job lock returns after libvirt has detached
        the copies; QEMU's own image locks are the proof.
        """

        def measure(handle: Any) -> None:
            for target in targets:
                handle.blockInfo(target)

        with contextlib.suppress(HypervisorError):  # the guest may be off by now
            self.domain.call("Settling the copy of", measure)
        deadline = time.monotonic() + _RELEASE_PATIENCE_S
        while any(is_open(path) for path, _ in targets.values()):
            check()
            if time.monotonic() > deadline:
                raise BackupFailed(
                    f"QEMU does not let go of the copy of {self.domain.name}, so it is not kept. "
                    "The server was not touched; try again."
                )
            time.sleep(0.01)

    def abort(self) -> None:
        """End our job, if it may be running, and wait until QEMU has let go of the files."""
        if not self.begun:
            return
        deadline = time.monotonic() + _ABORT_PATIENCE_S
        while time.monotonic() < deadline:
            try:
                stats = self.domain.call("Following the copy of", lambda h: h.jobStats())
                if not stats.get("type", libvirt.VIR_DOMAIN_JOB_NONE):
                    return
                self.domain.call("Ending the copy of", lambda handle: handle.abortJob())
            except LibvirtUnavailable:
                log.warning("libvirt is away while the copy of %s ends", self.domain.name)
            except HypervisorError:
                if not self.domain.is_active:
                    return
            self._done.wait(0.5)
        log.error("the copy job of %s does not end", self.domain.name)

    def close(self) -> None:
        if self._listener is not None:
            connection, number = self._listener
            with contextlib.suppress(libvirt.libvirtError):
                connection.domainEventDeregisterAny(number)

    def _completed(self) -> dict[str, Any]:
        flag = libvirt.VIR_DOMAIN_JOB_STATS_COMPLETED
        stats = self.domain.call("Reading the outcome of", lambda handle: handle.jobStats(flag))
        ours = stats.get("operation") == libvirt.VIR_DOMAIN_JOB_OPERATION_BACKUP
        return dict(stats) if ours else {}

    def _on_completed(self, _conn: Any, _dom: Any, stats: dict[str, Any], _opaque: Any) -> None:
        if stats.get("operation") == libvirt.VIR_DOMAIN_JOB_OPERATION_BACKUP:
            self._verdict = dict(stats)
            self._done.set()


def _job_xml(domain: Domain, targets: Mapping[str, tuple[Path, str]]) -> str:
    """The backup job's description; every disk is named, so that none is taken by default."""
    live = etree.fromstring(domain.live_definition())
    names = [t.get("dev", "") for t in live.iterfind("devices/disk/target")]
    missing = sorted(set(targets) - set(names))
    if missing:
        raise BackupFailed(
            f"{domain.name} has no disk {', '.join(missing)} any more. Nothing was copied."
        )
    job = etree.Element("domainbackup", mode="push")
    disks = etree.SubElement(job, "disks")
    for name in names:
        if name not in targets:
            etree.SubElement(disks, "disk", name=name, backup="no")
            continue
        path, image_format = targets[name]
        disk = etree.SubElement(disks, "disk", name=name, backup="yes", type="file")
        etree.SubElement(disk, "target", file=str(path))
        etree.SubElement(disk, "driver", type=image_format)
    return etree.tostring(job, encoding="unicode")


def settle(path: Path) -> None:
    """A file that libvirt wrote is ours and on the disk: it gives it back to whom it found."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fchown(descriptor, os.geteuid(), os.getegid())
        os.fchmod(descriptor, 0o600)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
