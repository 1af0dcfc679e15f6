"""The copy engine: all disks of a server at one instant, into files of their own.

Owns: going the way that `planning.py` chose for the whole server. The reflink way holds
the guest for some milliseconds and shares extents; the stream way has QEMU copy
while the guest runs, or copies a stopped server's files. What is dangerous to
the guest (pausing, freezing) is `shared.hypervisor`'s; storing and naming the
result is the vault's; copying it out again is `materialise.py`'s.
"""

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from shared import faults
from shared.disks.beside import SWTPM, Beside, beside_of
from shared.disks.catching_up import CatchingUp, catch_up, finish, follow
from shared.disks.copied import CopiedDisk, Unchanged, copied, refuse_other_disks
from shared.disks.copy import stream_copy
from shared.disks.errors import InsufficientSpace, PauseTooLong
from shared.disks.planning import Choice, Plan, Way, definition_of, plan, refuse_memory
from shared.disks.reflink import create_target
from shared.disks.space import FLOOR, FloorWatch, ensure_space, full_is_said, says_full
from shared.errors import Cancelled
from shared.file_systems import writes_elsewhere
from shared.hypervisor.agent import Consistency, Level, Policy, frozen
from shared.hypervisor.backup import go_on, push_backup
from shared.hypervisor.definition import LeftOut
from shared.hypervisor.domains import Domain, State
from shared.hypervisor.errors import (
    BackupFailed,
    DiskLost,
    HypervisorError,
    MemoryNotSaved,
    PauseFailed,
)
from shared.hypervisor.locks import refuse_if_open
from shared.hypervisor.memory import memory_saved
from shared.hypervisor.pause import Pause, paused
from shared.hypervisor.watchdog import Watchdog

Step = Literal["pause", "memory", "backup", "thawed", "resumed", "released"]
MEMORY = "memory.save"
PAUSE_BUDGET_MS = 100.0
WITH_MEMORY = (
    "its memory is of the same instant: a revert goes on right there; its disks alone are as "
    "after a power cut"
)
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Capture:
    """A finished copy: files complete and checked in their folder; to sync them is the vault's."""

    way: Way
    way_reason: str
    taken_at: datetime
    pause_ms: float
    consistency: Level
    consistency_reason: str
    files: tuple[CopiedDisk, ...]
    left_out: tuple[LeftOut, ...]
    definition: str
    nvram: Path | None
    tpm: Path | None
    memory: Path | None


def capture(
    domain: Domain,
    destination: Path,
    *,
    watchdog: Watchdog,
    way: Choice = "auto",
    quiesce: Policy = "auto",
    progress: Progress = lambda _done, _total: None,
    cancelled: Callable[[], bool] = lambda: False,
    before: Callable[[Step], None] = lambda _step: None,
    free_floor: float = FLOOR,
    pause_budget_ms: float = PAUSE_BUDGET_MS,
    memory: bool = False,
    compress: bool = False,
    swtpm: Path = SWTPM,
) -> Capture:
    """Copy every writable disk (with UEFI variables and TPM) into the folder `destination`.

    `swtpm` is where libvirt keeps the state of emulated TPMs. With `compress` what is streamed is
    compressed. With `memory` also what is in the guest's RAM, of the same instant (S5); nothing is
    frozen then. `before(step)` is called ahead of what the journal must know: "pause" before a
    running guest is frozen and suspended, "memory" before its memory is saved, "backup" before
    QEMU's copy job; "thawed" where a stream goes on with a guest that is not frozen by us (any
    more); "resumed" where a copy fails whose guest is not paused by us (any more); and "released"
    once all of that is over, so that what the guest's owner does from then on is not undone. The
    folder must be searchable by QEMU's user (0711) for the stream way.

    Raises InsufficientSpace (before anything is touched, or when the room is taken up meanwhile:
    by stream as soon as less than `free_floor` is left), Cancelled, PauseFailed, PauseTooLong,
    QuiesceFailed, ServerNotRunning, MemoryNeedsReflink, MemoryNotSaved, BackupFailed, LibvirtBusy,
    DiskLost, ServerChanged, ImageDamaged, CopyFailed and what `plan` raises; then no file is left
    and the guest is as it was.
    """
    order = _Order(
        domain,
        destination,
        watchdog,
        quiesce,
        progress,
        cancelled,
        before,
        free_floor,
        pause_budget_ms,
        memory,
        compress,
        swtpm,
    )
    chosen = plan(domain, destination, way=way, compress=compress)
    try:
        return _captured(order, chosen)
    except PauseTooLong as error:
        if not chosen.catching_up and writes_elsewhere(destination):  # it fell to pieces since
            with contextlib.suppress(PauseTooLong):
                return _captured(order, replace(chosen, catching_up=True))
        if way == "reflink":
            raise
        chosen = plan(domain, destination, way="stream", reason=error.detail, compress=compress)
        return _captured(order, chosen)


