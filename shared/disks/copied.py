"""What must hold before a copy counts: it is of the disks that the server has, a stopped one stood
still, and each file is its whole disk."""

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from shared.disks import images
from shared.disks.errors import CopyFailed, ImageDamaged, ServerChanged
from shared.disks.planning import Plan, SourceDisk
from shared.hypervisor.definition import DomainDefinition
from shared.hypervisor.domains import Domain


@dataclass(frozen=True)
class CopiedDisk:
    """One disk's copy. `bytes` is what the file takes up, shared extents included."""

    target: str
    path: Path
    format: str
    virtual_bytes: int
    bytes: int


class Unchanged:
    """Makes sure that a server which was off stayed off, unwritten, while it was copied."""

    def __init__(self, domain: Domain, chosen: Plan) -> None:
        self.domain, self.chosen = domain, chosen
        self._files = list(_files(chosen))
        self._before = self._stamps()

    def verify(self) -> None:
        """Raises ServerChanged."""
        if self.chosen.state == "stopped":
            self._refuse_if(self.domain.state != "stopped")
            self.look()

    @contextmanager
    def blamed(self) -> Iterator[None]:
        """A copy that fails in the block since its server is changed meanwhile says that: qemu-img
        then finds tables of two instants. Raises ServerChanged."""
        try:
            yield
        except (CopyFailed, ImageDamaged) as error:
            try:
                if self.chosen.state == "stopped":
                    self.look()
            except ServerChanged as changed:
                raise changed from error
            raise

    def refuse_running(self) -> None:
        """Of one that went off before it was to be held. Raises ServerChanged."""
        self._refuse_if(self.domain.state == "running")

    def look(self) -> None:
        """What `verify` can tell at any time, without libvirt. Raises ServerChanged."""
        self._refuse_if(self._stamps() != self._before)

    def _refuse_if(self, changed: bool) -> None:
        if changed:
            raise ServerChanged(
                f"{self.domain.name} was started or its disks were written while it was being "
                "copied, so the copy is not kept. The server was not touched; try again."
            )

    def _stamps(self) -> list[tuple[str, ...]]:
        return [_stamp(path) for path in self._files]


def _files(chosen: Plan) -> Iterator[Path]:
    """What the disks are read from; of a server that is off, with all that they stand on."""
    for source in chosen.sources:
        yield source.path
        if chosen.state == "stopped" and source.depends_on is not None:
            yield from images.chain(source.path, source.disk.format)


def _stamp(path: Path) -> tuple[str, ...]:
    """What is another one once the disk has been written to, or is gone.

    A device's node has its times, and libvirt gives each QEMU nodes of its own: of a device count
    the requests to write and the sectors written (Documentation/block/stat.rst).
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        return ()
    if not stat.S_ISBLK(status.st_mode):
        return str(status.st_mtime_ns), str(status.st_size)
    number = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    counts = Path(f"/sys/dev/block/{number}/stat").read_text().split()
    return counts[4], counts[6]


def refuse_other_disks(chosen: Plan, definition: str) -> None:
    """Raise ServerChanged unless what the server has, by its definition at the copy's instant, are
    the disks of the plan: its owner may have plugged one in, or put one on an overlay or back."""
    if definition == chosen.live.xml:
        return
    now = {disk for disk in DomainDefinition.parse(definition).disks if not disk.left_out_because}
    planned = {source.disk for source in chosen.sources}
    if now != planned:
        others = ", ".join(sorted({disk.target for disk in now ^ planned}))
        raise ServerChanged(
            f"{chosen.live.name} was given other disks, or others of their files ({others}), while "
            "it was being copied, so the copy is not kept. It is as that left it; try again."
        )


def taken_up(path: Path) -> int:
    """Bytes of a finished file on the disk; not what a file system has set aside past its end."""
    status = path.stat()
    return min(status.st_blocks * 512, status.st_size)


def copied(source: SourceDisk, path: Path, meanwhile: Callable[[], None]) -> CopiedDisk:
    """The finished copy of a disk. Raises ImageDamaged, CopyFailed where it is not whole, and what
    `meanwhile` raises."""
    image_format = path.suffix.removeprefix(".")
    images.count_anew(path, image_format, meanwhile)
    images.check(path, image_format, meanwhile)
    about = images.info(path, image_format)
    if about.depends_on is not None or about.virtual_bytes != source.virtual_bytes:
        raise CopyFailed(
            f"The copy of {source.disk.target} is not the whole disk and is not kept. "
            "The server was not touched."
        )
    return CopiedDisk(
        target=source.disk.target,
        path=path,
        format=image_format,
        virtual_bytes=source.virtual_bytes,
        bytes=taken_up(path),
    )
