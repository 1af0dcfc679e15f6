"""Owns a Debian that has libguestfs, built once by debootstrap and kept in the cache.

The machine itself must not have it: where guestfish is found, `identity: auto` uses it. Here it is
found by those alone who have `programs()` on their PATH. What they find there runs in a mount
namespace of its own, with that Debian's system directories in place of the machine's; everything
else, disks and processes among it, is the machine's.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from lab import debian, rootfs
from lab.libvirtd import CACHE

SUITE = "bookworm"
PACKAGES = ("guestfish", "linux-image-cloud-amd64")
"""libguestfs makes its machine of what is installed beside it: programs, and a kernel."""
_GUESTFISH = """\
#!/bin/sh
exec unshare --mount --propagation slave sh -ec '
    tree=$1
    shift
    for each in usr etc boot var/lib/dpkg; do
        mount --bind "$tree/$each" "/$each"
    done
    LIBGUESTFS_CACHEDIR=$tree/var/tmp exec /usr/bin/guestfish "$@"
' sh {tree} "$@"
"""


def programs(cache: Path | None = None) -> Path:
    """The directory with `guestfish`; some minutes when it is not there yet.

    Needs root that may mount, debootstrap and Debian's packages. Raises LabUnavailable.
    """
    home = debian.kept(
        (cache or CACHE) / "guestfs", SUITE, [Path(debian.__file__), Path(__file__)], _build
    )
    tree = shlex.quote(str(home / "tree"))
    rootfs.write(home / "bin/guestfish", _GUESTFISH.format(tree=tree), 0o755)
    return home / "bin"


def _build(_: Path, out: Path) -> None:
    versions = debian.install(out / "tree", SUITE, PACKAGES)
    (out / "versions.json").write_text(json.dumps(versions, indent=1) + "\n")