def _captured(order: "_Order", chosen: Plan) -> Capture:
    """Go the chosen way: all files, or none and the error."""
    domain, destination = order.domain, order.destination
    if order.memory:
        refuse_memory(domain, chosen)
        # What the guest writes meanwhile is saved a second time, if not more than that.
        memory = 2 * domain.memory_bytes
        chosen = replace(
            chosen,
            needed_bytes=chosen.needed_bytes + memory,
            catching_up=writes_elsewhere(destination),
        )
    ensure_space(destination, chosen.needed_bytes, order.free_floor)
    definition, left_out = definition_of(domain, chosen)
    order.check()
    beside, unread = beside_of(chosen.live, destination, order.swtpm)
    targets = {
        s.disk.target: destination / f"{s.disk.target}.{s.copy_format}" for s in chosen.sources
    }
    guard = Unchanged(domain, chosen)
    job = _Job(order, chosen, targets, beside, guard)
    try:
        with full_is_said(destination), guard.blamed():
            if chosen.state == "stopped":
                refuse_if_open((source.path for source in chosen.sources), "copied")
            elif chosen.way == "reflink":
                _refuse_lost(domain, chosen)
            shot, files = _reflink(job) if chosen.way == "reflink" else _stream(job)
            guard.verify()
    except BaseException:
        for path in [*targets.values(), *beside.copies, job.memory]:
            path.unlink(missing_ok=True)
        if order.memory:  # on its own file system: its disk may have been full with it
            with contextlib.suppress(HypervisorError):  # who undoes the operation tries again
                go_on(domain)
        raise
    total = sum(file.bytes for file in files)
    order.progress(total, total)
    return Capture(
        way=chosen.way,
        way_reason=chosen.reason,
        taken_at=shot.taken_at,
        pause_ms=shot.pause_ms,
        consistency=shot.consistency.level,
        consistency_reason=shot.consistency.reason,
        files=files,
        left_out=(*left_out, *unread),
        definition=definition,
        nvram=beside.nvram.taken,
        tpm=beside.tpm.taken,
        memory=job.memory if order.memory else None,
    )


def _refuse_lost(domain: Domain, chosen: Plan) -> None:
    """Raise DiskLost where what would be copied is not what the guest runs on."""
    lost = domain.lost_disks(source.path for source in chosen.sources)
    if lost:
        raise DiskLost(
            f"{domain.name} runs on {', '.join(lost)}, and another file has that name by now: what "
            "the guest has on it is in the file that QEMU holds open alone. Nothing was copied. "
            "Put that file back from /proc/PID/fd of its QEMU, or shut the server down, and start "
            "it on the file that it is to have."
        )


@dataclass(frozen=True)
class _Order:
    """What the caller asked for, whatever way is gone."""

    domain: Domain
    destination: Path
    watchdog: Watchdog
    quiesce: Policy
    progress: Progress
    cancelled: Callable[[], bool]
    before: Callable[[Step], None]
    free_floor: float
    pause_budget_ms: float
    memory: bool
    compress: bool
    swtpm: Path

    def check(self) -> None:
        """Raises Cancelled."""
        if self.cancelled():
            raise Cancelled(
                f"The copy of {self.domain.name} was cancelled. Nothing of it was kept."
            )

    def frozen(self, state: State) -> contextlib.AbstractContextManager[Consistency]:
        if self.memory:  # a guest that is resumed from it would still be frozen
            return contextlib.nullcontext(Consistency("crash", WITH_MEMORY))
        return frozen(
            self.domain,
            self.watchdog,
            self.quiesce,
            state=state,
            refused=lambda: self.before("thawed"),
        )


