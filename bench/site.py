"""Where figures are measured: a file system, a guest on it, and a Triptych whose vault is there.

Owns making all of it and taking it away, on Ctrl-C too, and driving it as users do: by HTTP.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from bench import disks
from bench.sizes import DATA_AT, EXTENTS, GIB, MIB
from bench.ticker import Recording, channel, recording
from embedded.stack import Stack, free_port
from lab import filesystems
from lab.guest import Guest
from lab.libvirtd import Hypervisor
from shared.copying import HOLDS
from shared.hypervisor.connection import connect
from shared.hypervisor.domains import Domain, find_by_name
from shared.hypervisor.watchdog import Watchdog

TOO_LONG_S = 600
ASKED, APART_S = 5, 0.5
"""A second freeze soon after one is cheaper, and workers look after what was deleted."""


@dataclass(frozen=True)
class Kind:
    """`data` GiB of noise in a disk of `disk` GiB; `pieces` is the extents of a second disk."""

    file_system: str
    data: int = 2
    disk: int = 20
    pieces: int = 0
    memory_mib: int = 192
    written: bool = False
    """Whether it is for copies of which each byte is written. Then the cache of the backing file is
    passed by, and each block was written before: the first write to one can take four times as
    long, down to the machine's own disk. Who writes to which is chance."""

    @property
    def room(self) -> int:
        """Bytes of the file system, of which the backing file has no more than is used: a disk,
        a full copy of it, and what a test of space and the free floor (5 %) ask for."""
        return 2 * self.data * GIB + 16 * GIB + self.pieces * 16384 + 4096 * MIB


SITES = {
    "xfs": Kind("xfs"),
    "btrfs": Kind("btrfs"),
    "ext4": Kind("ext4", written=True),
    "xfs_8g": Kind("xfs", data=8),
    "xfs_20g": Kind("xfs", data=20, disk=24),
    "xfs_200k_extents": Kind("xfs", data=0, disk=1, pieces=EXTENTS),
    "xfs_space": Kind("xfs"),
    "xfs_farm": Kind("xfs", memory_mib=256),
}


@dataclass(frozen=True)
class Done:
    """An operation that succeeded: seconds from the request until its caller knew."""

    seconds: float
    result: dict[str, Any]
    began: float
    """By `time.perf_counter`."""

    @property
    def pause_ms(self) -> float:
        return float(self.result["pause_ms"])


