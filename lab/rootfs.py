"""Owns what is inside a lab guest: its programs, its init and its few configuration files.

How it becomes a disk, and where the packages come from, is `lab.image`'s.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

INITRAMFS_INIT = """\
#!/bin/sh
mount -t devtmpfs dev /dev
exec </dev/console >/dev/console 2>&1
mount -t proc proc /proc
mount -t sysfs sys /sys
while read -r module; do insmod "/modules/$module.ko"; done </modules/order
tries=0
until mount -t ext4 /dev/vda /root 2>/dev/null; do
    tries=$((tries + 1))
    [ "$tries" -gt 100 ] && echo "no root on /dev/vda" && exec sh
    sleep 0.1
done
mount --move /dev /root/dev
mount --move /proc /root/proc
mount --move /sys /root/sys
exec switch_root /root /sbin/init
"""

INITTAB = """\
::sysinit:/etc/rc
::respawn:/sbin/agent
ttyS0::respawn:-/bin/sh
::ctrlaltdel:/sbin/reboot
::shutdown:/bin/umount -a -r
"""

RC = """\
#!/bin/sh
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /tmp
hostname -F /etc/hostname
[ -b /dev/vdb ] && mount /dev/vdb /data
[ -b /dev/vdc ] && mount /dev/vdc /data2
while read -r module; do insmod "/modules/$module.ko" 2>/dev/null; done </modules/order
ip link set lo up
if [ -e /sys/class/net/eth0 ]; then
    ip link set eth0 up
    ip address add 10.0.2.15/24 dev eth0
fi
acpid
echo "lab guest $(hostname) is up"
"""

# Without udev nobody makes the links in /dev/virtio-ports.
AGENT = """\
#!/bin/sh
port=org.qemu.guest_agent.0
while :; do
    for name in /sys/class/virtio-ports/*/name; do
        [ "$(cat "$name" 2>/dev/null)" = "$port" ] || continue
        device=$(basename "$(dirname "$name")")
        exec qemu-ga --method virtio-serial --path "/dev/$device" --statedir /run
    done
    sleep 1
done
"""

# What the agent calls for guest-shutdown (`shutdown -h|-r|-H +0 message`) and the power button.
# Init's own way takes three seconds; this leaves as clean a file system. It answers first.
SHUTDOWN = """\
#!/bin/sh
way=poweroff
[ "$1" = -r ] && way=reboot
{
    sleep 0.1
    sync
    umount /data /data2 2>/dev/null
    mount -o remount,ro /
    $way -f
} >/dev/null 2>&1 &
"""


def populate(packages: Path, tree: Path, machine_id: str) -> None:
    """Lay out the guest's root file system in `tree` from the unpacked `packages`."""
    install_busybox(packages, tree)
    for name in ("dev", "proc", "sys", "run", "tmp", "root", "data", "data2", "var/log"):
        (tree / name).mkdir(parents=True, exist_ok=True)
    _install_agent(packages, tree)
    write(tree / "etc/inittab", INITTAB)
    write(tree / "etc/rc", RC, 0o755)
    write(tree / "etc/hostname", "lab\n")
    write(tree / "etc/hosts", "127.0.0.1 localhost\n127.0.1.1 lab\n")
    write(tree / "etc/machine-id", f"{machine_id}\n", 0o444)
    write(tree / "etc/passwd", "root:x:0:0:root:/root:/bin/sh\n")
    write(tree / "etc/group", "root:x:0:\n")
    write(tree / "etc/os-release", 'ID=triptych-lab\nPRETTY_NAME="Triptych lab guest"\n')
    write(tree / "etc/acpi/PWRF/00000080", SHUTDOWN, 0o755)
    write(tree / "sbin/agent", AGENT, 0o755)
    (tree / "sbin/shutdown").unlink(missing_ok=True)
    write(tree / "sbin/shutdown", SHUTDOWN, 0o755)


def install_busybox(packages: Path, tree: Path, applets: list[str] | None = None) -> None:
    """Put busybox into `tree` with links for `applets`, by default for all it has."""
    source = next(p for p in (packages / "bin/busybox", packages / "usr/bin/busybox") if p.exists())
    for name in ("bin", "sbin", "usr/bin", "usr/sbin"):
        (tree / name).mkdir(parents=True, exist_ok=True)
    shutil.copy(source, tree / "bin/busybox")
    if applets is None:
        listing = [str(source), "--list-full"]
        done = subprocess.run(listing, capture_output=True, text=True, check=True)
        places = done.stdout.split()
    else:
        places = [f"bin/{name}" for name in applets]
    for place in places:
        link = tree / place
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.symlink_to("/bin/busybox")


def write(path: Path, text: str, mode: int = 0o644) -> None:
    """Write a file of the guest's, with its folder and its mode."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)


def _install_agent(packages: Path, tree: Path) -> None:
    """Copy the agent and the libraries that its own dynamic linker finds for it."""
    agent = packages / "usr/sbin/qemu-ga"
    shutil.copy(agent, tree / "usr/sbin/qemu-ga")
    # Beside the linker itself its package has an absolute link, which leads to the machine's.
    found = packages.glob("**/ld-linux-x86-64.so.2")
    linker = next(path for path in found if not path.is_symlink())
    folders = [p for p in packages.glob("**/x86_64-linux-gnu") if p.is_dir()]
    search = ":".join(map(str, folders))
    command = [str(linker), "--inhibit-cache", "--library-path", search, "--list", str(agent)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    libraries = [Path(path) for path in re.findall(r"=> (\S+)", done.stdout)]
    (tree / "lib/x86_64-linux-gnu").mkdir(parents=True, exist_ok=True)
    for library in libraries:
        if library.name == linker.name:
            continue
        if not library.is_relative_to(packages):
            raise RuntimeError(f"the agent's packages do not bring {library.name}")
        shutil.copy(library, tree / "lib/x86_64-linux-gnu" / library.name)
    (tree / "lib64").mkdir(exist_ok=True)
    shutil.copy(linker, tree / "lib64" / linker.name)