@dataclass(frozen=True)
class _Job:
    """One way being gone."""

    order: _Order
    plan: Plan
    targets: dict[str, Path]
    beside: Beside
    guard: Unchanged

    @property
    def memory(self) -> Path:
        return self.order.destination / MEMORY

    def copied(self) -> tuple[CopiedDisk, ...]:
        """The finished copies. Raises Cancelled, ImageDamaged, or CopyFailed for half of one."""
        check = self.order.check
        return tuple(copied(s, self.targets[s.disk.target], check) for s in self.plan.sources)

    @contextlib.contextmanager
    def saved(self, meanwhile: Callable[[], None]) -> Iterator[Pause]:
        """The guest held at the instant of its saved memory."""
        order = self.order
        room = FloorWatch(order.destination, order.free_floor)

        def check() -> None:
            order.check()
            room.check()

        saving = memory_saved(
            order.domain,
            order.watchdog,
            self.memory,
            self.targets,
            before=order.before,
            meanwhile=meanwhile,
            check=check,
        )
        try:
            with saving as pause:
                yield pause
        except MemoryNotSaved as error:
            if says_full(error.detail):
                raise InsufficientSpace(
                    f"The file system became full with the memory of {order.domain.name}. The "
                    "guest runs and nothing was kept; make room, or do without memory."
                ) from error
            raise


@dataclass
class _Shot:
    taken_at: datetime
    consistency: Consistency
    pause_ms: float = 0.0


def _reflink(job: _Job) -> tuple[_Shot, tuple[CopiedDisk, ...]]:
    """Everything that can be done ahead is, so that the pause holds the ioctls alone."""
    order = job.order
    with ThreadPoolExecutor(1, "checking") as aside, contextlib.ExitStack() as opened:
        copies = []
        for source in job.plan.sources:
            source_fd = os.open(source.path, os.O_RDONLY | os.O_CLOEXEC)
            opened.callback(os.close, source_fd)
            target_fd = create_target(source_fd, job.targets[source.disk.target])
            opened.callback(os.close, target_fd)
            copies.append(CatchingUp(source_fd, target_fd))
        job.beside.warm()
        faults.point("reflink:opened")
        if job.plan.catching_up:
            catch_up(copies, order.pause_budget_ms, order.check)
            faults.point("reflink:caught-up")
        elif order.quiesce != "never":  # the less is left to write out, the shorter is the freeze
            for copy in copies:
                os.fdatasync(copy.source)
        _refuse_moving(job)
        try:
            shot, definition, checked = _shared(job, copies, aside)
        except PauseFailed:  # it may not have been given back
            raise
        except Exception:
            if job.plan.state == "running":
                order.before("resumed")
            raise
        faults.point("reflink:resumed")
        if job.plan.state != "stopped":
            order.before("released")
    refuse_other_disks(job.plan, definition)
    return shot, checked()


def _refuse_moving(job: _Job) -> None:
    """Raise LibvirtBusy for a guest that is about to run elsewhere, or not here yet."""
    if job.plan.state == "paused":
        job.order.domain.refuse_arriving()
    elif job.plan.state == "running" and not job.order.memory:  # which looks for itself
        job.order.domain.refuse_other_job(job.order.check, backups=False)


def _shared(
    job: _Job, copies: list[CatchingUp], aside: Executor
) -> tuple[_Shot, str, Callable[[], tuple[CopiedDisk, ...]]]:
    """The one instant: frozen, paused, the rest of the disks shared, resumed, thawed. With it
    the definition that the server had there, and what gives the copies, checked."""
    order, checked = job.order, job.copied

    def close_in() -> None:
        if job.plan.catching_up:
            follow(copies, order.pause_budget_ms)
        for copy in copies:
            os.fdatasync(copy.source)

    told = job.plan.state == "running" and not order.memory
    if told:  # ahead of the freeze, which waits for no database
        order.before("pause")

    def tell() -> None:
        if not told:
            order.before("pause")

    with order.frozen(job.plan.state) as consistency:
        faults.point("reflink:frozen")
        close_in()  # what was written meanwhile, and what a freeze made the guest write out
        if consistency.level != "crash":  # a freeze takes a while
            order.domain.refuse_other_job(backups=False, patience_s=0)
        with _held(job, close_in, tell) as pause:
            taken_at = datetime.now(UTC)
            faults.point("reflink:paused")
            # Files that are the live ones here are so until the guest writes again.
            definition = order.domain.live_definition()
            finish(copies, order.pause_budget_ms if pause.was_running else math.inf)
            job.beside.take()
            faults.point("reflink:shared")
        if consistency.level != "crash" and pause.was_running:  # for its thaw a guest takes a while
            checked = aside.submit(checked).result
    if job.plan.state == "running" and not pause.was_running:
        job.guard.refuse_running()
    return _Shot(taken_at, consistency, pause.ms), definition, checked


