"""Owns the lab guest's kernel, initramfs and root disk: built once, then kept in the cache.

The guest is a real one, in small: the distribution's kernel, its static busybox and its
qemu-guest-agent, taken from downloaded packages that are unpacked and never installed. No step
mounts anything or needs root.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import lzma
import os
import platform
import re
import secrets
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from lab import kernel as kernels
from lab import rootfs
from lab.libvirtd import CACHE, LabUnavailable

MIB = 1024 * 1024
ROOT_SIZE = 128 * MIB
DATA_SIZE = 64 * MIB
#: What to load before the root is mounted, with all that these depend on.
MODULES = ("virtio_pci", "virtio_blk", "virtio_console", "crc32c_generic", "ext4")
#: What the guest loads later, if the kernel has it: network, power button.
LATE_MODULES = ("virtio_net", "button", "evdev", "bridge")
KERNEL_METAPACKAGES = ("linux-image-cloud-amd64", "linux-image-virtual")


@dataclass(frozen=True)
class Image:
    """The files every lab guest is made from; treat them as read-only."""

    kernel: Path
    initrd: Path
    root: Path
    versions: dict[str, str]


def image(cache: Path | None = None) -> Image:
    """Give the guest's image, building it if the cache has none of this recipe.

    The key is the distribution's release and the recipe (these three modules), not the versions
    of the packages: a new kernel is no reason to build again, and no network is needed once it
    is there. `versions.json` beside it tells what went in.
    """
    base = (cache or CACHE) / "guest"
    base.mkdir(parents=True, exist_ok=True)
    home = base / _key()
    with (base / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two test runs build it once
        if not (home / "versions.json").exists():
            with tempfile.TemporaryDirectory(dir=base, prefix="build-") as work:
                _build(Path(work))
                shutil.rmtree(home, ignore_errors=True)
                (Path(work) / "out").rename(home)
    versions = json.loads((home / "versions.json").read_text())
    return Image(home / "kernel", home / "initrd", home / "root.raw", versions)


def _key() -> str:
    release = platform.freedesktop_os_release()
    recipe = [Path(each) for each in (__file__, rootfs.__file__, kernels.__file__)]
    digest = hashlib.sha256(b"".join(each.read_bytes() for each in recipe)).hexdigest()[:12]
    return f"{release.get('ID', 'linux')}-{release.get('VERSION_ID', '0')}-{digest}"


def _build(work: Path) -> None:
    packages = work / "packages"
    out = work / "out"
    out.mkdir()
    kernel_package = _kernel_package()
    names = [kernel_package, "busybox-static", *_with_libraries("qemu-guest-agent")]
    modules_package = kernel_package.replace("linux-image-", "linux-modules-", 1)
    if _known(modules_package):  # Ubuntu keeps them apart
        names.append(modules_package)
    versions = _unpack(names, work / "debs", packages)

    kernel = next(packages.glob("boot/vmlinuz-*"))
    (out / "kernel").write_bytes(kernels.unpacked(kernel.read_bytes()))
    release = kernel.name.removeprefix("vmlinuz-")
    modules = next(p for p in packages.glob(f"**/lib/modules/{release}") if p.is_dir())
    make_initrd(packages, modules, work / "initramfs", out / "initrd")
    _make_root(packages, modules, work / "root", out / "root.raw")
    for file in out.iterdir():
        file.chmod(0o644)
    (out / "versions.json").write_text(json.dumps(versions, indent=1) + "\n")


def _kernel_package() -> str:
    """The package that the distribution's newest kernel for virtual machines comes in."""
    for meta in KERNEL_METAPACKAGES:
        for name in _depends(meta):
            if re.fullmatch(r"linux-image-\d.*", name):
                return name
    raise LabUnavailable(
        f"apt knows none of {', '.join(KERNEL_METAPACKAGES)}; run `apt-get update` first"
    )


def _with_libraries(package: str) -> list[str]:
    """`package` and every library package it needs, however indirectly."""
    found = [package]
    pending = [package]
    while pending:
        wanted = [name for name in _depends(*pending) if name.startswith("lib")]
        pending = [name for name in dict.fromkeys(wanted) if name not in found]
        found += pending
    return found


def _depends(*packages: str) -> list[str]:
    done = subprocess.run(["apt-cache", "depends", *packages], capture_output=True, text=True)
    return re.findall(r"^\s+\|?(?:Pre)?Depends: ([a-z0-9][^\s:]*)", done.stdout, re.MULTILINE)


