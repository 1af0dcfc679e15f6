"""Owns what only qemu-img makes: encrypted disks, and copies that take their time."""

from __future__ import annotations

import os
import shutil
import subprocess
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


KEY = "abc"
_TRIES = 20
SECRET = "c0ffee00-aaaa-4bbb-8ccc-0123456789ab"  # noqa: S105  a name
"""What a definition calls the key."""


def as_encrypted(definition: str, disk: Path) -> str:
    """The definition with that disk, which is on its source alone, as an encrypted one."""
    source = f"<source file='{disk}'/>"
    key = f"<encryption format='luks'><secret type='passphrase' uuid='{SECRET}'/></encryption>"
    return definition.replace(source, f"<source file='{disk}'>{key}</source>")


def encrypted(path: Path, fill: int = 7) -> Path:
    """A qcow2 disk of 32 MiB, encrypted by LUKS, with 4 MiB of that byte in it."""
    secret = ["--object", f"secret,id=key,data={KEY}"]
    options = "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10"
    command = ["qemu-img", "create", "-q", *secret, "-f", "qcow2", "-o", options, str(path), "32M"]
    # QEMU measures how long the key's derivation takes, and in one of some twenty runs cannot tell
    # ("Unable to get accurate CPU usage").
    for _ in range(_TRIES):
        if subprocess.run(command, capture_output=True, check=False).returncode == 0:
            break
    else:
        subprocess.run(command, check=True)
    rewrite(path, fill)
    return path


def rewrite(path: Path, fill: int = 7) -> None:
    """Write that byte to what is in an encrypted disk."""
    opened = f"driver=qcow2,file.filename={path},encrypt.key-secret=key"
    command = ["qemu-io", "--object", f"secret,id=key,data={KEY}"]
    command += ["-c", f"write -P {fill} 1M 4M", "--image-opts", opened]
    subprocess.run(command, check=True, capture_output=True)