def _held(
    job: _Job, close_in: Callable[[], None], tell: Callable[[], None]
) -> contextlib.AbstractContextManager[Pause]:
    if job.order.memory:
        return job.saved(close_in)
    return paused(job.order.domain, job.order.watchdog, before=tell)


def _stream(job: _Job) -> tuple[_Shot, tuple[CopiedDisk, ...]]:
    job.beside.warm()
    shot = _stream_stopped(job) if job.plan.state == "stopped" else _stream_active(job)
    return shot, job.copied()


def _stream_active(job: _Job) -> _Shot:
    """QEMU copies; also from a guest its owner paused, since QEMU holds its images open."""
    order, shots = job.order, list[_Shot]()

    @contextlib.contextmanager
    def instant() -> Iterator[None]:
        with order.frozen(job.plan.state) as consistency:
            faults.point("stream:frozen")
            shots.append(_Shot(datetime.now(UTC), consistency))
            if consistency.level != "crash":  # libvirt would wait for it, with the guest frozen
                order.domain.refuse_other_job(patience_s=0)
            yield
            faults.point("stream:begun")
            definition = order.domain.live_definition()
            job.beside.take()
        if consistency.thawed:
            order.before("thawed")
        refuse_other_disks(job.plan, definition)

    order.before("backup")
    copies = {s.disk.target: (job.targets[s.disk.target], s.copy_format) for s in job.plan.sources}
    try:
        push_backup(
            order.domain,
            copies,
            order.progress,
            order.cancelled,
            instant=instant(),
            check=FloorWatch(order.destination, order.free_floor).check,
        )
    except BackupFailed as error:
        if says_full(error.detail):
            raise InsufficientSpace(
                f"The file system of the copy became full. The copy of {order.domain.name} was "
                "not kept and the server was not touched; make room and try again."
            ) from error
        raise
    faults.point("stream:copied")
    order.before("released")
    if order.compress:
        for target in job.targets.values():
            _compressed(target, order)
    return shots[0]


def _compressed(target: Path, order: _Order) -> None:
    """Compress a copy, in a second pass: libvirt's backup job knows of none."""
    fresh = target.with_name(f"{target.name}.zstd")
    stream_copy(
        target,
        fresh,
        "qcow2",
        "qcow2",
        lambda _part: None,
        order.cancelled,
        free_floor=order.free_floor,
        compress=True,
    )
    fresh.replace(target)
    faults.point("stream:compressed")


def _stream_stopped(job: _Job) -> _Shot:
    """Without QEMU's locks, which would keep the owner from starting it: then the copy ends."""

    def cancelled() -> bool:
        job.guard.look()
        return job.order.cancelled()

    # Nothing is frozen; it says what this is worth.
    with job.order.frozen("stopped") as consistency:
        shot = _Shot(datetime.now(UTC), consistency)
    refuse_other_disks(job.plan, job.order.domain.live_definition())
    job.beside.take()
    faults.point("stream:begun")
    done = 0
    for source in job.plan.sources:

        def tell(part: float, base: int = done, needed: int = source.needed_bytes) -> None:
            job.order.progress(base + int(part * needed), job.plan.needed_bytes)

        target, image_format = job.targets[source.disk.target], source.disk.format
        stream_copy(
            source.path,
            target,
            image_format,
            source.copy_format,
            tell,
            cancelled,
            free_floor=job.order.free_floor,
            compress=job.order.compress,
            unlocked=True,
        )
        done += source.needed_bytes
        faults.point("stream:disk-copied")
    return shot
