"""Copying stored files out again: the disks of a revert, a restore, a clone or a proof.

Owns: all files of one server or none. The stored files are only read.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from shared import faults
from shared.disks import images
from shared.disks.copied import CopiedDisk
from shared.disks.copy import stream_copy
from shared.disks.errors import CopyFailed
from shared.disks.planning import Way
from shared.disks.reflink import can_reflink, reflink
from shared.disks.space import FLOOR, ensure_space, ensure_space_for
from shared.errors import Cancelled
from shared.turns import Turns

Progress = Callable[[int, int], None]

_REFLINK_BYTES = 1 << 20
_streams = Turns(1)
"""One keeps a disk busy: it has sixteen parts under way (`copy.py`)."""


def materialise(
    files: Sequence[CopiedDisk],
    destinations: Mapping[str, Path],
    *,
    formats: Mapping[str, str] | None = None,
    progress: Progress = lambda _done, _total: None,
    cancelled: Callable[[], bool] = lambda: False,
    free_floor: float = FLOOR,
) -> Way:
    """Write each stored disk to its destination (by target), a new file of mode 0600.

    Extents are shared where that is possible; the way taken for all is returned
    ("reflink" only if every disk was). `formats` asks for another format than
    the stored one. Raises InsufficientSpace (before anything is written, or as soon as
    a stream has less than `free_floor` of the file system left), FileExistsError,
    Cancelled, CopyFailed, ImageDamaged; no new file is left then.
    """
    folders = {target: path.parent for target, path in destinations.items()}
    wanted = {file.target: (formats or {}).get(file.target, file.format) for file in files}
    shares = {file.target: _shares(file, folders, wanted) for file in files}
    needs = needed_bytes(files, folders, formats)
    ensure_space_for(((folders[t], needed) for t, needed in needs.items()), free_floor)
    total, done = sum(needs.values()), 0

    def check() -> None:
        if cancelled():
            raise Cancelled("The copy was cancelled. Nothing of it was kept.")

    made: list[Path] = []
    try:
        for file in files:
            path = destinations[file.target]
            if path.exists():
                raise FileExistsError(path)
            made.append(path)

            def tell(part: float, base: int = done, needed: int = needs[file.target]) -> None:
                progress(base + int(part * needed), total)

            if shares[file.target]:
                reflink(file.path, path)
            else:
                with _streams.one(check):
                    ensure_space(path.parent, needs[file.target], free_floor)
                    stream_copy(
                        file.path,
                        path,
                        *_streamed(file, wanted[file.target]),
                        tell,
                        cancelled,
                        free_floor=free_floor,
                    )
            _verify(file, path, wanted[file.target], check)
            faults.point("materialise:written")
            done += needs[file.target]
            progress(done, total)
    except BaseException:
        for path in made:
            path.unlink(missing_ok=True)
        raise
    return "reflink" if all(shares.values()) else "stream"


def needed_bytes(
    files: Sequence[CopiedDisk],
    folders: Mapping[str, Path],
    formats: Mapping[str, str] | None = None,
) -> dict[str, int]:
    """What writing each disk once into its folder takes, by target. Raises CopyFailed for one that
    cannot be."""
    wanted = {file.target: (formats or {}).get(file.target, file.format) for file in files}
    return {
        file.target: _REFLINK_BYTES
        if _shares(file, folders, wanted)
        else images.measure(file.path, *_streamed(file, wanted[file.target]))
        for file in files
    }


def _shares(file: CopiedDisk, folders: Mapping[str, Path], wanted: Mapping[str, str]) -> bool:
    same = wanted[file.target] == file.format
    return same and can_reflink(file.path.parent, folders[file.target])


def _streamed(file: CopiedDisk, wanted: str) -> tuple[str, str]:
    """The formats that qemu-img reads a disk as and writes it in.

    It opens none that is encrypted: such a disk's file is copied as it is. Raises CopyFailed where
    that is not what is wanted.
    """
    if not images.is_encrypted(file.path, file.format):
        return file.format, wanted
    if wanted != file.format:
        raise CopyFailed(
            f"{file.target} is encrypted, and a {wanted} cannot be made of its {file.format} "
            "without its key. Nothing was written."
        )
    return "raw", "raw"


def _verify(file: CopiedDisk, path: Path, image_format: str, meanwhile: Callable[[], None]) -> None:
    images.check(path, image_format, meanwhile)
    about = images.info(path, image_format)
    if about.virtual_bytes != file.virtual_bytes or about.depends_on is not None:
        raise CopyFailed(
            f"What was written for {file.target} is not the stored disk and was removed."
        )
