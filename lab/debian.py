"""Owns a real Debian to clone: systemd, openssh-server, cloud-init and the guest agent.

Built once by debootstrap, from where this machine's own packages come, and kept in the cache
beside the small guest's image. It boots by the small guest's initramfs, which starts sooner than
a distribution's; under emulation it takes half a minute all the same, so only tests that are
about such a guest use it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from lab import image as small
from lab import kernel as kernels
from lab import rootfs
from lab.image import MIB, Image
from lab.libvirtd import CACHE, LabUnavailable

SUITE = "trixie"
ROOT_SIZE = 1024 * MIB
MEMORY_MIB = 512
PACKAGES = (
    *("systemd-sysv", "udev", "dbus", "kmod", "iproute2", "busybox-static", "e2fsprogs"),
    *("linux-image-cloud-amd64", "openssh-server", "cloud-init", "qemu-guest-agent"),
)
_NETWORK = "[Match]\nType=ether\n[Network]\nDHCP=ipv4\nLinkLocalAddressing=no\n"
# cloud-init cannot be had by debootstrap, which does not resolve its virtual packages.
_INSTALL = """\
set -e
suite=$1 tree=$2 mirror=$3
shift 3
debootstrap --variant=minbase "$suite" "$tree" $mirror >&2
printf '#!/bin/sh\\nexit 101\\n' >"$tree/usr/sbin/policy-rc.d" # no service is started
chmod 755 "$tree/usr/sbin/policy-rc.d"
mountpoint -q "$tree/proc" || mount -t proc proc "$tree/proc"
exec chroot "$tree" env DEBIAN_FRONTEND=noninteractive LC_ALL=C INITRD=No sh -ec '
    apt-get update -q
    apt-get install -yq --no-install-recommends -o Dpkg::Options::=--force-confold "$@"
    apt-get clean
    dpkg-query --show
' sh "$@"
"""
_UNREAD = ("usr/share/doc", "usr/share/man", "usr/share/locale", "var/lib/apt/lists")


def debian(cache: Path | None = None) -> Image:
    """The Debian guest's kernel, initramfs and root disk; some minutes when it is not there yet.

    Needs root, debootstrap and Debian's packages. Raises LabUnavailable with what is missing.
    """
    recipe = [Path(each.__file__) for each in (small, rootfs, kernels)] + [Path(__file__)]
    home = kept((cache or CACHE) / "debian", SUITE, recipe, _build)
    versions = json.loads((home / "versions.json").read_text())
    return Image(home / "kernel", home / "initrd", home / "root.raw", versions)


def kept(base: Path, name: str, recipe: list[Path], build: Callable[[Path, Path], None]) -> Path:
    """The folder in `base` for that name and recipe (the files that say how it is made).

    Where it is not there yet, `build` gets a directory to work in and one to make, for which it
    writes `versions.json` last.
    """
    base.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(b"".join(each.read_bytes() for each in recipe)).hexdigest()[:12]
    home = base / f"{name}-{digest}"
    with (base / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (home / "versions.json").exists():
            with tempfile.TemporaryDirectory(dir=base, prefix="build-") as work:
                out = Path(work) / "out"
                out.mkdir()
                build(Path(work), out)
                shutil.rmtree(home, ignore_errors=True)
                out.rename(home)
    return home


def make_root(directory: Path, name: str = "debian.qcow2") -> Path:
    """A qcow2 disk in `directory` that boots this Debian."""
    target = directory / name
    _run(["qemu-img", "convert", "-O", "qcow2", str(debian().root), str(target)])
    return target


def _build(work: Path, out: Path) -> None:
    tree = work / "tree"
    versions = install(tree, SUITE, PACKAGES)
    _run(["chroot", str(tree), "systemctl", "enable", "systemd-networkd"])
    kernel = next(tree.glob("boot/vmlinuz-*"))
    (out / "kernel").write_bytes(kernels.unpacked(kernel.read_bytes()))
    modules = tree / "usr/lib/modules" / kernel.name.removeprefix("vmlinuz-")
    small.make_initrd(tree, modules, work / "initramfs", out / "initrd")
    _settle(tree)
    small.make_ext4(out / "root.raw", ROOT_SIZE, tree)
    for file in out.iterdir():
        file.chmod(0o644)
    (out / "versions.json").write_text(json.dumps(versions, indent=1) + "\n")


def install(tree: Path, suite: str, packages: Iterable[str]) -> dict[str, str]:
    """Make a Debian with `packages` in `tree`, with no service started; return the versions.

    What is mounted meanwhile is in a namespace of its own, and gone with it whatever happens.
    Raises LabUnavailable.
    """
    if os.geteuid() != 0 or not shutil.which("debootstrap"):
        raise LabUnavailable("a Debian is built by root with debootstrap")
    mirror = os.environ.get("TRIPTYCH_LAB_MIRROR", "")
    enter = ["unshare", "--mount", "--pid", "--fork"]
    output = _run([*enter, "sh", "-c", _INSTALL, "sh", suite, str(tree), mirror, *packages])
    (tree / "usr/sbin/policy-rc.d").unlink()
    lines = (line.split("\t") for line in output.splitlines())
    return dict(each for each in lines if len(each) == 2)


def _settle(tree: Path) -> None:
    """Files that an installer would write, and none of what a guest does not need to be cloned."""
    rootfs.write(tree / "etc/hostname", "golden\n")
    rootfs.write(tree / "etc/hosts", "127.0.0.1 localhost\n127.0.1.1 golden\n")
    rootfs.write(tree / "etc/fstab", "/dev/vda / ext4 defaults 0 1\n")
    rootfs.write(tree / "etc/systemd/network/10-lab.network", _NETWORK)
    for unread in _UNREAD:
        shutil.rmtree(tree / unread, ignore_errors=True)
    for built in tree.glob("boot/vmlinuz-*"):
        built.unlink()  # it is started from outside


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        tail = (done.stdout + done.stderr)[-2000:].strip()
        raise LabUnavailable(f"{' '.join(command[:3])}: {tail}")
    return done.stdout
