"""Owns a real qemu-img that takes its time: what it copies is not over before a test has looked."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

_SCRIPT = """\
#!/bin/sh
[ "$1" = convert ] || exec {qemu_img} "$@"
shift
exec {qemu_img} convert -r 64K "$@"
"""


def slowed(directory: Path) -> str:
    """A search path, for `PATH`, on which `qemu-img convert` copies 64 KiB a second."""
    script = directory / "qemu-img"
    script.write_text(_SCRIPT.format(qemu_img=shutil.which("qemu-img")))
    script.chmod(0o755)
    return f"{directory}:{os.environ['PATH']}"
