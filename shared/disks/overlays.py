"""Disks that stand on another file: qcow2 overlays on a base that several share.

Owns: the overlay, and what a base is called. A base is whole, is not written any more, and lies
beside its overlays, which name it without its folder: all of them can be moved together.
"""

import subprocess
from pathlib import Path

from shared.disks.durable import sync
from shared.disks.errors import CopyFailed, InsufficientSpace
from shared.disks.space import says_full

BASE_PREFIX = "triptych-base-"
"""What the name of each base begins with."""
OVERLAY_BYTES = 1 << 20
"""What a new overlay takes up, and more."""
_TIMEOUT_S = 60


def base_path(folder: Path, farm: str, target: str, image_format: str) -> Path:
    """Where the base of a farm's disk lies, by the farm's id."""
    return folder / f"{BASE_PREFIX}{farm}-{target}.{image_format}"


def create_overlay(base: Path, base_format: str, path: Path) -> None:
    """Make an overlay on `base`, in its folder: a new qcow2 of mode 0600, synced.

    Raises FileExistsError, InsufficientSpace or CopyFailed; nothing of `path` is left then.
    """
    path.touch(mode=0o600, exist_ok=False)
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", base_format, "-b", base.name]
    try:
        done = subprocess.run(
            [*command, str(path)],
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
        if done.returncode:
            if says_full(done.stderr):
                raise InsufficientSpace(f"The file system of {path.parent} is full.")
            raise CopyFailed(f"No overlay on {base.name} could be made: {done.stderr.strip()}.")
        sync(path)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
