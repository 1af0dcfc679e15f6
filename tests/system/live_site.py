"""A whole Triptych on one file system: stack, client, guests, what must hold after each test."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import libvirt
from triptych import Client, Problem

from embedded.stack import SERVICES, Stack, free_port
from lab import filesystems, offline
from lab.filesystems import GIB, MIB
from lab.guest import Guest, attach, make_disk
from lab.libvirtd import Hypervisor, scratch
from lab.processes import holder_of

FILE_SYSTEMS = {"xfs": "reflink", "btrfs": "reflink", "ext4": "stream"}
"""Each kind of file system with the way that copies go on it."""
SIZE = 16 * GIB
FOLDERS = {"snapshot": "snapshots", "image": "images"}
MANIFEST = "manifest.json"
SMALL = 16 * MIB
BUSY = 640 * MIB
"""Enough that what QEMU copies is not over as soon as it has begun."""
TICK = "1"
PATIENCE_S = 120
"""For what takes seconds on an idle machine."""


def wait_for(condition: Callable[[], Any], what: str, timeout: float = PATIENCE_S / 2) -> Any:
    """What `condition` gives once that is true; AssertionError after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {timeout:.0f} s"
        time.sleep(0.02)
    return found


@dataclass
class Points:
    """The test's end of `shared.faults`: a directory that the workers look into."""

    directory: Path

    def clear(self) -> None:
        for name in ("passed", "armed", "go"):
            (self.directory / name).unlink(missing_ok=True)

    def passed(self) -> list[str]:
        file = self.directory / "passed"
        return list(dict.fromkeys(file.read_text().split("\n")[:-1])) if file.exists() else []

    def arm(self, *faults: tuple[str, str]) -> None:
        """Faults by their points, one after the other."""
        self.clear()
        fresh = self.directory / "armed.new"
        fresh.write_text(json.dumps(faults))
        fresh.rename(self.directory / "armed")

    @property
    def reached(self) -> bool:
        """Whether all that was armed has happened."""
        return not (self.directory / "armed").exists()

    def go(self) -> None:
        (self.directory / "go").touch()

    @contextlib.contextmanager
    def held(self, ask: Callable[[], Any], *points: str) -> Iterator[Any]:
        """The operation that `ask` gives: meanwhile it waits at these points, each passed in turn
        by the next of its threads. How fast the machine is decides nothing so."""
        self.arm(*((each, "wait") for each in points))
        try:
            operation = ask()
            wait_for(lambda: self.reached, f"{operation['kind']} reaches {points}")
            yield operation
        finally:
            self.go()


