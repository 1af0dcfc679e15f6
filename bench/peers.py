"""The peers: what a user would run without Triptych. What is shown of one is what was run.

A peer that copies ends with the copy synced, as ours does. Each is timed with the start of its
processes, as ours is with that of its own.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shared.disks.reflink import sync_source

PACKAGES = {"borg": "borgbackup", "restic": "restic", "virt-clone": "virtinst"}
_ALWAYS_LOCAL = {
    "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes",
    "BORG_RELOCATED_REPO_ACCESS_IS_OK": "yes",
    "RESTIC_PASSWORD": "benchmark",
}


class NoPeer(RuntimeError):
    """A peer is not installed and cannot be; the message tells why."""


@dataclass(frozen=True)
class Bare:
    """Commands joined by `&&`, with places in braces."""

    text: str

    def run(self, **places: str | Path) -> float:
        """Seconds that they took. Raises RuntimeError with what the one that failed said."""
        commands = [
            [word.format(**places) for word in shlex.split(each)] for each in self.text.split("&&")
        ]
        environment = {**os.environ, **_ALWAYS_LOCAL, "BORG_BASE_DIR": str(places.get("repo", "."))}
        began = time.perf_counter()
        for command in commands:
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            if done.returncode:
                said = done.stderr.strip() or done.stdout.strip()
                raise RuntimeError(f"{shlex.join(command)}: {said[-500:]}")
        return time.perf_counter() - began

    def __str__(self) -> str:
        return self.text.replace("{", "").replace("}", "")


# `-U`: QEMU holds the disk of a running guest locked. What is read so is no picture of an
# instant, and a user could do nothing with it; it is what the tool takes at best.
CONVERT = Bare(
    "qemu-img convert -U -W -m 16 -t none -T none -f qcow2 -O qcow2 {disk} {copy} && sync {copy}"
)
CONVERT_DEFAULT = Bare("qemu-img convert -U -f qcow2 -O qcow2 {disk} {copy} && sync {copy}")
CP_SPARSE = Bare("cp --sparse=always --reflink=never {disk} {copy} && sync {copy}")
CP_REFLINK = Bare("cp --reflink=always {disk} {copy} && sync {copy}")
BORG_INIT = Bare("borg init --encryption none {repo}/borg")
BORG = Bare("borg create --compression zstd,1 {repo}/borg::{name} {disk}")
RESTIC_INIT = Bare("restic --quiet --repo {repo}/restic init")
RESTIC = Bare("restic --quiet --repo {repo}/restic --no-cache backup {disk}")
CHUNK_STORES = (("borg", BORG_INIT, BORG), ("restic", RESTIC_INIT, RESTIC))
"""Program, what makes a repository, what copies into it."""
SNAPSHOT = Bare(
    "virsh -c {uri} snapshot-create-as {domain} --disk-only --atomic --no-metadata "
    "--diskspec vda,file={overlay}"
)
MEMORY_SNAPSHOT = Bare(
    "virsh -c {uri} snapshot-create-as {domain} --live --atomic --no-metadata "
    "--memspec file={saved},snapshot=external --diskspec vda,file={overlay}"
)
COMMIT = Bare("virsh -c {uri} blockcommit {domain} vda --active --pivot --wait && rm {overlay}")
RESTART = Bare("virsh -c {uri} destroy {domain} && virsh -c {uri} start {domain}")
# Without the check, which refuses a disk that would not fit if all of it were written to.
_VIRT_CLONE = (
    "virt-clone --quiet --connect {uri} --check disk_size=off "
    "--original {domain} --name {name} --file {copy}"
)
_SYNC = "sync {copy}"
_START = "virsh -c {uri} start {name}"
VIRT_CLONE = Bare(f"{_VIRT_CLONE} && {_SYNC} && {_START}")
VIRT_CLONE_UNSYNCED = Bare(f"{_VIRT_CLONE} && {_START}")
VIRT_CLONE_REFLINK = Bare(f"{_VIRT_CLONE} --reflink && {_SYNC} && {_START}")
RESTORE = Bare("virsh -c {uri} restore {saved} --running")
LINKED = Bare(
    "qemu-img create -q -f qcow2 -F qcow2 -b {disk} {copy} && "
    f"virsh -c {{uri}} define {{definition}} && {_START}"
)
_BACKUP_BEGIN = Bare("virsh -c {uri} backup-begin {domain} {job}")
BACKUP = f"{_BACKUP_BEGIN} && virsh event domain --event job-completed && sync copy"


def needed(program: str) -> None:
    """Install what a peer comes in, as root on Debian. Raises NoPeer."""
    if shutil.which(program):
        return
    install = ["apt-get", "install", "-y", "--no-install-recommends", PACKAGES[program]]
    try:
        done = subprocess.run(install, capture_output=True, text=True)
    except OSError as error:
        raise NoPeer(f"{program} is not installed, and there is no apt-get: {error}") from error
    if done.returncode:
        raise NoPeer(f"{program} is not installed: {done.stderr.strip()[-300:]}")


def backup(uri: str, domain: str, copy: Path) -> float:
    """Seconds of a full push backup of vda to a qcow2, up to the job's end, synced."""
    job = copy.with_suffix(".xml")
    job.write_text(
        "<domainbackup mode='push'><disks><disk name='vda' type='file' backup='yes'>"
        f"<target file='{copy}'/><driver type='qcow2'/></disk></disks></domainbackup>"
    )
    listen = ["virsh", "-c", uri, "event", domain, "--event", "job-completed", "--timeout", "900"]
    listener = subprocess.Popen(listen, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with listener:
        try:
            time.sleep(0.5)  # until it listens
            began = time.perf_counter()
            _BACKUP_BEGIN.run(uri=uri, domain=domain, job=job)
            said = listener.communicate()[0]
            sync_source(copy)
            took = time.perf_counter() - began
        finally:
            listener.terminate()
            job.unlink()
    if listener.returncode:
        raise RuntimeError(f"the backup of {domain} did not end: {said.strip()[-300:]}")
    return took


@contextlib.contextmanager
def gone_after(path: Path) -> Iterator[Path]:
    """`path`, which is deleted with all that is in it."""
    try:
        yield path
    finally:
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