def _known(package: str) -> bool:
    return not subprocess.run(["apt-cache", "show", package], capture_output=True).returncode


def _unpack(names: list[str], debs: Path, into: Path) -> dict[str, str]:
    """Download `names` and unpack them side by side; return their versions."""
    debs.mkdir()
    _run(["apt-get", "download", "-qq", *names], cwd=debs)
    versions = {}
    for deb in sorted(debs.glob("*.deb")):
        _run(["dpkg-deb", "-x", str(deb), str(into)])
        fields = _run(["dpkg-deb", "-f", str(deb), "Package", "Version"])
        match = dict(line.split(": ", 1) for line in fields.splitlines())
        versions[match["Package"]] = match["Version"]
        deb.unlink()
    return versions


def make_initrd(packages: Path, modules: Path, tree: Path, target: Path) -> None:
    """An initramfs that loads the disk's modules in order and switches to the real root.

    Uncompressed: unpacking would cost more, in emulation, than reading it.
    """
    rootfs.install_busybox(packages, tree, ["sh", "mount", "insmod", "switch_root", "sleep"])
    order = load_order(modules, MODULES)
    _copy_modules(modules, order, tree / "modules")
    rootfs.write(tree / "init", rootfs.INITRAMFS_INIT, 0o755)
    rootfs.write(tree / "modules/order", "".join(f"{_ko(path).stem}\n" for path in order))
    for name in ("dev", "proc", "sys", "root"):
        (tree / name).mkdir()
    listing = "\n".join(sorted(str(p.relative_to(tree)) for p in tree.rglob("*")))
    with target.open("wb") as output:
        subprocess.run(
            ["cpio", "-o", "-H", "newc", "-R", "0:0", "--quiet"],
            input=listing.encode(),
            stdout=output,
            cwd=tree,
            check=True,
        )


def _make_root(packages: Path, modules: Path, tree: Path, target: Path) -> None:
    rootfs.populate(packages, tree, machine_id=secrets.token_hex(16))
    early = load_order(modules, MODULES)
    late = [path for path in load_order(modules, LATE_MODULES) if path not in early]
    _copy_modules(modules, late, tree / "modules")
    rootfs.write(tree / "modules/order", "".join(f"{_ko(path).stem}\n" for path in late))
    make_ext4(target, ROOT_SIZE, tree)


def make_ext4(target: Path, size: int, tree: Path | None = None) -> None:
    """Make a raw ext4 image of `size` bytes, holding `tree`, without mounting it."""
    with target.open("wb") as file:
        os.truncate(file.fileno(), size)
    content = ["-d", str(tree)] if tree else []
    options = ["-q", "-F", "-m", "0", "-E", "root_owner=0:0,lazy_itable_init=0,nodiscard"]
    _run(["mkfs.ext4", *options, *content, str(target)])


def load_order(modules: Path, wanted: tuple[str, ...]) -> list[Path]:
    """The module files for `wanted` and what they depend on, in an order that loads.

    What is built into the kernel, or unknown to it, is left out.
    """
    files = {_module_name(path): path for path in modules.rglob("*.ko*")}
    order: list[Path] = []

    def visit(name: str) -> None:
        path = files.get(name)
        if path is None or path in order:
            return
        depends = re.search(rb"\0depends=([^\0]*)\0", b"\0" + _module_bytes(path))
        for dependency in depends[1].decode().split(",") if depends else []:
            visit(dependency.replace("-", "_"))
        order.append(path)

    for name in wanted:
        visit(name)
    return order


def _module_name(path: Path) -> str:
    return path.name.split(".ko")[0].replace("-", "_")


def _ko(path: Path) -> Path:
    return Path(path.name.split(".ko")[0]).with_suffix(".ko")


def _module_bytes(path: Path) -> bytes:
    if path.suffix == ".xz":
        return lzma.decompress(path.read_bytes())
    if path.suffix == ".zst":
        return subprocess.run(["zstd", "-dcq", path], capture_output=True, check=True).stdout
    return path.read_bytes()


def _copy_modules(modules: Path, order: list[Path], into: Path) -> None:
    into.mkdir(exist_ok=True)
    for path in order:
        (into / _ko(path).name).write_bytes(_module_bytes(path))


def _run(command: list[str], cwd: Path | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
    if done.returncode:
        raise LabUnavailable(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