@dataclass
class Site:
    """One stack whose vault, and whose guests' disks, lie in `folder`."""

    host: str
    folder: Path
    state: Path
    hypervisor: Hypervisor
    way: str
    settings: dict[str, str] = field(default_factory=dict)
    machines: list[Machine] = field(default_factory=list)
    log_marks: dict[str, int] = field(default_factory=dict)
    shared_noise: Path | None = None

    def start(self) -> None:
        self.disks = self.folder / "disks"
        self.disks.mkdir(mode=0o755)
        self.points = Points(self.state / "faults")
        self.points.directory.mkdir(parents=True)
        self.stack = Stack(
            self.state,
            port=free_port(),
            settings={
                "TRIPTYCH_HOST": self.host,
                "TRIPTYCH_LIBVIRT_URI": self.hypervisor.uri,
                "TRIPTYCH_VAULT": str(self.vault),
                "TRIPTYCH_SWTPM": str(self.hypervisor.swtpm),
                "TRIPTYCH_TICK": TICK,
                "TRIPTYCH_FAULTS": str(self.points.directory),
                # Fewer processes to start; on ext4, where workers die, it is as shipped.
                **({} if self.way == "stream" else {"TRIPTYCH_CONCURRENCY": "1"}),
                **self.settings,
            },
        )
        try:
            self.stack.start()
        except Exception as error:
            error.add_note(self.logs())
            self.stack.stop()
            raise
        self.client = Client(self.stack.url, self.stack.token)

    def stop(self) -> None:
        """End it without waiting for what nobody does any more: seconds, with warm shutdowns."""
        self.client.close()
        for service in ("beat", *SERVICES):
            self.stack.signal(service, signal.SIGKILL)
        self.stack.stop()

    @property
    def vault(self) -> Path:
        return self.folder / "vault"

    def hypervisor_connection(self) -> libvirt.virConnect:
        return libvirt.open(self.hypervisor.uri)

    # Asking

    def done(self, operation: Any, timeout: float = PATIENCE_S) -> dict[str, Any]:
        """Wait for the operation and demand that it succeeded."""
        return dict(self.client.wait(operation["id"], check=True, timeout=timeout))

    def ended(self, operation: Any, timeout: float = PATIENCE_S) -> dict[str, Any]:
        """Wait for the operation, however it ends."""
        return dict(self.client.wait(operation["id"], timeout=timeout))

    def refused(self, operation: Any, timeout: float = PATIENCE_S) -> str:
        """Wait for the operation, demand that it failed, and give the code of its error."""
        ended = self.ended(operation, timeout)
        assert ended["state"] == "failed", ended
        return str(ended["error"]["code"])

    def rows(self, query: str, *values: Any) -> list[sqlite3.Row]:
        """What the database says, past the API."""
        with sqlite3.connect(self.state / "triptych.db", timeout=30) as database:
            database.row_factory = sqlite3.Row
            found = database.execute(query, values).fetchall()
        database.close()
        return found

    # Folders

    def copy_folder(self, kind: str, copy: dict[str, Any]) -> Path:
        return self.vault / FOLDERS[kind] / copy["server"] / copy["id"]

    def copy_of(self, kind: str, machine: Machine) -> Path:
        """The folder of the machine's snapshot or newest image."""
        server = self.client.servers.get(machine.id)
        copy_id = server["snapshot"] if kind == "snapshot" else server["newest_image"]
        assert copy_id, f"{machine.name} has no {kind}"
        return self.vault / FOLDERS[kind] / machine.id / copy_id

    def used_bytes(self) -> int:
        """What is taken up on the file system, shared extents counted once."""
        subprocess.run(["sync", "-f", str(self.folder)], check=True)
        status = os.statvfs(self.folder)
        return (status.f_blocks - status.f_bfree) * status.f_frsize

    # Machines

    def machine(
        self, formats: list[str], power: str, *, noise: int = 0, devices: str = ""
    ) -> Machine:
        """A registered guest: running ones boot, stopped ones have only small data disks.

        `noise` adds a raw disk with that many bytes of it, which takes its time to copy, `devices`
        any XML.
        """
        disks = list(formats)
        if power == "stopped":
            disks = [str(make_disk(self.disks, each, "data", SMALL)) for each in formats]
        if noise:
            disks.append(str(self.noise(noise)))
        guest = Guest.create(
            self.hypervisor, self.disks, disks=disks, nic=True, extra_devices=devices
        )
        if power == "running":
            guest.start(wait=False)
        made = Machine(self, guest, power, self.register(guest), words=len(formats))
        self.machines.append(made)
        return made

    def busy(self, power: str) -> Machine:
        """A server without an operating system and agent, which takes its time to copy.

        All of them have one disk under many names: only one may be in use at a time.
        """
        if self.shared_noise is None:
            self.shared_noise = self.noise(BUSY)
        disk = self.disks / f"busy-{secrets.token_hex(4)}.raw"
        disk.hardlink_to(self.shared_noise)
        guest = Guest.create(self.hypervisor, self.disks, disks=[str(disk)])
        if power == "running":
            guest.start(wait=False)
        return Machine(self, guest, power, self.register(guest), words=0)

    def register(self, guest: Guest) -> str:
        """The id of a new server; asked for again where its host is slow to report the domain."""
        deadline = time.monotonic() + PATIENCE_S / 2
        while True:
            try:
                return str(self.client.servers.add(self.host, guest.name)["id"])
            except Problem as refusal:
                if refusal.code != "domain_not_found" or time.monotonic() > deadline:
                    raise

    def noise(self, size: int) -> Path:
        path = self.disks / f"noise-{secrets.token_hex(4)}.raw"
        chunk = secrets.token_bytes(16 * MIB)
        with path.open("wb") as file:
            for _ in range(size // len(chunk)):
                file.write(chunk)
            os.fsync(file.fileno())  # not while the disk is copied
        return path

    def remove(self, machine: Machine) -> None:
        """End a machine with its definition, disks and what was set aside; its copies stay."""
        machine.guest.remove()
        for row in self.rows("SELECT id FROM operation WHERE server_id = ?", machine.id):
            shutil.rmtree(self.disks / f".triptych-{row['id']}", ignore_errors=True)
        if machine in self.machines:
            self.machines.remove(machine)

    # What must hold

    def assert_tidy(self) -> None:
        """Rows and folders agree, nothing half-made is left, no guest of ours is held."""
        busy = [dict(row) for row in self.rows("SELECT * FROM operation WHERE finished_at IS NULL")]
        assert not busy, f"operations have not ended: {busy}"
        rows = {
            f"{folder}/{row['server_id']}/{row['id']}"
            for kind, folder in FOLDERS.items()
            for row in self.rows(f"SELECT id, server_id FROM {kind} WHERE deleted_at IS NULL")  # noqa: S608
        }
        kinds = (*FOLDERS.values(), "farms")
        folders = {
            str(path.relative_to(self.vault))
            for kind in kinds
            for path in self.vault.glob(f"{kind}/*/*")
        }
        assert rows == folders, f"only in rows {rows - folders}, only in vault {folders - rows}"
        undoable = {
            f".triptych-{row['id']}"
            for row in self.rows("SELECT id FROM operation WHERE undo != 'null'")
        }
        strays = {p.name for p in self.disks.iterdir() if p.name.startswith(".triptych")}
        assert strays - undoable == set(), f"strays beside the disks: {strays - undoable}"
        journal = [dict(row) for row in self.rows("SELECT * FROM journal")]
        assert not journal, f"the journal is not empty: {journal}"
        servers = [row["name"] for row in self.rows("SELECT * FROM server WHERE held_by NOT NULL")]
        assert not servers, f"servers are held by an operation: {servers}"
        held = self.paused()
        assert not held, f"guests are held: {held}"

    def paused(self) -> list[str]:
        """Names of our domains that are paused though their owner did not pause them."""
        ours = []
        for domain in self.hypervisor_connection().listAllDomains():
            try:
                mine = str(self.folder) in domain.XMLDesc()
                if mine and domain.state()[0] == libvirt.VIR_DOMAIN_PAUSED:
                    ours.append(domain.name())
            except libvirt.libvirtError:
                continue  # it is gone by now
        return ours

    # Faults

    def kill_worker(self, service: str) -> None:
        """SIGKILL the service's main process and its children, as `kill -9 -PGID` does."""
        self.stack.signal(service, signal.SIGKILL)
        wait_for(lambda: not self.stack._alive(service), f"{service} is dead")

    def child_of(self, operation: Any) -> int:
        """The pid of the pool child that works on the operation: it holds its owner's file."""
        (row,) = self.rows("SELECT owner FROM operation WHERE id = ?", operation["id"])
        lock = self.vault / ".workers" / row["owner"].replace("/", "~")
        holder = holder_of(lock)
        assert holder, f"nobody holds {lock}"
        return holder

    def mark_logs(self) -> None:
        self.log_marks = {
            log.name: log.stat().st_size for log in (self.state / "log").glob("*.log")
        }

    def logs(self) -> str:
        """What the stack wrote since `mark_logs`."""
        parts = []
        for log in sorted((self.state / "log").glob("*.log")):
            with log.open("rb") as file:
                file.seek(self.log_marks.get(log.name, 0))
                text = file.read()[-12_000:].decode(errors="replace")
            if text:
                parts.append(f"--- {log.name}\n{text}")
        return "\n".join(parts)


class Machine:
    """A server whose data is read from inside (running) or from its disks (stopped)."""

    def __init__(
        self, site: Site, guest: Guest, power: str, server_id: str, words: int | None = None
    ) -> None:
        self.site = site
        self.guest = guest
        self.power = power
        self.id = server_id
        self.words = len(guest.disks) if words is None else words
        """How many disks, from the first, hold a file system to write to."""

    @property
    def name(self) -> str:
        return self.guest.name

    @property
    def disks(self) -> list[Path]:
        return self.guest.disks

    @property
    def places(self) -> list[str]:
        return ["/root/word", "/data/word"][: self.words]

    def write(self, text: str) -> None:
        """Write `text` to every disk."""
        if self.power == "running":
            self.guest.wait_ready()
            for place in self.places:
                self.guest.write(place, text)
        else:
            for disk in self.disks[: self.words]:
                offline.write_file(disk, "/word", text)

    def read(self) -> set[str]:
        """What stands on the disks: one word if all agree."""
        if self.power == "running":
            self.guest.wait_ready()
            return {self.guest.read(place) for place in self.places}
        return {offline.read_file(disk, "/word") for disk in self.disks[: self.words]}

    def state(self) -> str:
        return self.guest.state()


def moment(told: str) -> datetime:
    """What the API tells, to be compared: as a text a full second is later than its parts."""
    return datetime.fromisoformat(told)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in a copy's folder, by name; of the manifest without the digests of
    its disks, and the seal, which come later."""
    found = {path.name: path.read_bytes() for path in _files(folder) if path.name != MANIFEST}
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["seal"]
    for disk in manifest["disks"]:
        del disk["digest"]
    found[MANIFEST] = json.dumps(manifest).encode()
    return {name: hashlib.sha256(data).hexdigest() for name, data in found.items()}


def modes(folder: Path) -> set[str]:
    return {oct(path.stat().st_mode & 0o7777) for path in _files(folder)}


def _files(folder: Path) -> list[Path]:
    """What is in a copy's folder, without a manifest that is about to take the other's place."""
    return [path for path in folder.iterdir() if not path.name.startswith(".")]


@contextlib.contextmanager
def open_site(
    hypervisor: Hypervisor, kind: str, *, size: int = SIZE, host: str = "", **settings: str
) -> Iterator[Site]:
    """A running stack on a new file system of that kind; all of it is gone afterwards."""
    with contextlib.ExitStack() as opened:
        folder = opened.enter_context(getattr(filesystems, kind)(size))
        state = opened.enter_context(scratch())
        site = Site(host or kind, folder, state, hypervisor, FILE_SYSTEMS[kind], settings)
        opened.callback(_remove_domains, site)
        site.start()
        opened.callback(site.stop)
        yield site


def _remove_domains(site: Site) -> None:
    for domain in site.hypervisor_connection().listAllDomains():
        if str(site.folder) in domain.XMLDesc():
            attach(site.hypervisor, domain.name()).remove()