class Site:
    """`guest` is registered and running, `small` (128 MiB, stopped) on reflink sites."""

    def __init__(
        self, kind: Kind, folder: Path, hypervisor: Hypervisor, guest: Guest, client: httpx.Client
    ) -> None:
        self.kind = kind
        self.folder = folder
        self.hypervisor = hypervisor
        self.guest = guest
        self._client = client

    # As users do

    def register(self, name: str) -> None:
        self._asked("POST", "/servers", {"host": "local", "domain": name})

    def forget(self, name: str) -> None:
        self._asked("DELETE", f"/servers/{name}")

    def snapshot(self, server: str | None = None, **wishes: Any) -> Done:
        body = {"replace": True, **wishes}
        return self.operate(f"/servers/{server or self.guest.name}/snapshot", body)

    def image(self, **wishes: Any) -> Done:
        return self.operate(f"/servers/{self.guest.name}/images", wishes)

    def clones(self, names: str, count: int, server: str | None = None, **wishes: Any) -> Done:
        """Clones by a pattern of names, all of them made; as their source is inside, as the
        peers' are."""
        body = {"name": names, "count": count, "identity": "keep", **wishes}
        done = self.operate(f"/servers/{server or self.guest.name}/clones", body)
        if failed := [each["error"] for each in done.result["clones"] if each["error"]]:
            raise RuntimeError(f"{len(failed)} of {count} clones failed: {failed[0]}")
        return done

    def operate(self, path: str, body: dict[str, Any] | None = None, verb: str = "POST") -> Done:
        """Ask for an operation and wait until it succeeded. Raises RuntimeError otherwise."""
        began = time.perf_counter()
        number = self._asked(verb, path, body)["id"]
        while True:
            operation = self._asked("GET", f"/operations/{number}?wait=30")
            took = time.perf_counter() - began
            if operation["state"] not in ("queued", "running"):
                break
            if took > TOO_LONG_S:
                raise TimeoutError(f"{path} is {operation['state']} after {took:.0f} s")
        if operation["state"] != "succeeded":
            raise RuntimeError(f"{path} {operation['state']}: {operation['error']}")
        return Done(took, operation["result"], began)

    def clear(self) -> None:
        """Delete all copies."""
        for image in self.images():
            self.operate(f"/images/{image['id']}", verb="DELETE")
        for server in self._asked("GET", "/servers")["items"]:
            if server["snapshot"]:
                self.operate(f"/servers/{server['id']}/snapshot", verb="DELETE")

    def images(self) -> list[dict[str, Any]]:
        """All images, oldest first."""
        found = self._asked("GET", "/images?limit=200")["items"]
        return sorted(found, key=lambda image: image["created_at"])

    def _asked(self, verb: str, path: str, body: dict[str, Any] | None = None) -> Any:
        answer = self._client.request(verb, path, json=body)
        if answer.is_error:
            raise RuntimeError(f"{verb} {path} answered {answer.status_code}: {answer.text}")
        return answer.json() if answer.content else None

    # Beside Triptych

    @property
    def uri(self) -> str:
        return self.hypervisor.uri

    @property
    def disk(self) -> Path:
        """The guest's first disk."""
        return self.guest.disks[0]

    @property
    def vault(self) -> Path:
        return self.folder / "vault"

    @property
    def data(self) -> int:
        """Bytes of noise on the disk, from `DATA_AT` on."""
        return self.kind.data * GIB

    @property
    def domain(self) -> Domain:
        """The guest as the engine holds it."""
        return find_by_name(connect(self.uri), self.guest.name)

    def freeze_ms(self) -> float:
        """What the guest itself takes to freeze and thaw, as `virsh domfsfreeze` has it do."""

        def both(handle: Any) -> None:
            handle.fsFreeze()
            handle.fsThaw()

        took = []
        for _ in range(ASKED):
            time.sleep(APART_S)
            began = time.perf_counter()
            self.domain.call("Asking", both)
            took.append((time.perf_counter() - began) * 1000)
        return statistics.median(took)

    @contextlib.contextmanager
    def watchdog(self) -> Iterator[Watchdog]:
        watchdog = Watchdog(self.uri, self.vault / HOLDS)
        watchdog.start()
        try:
            yield watchdog
        finally:
            watchdog.close()

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder on the site's file system that QEMU's user can write into."""
        with tempfile.TemporaryDirectory(dir=self.folder, prefix="scratch-") as made:
            folder = Path(made)
            folder.chmod(0o711)
            shutil.chown(folder, self.hypervisor.qemu_user)
            yield folder

    @contextlib.contextmanager
    def ticks(self, *probe: str) -> Iterator[Recording]:
        """What the probe in the guest sends meanwhile; see `bench.ticker`."""
        with recording(self.guest, self.folder / "ticks" / "end", *(probe or ("tick",))) as ticks:
            yield ticks

    def churn_inside(self, count: int, seed: int) -> None:
        """Have the guest write that many random blocks of 64 KiB onto its data."""
        command = f"{disks.PROBE} churn /dev/vda {DATA_AT} {self.data} {count} {seed}"
        status, said = self.guest.run(command, timeout=120)
        if status:
            raise RuntimeError(f"{command}: {said}")

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """The guest is off, its file system clean; afterwards it runs again."""
        self.guest.shutdown()
        try:
            yield
        finally:
            if self.guest.state() == "stopped":
                self.guest.start()

    def settle(self) -> None:
        """What a deletion leaves to be done, to the disk and to the workers, is not the next
        run's, whoever's that is."""
        subprocess.run(["sync", "-f", str(self.folder)], check=True)
        time.sleep(APART_S)

    def used(self) -> int:
        """Bytes of the file system in use, everything written out.

        What XFS has set aside for files that are being written to is given back first; XFS does
        that by itself, but minutes later.
        """
        self.settle()
        if self.kind.file_system == "xfs":
            free = ["xfs_spaceman", "-c", "prealloc -s", str(self.folder)]
            subprocess.run(free, check=True, capture_output=True)
            self.settle()
        return shutil.disk_usage(self.folder).used


@contextlib.contextmanager
def opened(kind: Kind, hypervisor: Hypervisor) -> Iterator[Site]:
    """A site with its guest up and its Triptych ready."""
    with contextlib.ExitStack() as undo:
        file_system = getattr(filesystems, kind.file_system)
        direct = {"direct": True} if kind.written else {}
        folder = undo.enter_context(file_system(kind.room, **direct))
        if kind.written:
            _write_all(folder)
        guest = undo.enter_context(_guest(kind, folder, hypervisor))
        client = undo.enter_context(_triptych(folder, hypervisor))
        site = Site(kind, folder, hypervisor, guest, client)
        site.register(guest.name)
        guest.start()
        yield site


def _write_all(folder: Path) -> None:
    """Write to each free block of the file system, and free it again."""
    block, path = os.urandom(8 * MIB), folder / "ballast"
    with path.open("wb", buffering=0) as file:
        while shutil.disk_usage(folder).free > len(block):
            file.write(block)
        os.fsync(file.fileno())
    path.unlink()
    subprocess.run(["sync", "-f", str(folder)], check=True)


def _guest(kind: Kind, folder: Path, hypervisor: Hypervisor) -> Guest:
    place = folder / "disks"
    place.mkdir()
    paths = [disks.system_disk(place, kind.data * GIB, max(kind.disk * GIB, 1024 * MIB))]
    if kind.pieces:
        paths.append(disks.scattered_disk(place / "scattered.raw", kind.pieces))
    ends = folder / "ticks"
    ends.mkdir()
    shutil.chown(ends, hypervisor.qemu_user)
    device = channel(ends / "end")
    return Guest.create(
        hypervisor,
        place,
        disks=[str(path) for path in paths],
        memory_mib=kind.memory_mib,
        extra_devices=device,
    )


@contextlib.contextmanager
def _triptych(folder: Path, hypervisor: Hypervisor) -> Iterator[httpx.Client]:
    with tempfile.TemporaryDirectory(prefix="triptych-bench-") as state:
        settings = {"TRIPTYCH_LIBVIRT_URI": hypervisor.uri, "TRIPTYCH_VAULT": str(folder / "vault")}
        stack = Stack(Path(state), port=free_port(), settings=settings)
        try:
            stack.start()
            address = f"{stack.url}/v1"
            headers = {"Authorization": f"Bearer {stack.token}"}
            with httpx.Client(base_url=address, headers=headers, timeout=60) as client:
                yield client
        finally:
            stack.stop()
