"""`make demo`: the main job on a real VM built for it, each claim proven from inside the guest.

Through the real API, Redis, the three workers and the command line. It touches no VM that
it did not make and leaves nothing behind; `--keep` leaves it running instead.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from embedded.stack import ROOT, Stack, free_port
from lab import filesystems
from lab.guest import Guest, attach
from lab.image import image
from lab.libvirtd import Hypervisor, libvirtd

SECRET = "The accounts of 1998\n"  # noqa: S105  what the guest must not lose
PRECIOUS = "/root/accounts.txt"
CLONES = 3

console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)


class ProofFailed(Exception):
    """Something did not turn out as promised."""


def prove(claim: str, holds: bool) -> None:
    if not holds:
        raise ProofFailed(claim)


@dataclass
class Demo:
    hypervisor: Hypervisor
    stack: Stack
    folder: Path
    name: str = field(default_factory=lambda: f"triptych-demo-{secrets.token_hex(3)}")
    steps: list[tuple[str, float, str, str]] = field(default_factory=list)
    guests: list[Guest] = field(default_factory=list)

    def step(self, title: str, work: Callable[[], tuple[str, str] | None]) -> None:
        """Do one step; it returns the way taken and what was proven."""
        started = time.perf_counter()
        with console.status(f"{title} …"):
            way, proof = work() or ("", "")
        seconds = time.perf_counter() - started
        self.steps.append((title, seconds, way, proof))
        console.print(f"  [green]✓[/] {title:<44} {seconds:6.1f} s  {way}")

    def cli(self, *arguments: str) -> Any:
        """The command line as a user has it; raises ProofFailed when it fails."""
        done = subprocess.run(
            [str(Path(sys.executable).with_name("triptych")), "--json", *arguments],
            env={**os.environ, **self.stack.environment},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise ProofFailed(f"triptych {' '.join(arguments)}: {done.stdout}{done.stderr}")
        return json.loads(done.stdout)

    def run(self) -> None:
        self.step("boot a VM built from Debian's kernel", self.boot)
        self.step("register it as a server", self.register)
        self.step("take a snapshot of the running server", self.take_snapshot)
        self.step("break the guest: delete its programs", self.break_guest)
        self.step("revert to the snapshot", self.revert)
        self.step("take an image", self.take_image)
        self.step("destroy the disk: overwrite it with noise", self.damage_disk)
        self.step("restore the image", self.restore)
        self.step(f"make {CLONES} clones and start them", self.clone)
        self.step("write in each clone and in the source", self.isolation)

    # The steps

    def boot(self) -> None:
        self.guest = Guest.create(self.hypervisor, self.folder, self.name, nic=True)
        self.guests.append(self.guest)
        self.guest.start()
        self.guest.write(PRECIOUS, SECRET)

    def register(self) -> tuple[str, str]:
        server = self.cli("server", "add", self.name)
        prove("the server is shown as running", server["state"] == "running")
        return "", f"server {server['id']}, {server['vcpus']} vCPU"

    def take_snapshot(self) -> tuple[str, str]:
        operation = self.cli("snapshot", "take", self.name)
        prove("the guest runs on after the snapshot", self.guest.state() == "running")
        snapshot = self.cli("snapshot", "show", self.name)
        return _way(operation), f"{snapshot['consistency']}-consistent; {_pause(snapshot)}"

    def break_guest(self) -> tuple[str, str]:
        self.guest.run(f"rm -rf {PRECIOUS} /etc /sbin /usr/bin; sync")
        self.guest.run("rm -rf /bin; sync")
        try:
            broken = self.guest.run("ls /")[0] != 0
        except Exception:
            broken = True
        prove("the guest is broken", broken)
        return "", "no program starts in it any more"

    def revert(self) -> tuple[str, str]:
        operation = self.cli("snapshot", "revert", self.name, "--yes")
        prove("the server runs again after the revert", self.guest.state() == "running")
        self.guest.wait_ready()
        prove("the break is gone, seen from inside", self.guest.read(PRECIOUS) == SECRET)
        return _way(operation), "the file reads as before, inside the guest"

    def take_image(self) -> tuple[str, str]:
        operation = self.cli("image", "create", self.name, "--name", "before-the-disaster")
        self.image = operation["result"]["image"]
        prove("the guest runs on after the image", self.guest.state() == "running")
        return _way(operation), _pause(self.cli("image", "show", self.image))

    def damage_disk(self) -> tuple[str, str]:
        self.guest.destroy()
        disk = self.guest.disks[0]
        with disk.open("r+b") as file:
            file.write(secrets.token_bytes(4 * 2**20))
        check = subprocess.run(["qemu-img", "check", str(disk)], capture_output=True)
        prove("the disk is beyond use", check.returncode != 0)
        return "", "qemu-img cannot open it"

    def restore(self) -> tuple[str, str]:
        operation = self.cli("image", "restore", self.image, "--yes")
        prove("a stopped server is stopped after a restore", self.guest.state() == "stopped")
        self.guest.start()
        prove("the data is back, seen from inside", self.guest.read(PRECIOUS) == SECRET)
        return _way(operation), "it boots and the file reads as before"

    def clone(self) -> tuple[str, str]:
        pattern = f"{self.name}-clone-{{n}}"
        operation = self.cli(
            "clone", "create", self.name, "--count", str(CLONES), "--name", pattern
        )
        made = operation["result"]["clones"]
        self.guests += [attach(self.hypervisor, each["name"]) for each in made]
        prove(f"{CLONES} clones are ready", [each["state"] for each in made] == ["ready"] * CLONES)
        for guest in self.guests[1:]:
            guest.wait_ready(timeout=120)
        uuids = [_inside(g, "cat /sys/class/dmi/id/product_uuid") for g in self.guests]
        macs = [_inside(g, "cat /sys/class/net/eth0/address") for g in self.guests]
        prove("each VM sees a UUID of its own", len(set(uuids)) == len(self.guests))
        prove("each VM sees a MAC address of its own", len(set(macs)) == len(self.guests))
        ways = sorted({each["way"] for each in made})
        return ", ".join(ways), "own name, UUID and MAC, seen from inside"

    def isolation(self) -> tuple[str, str]:
        for guest in self.guests:
            guest.write("/root/mine.txt", guest.name)
        for guest in self.guests:
            prove(f"{guest.name} has its own file", guest.read("/root/mine.txt") == guest.name)
            prove(f"{guest.name} has the source's data", guest.read(PRECIOUS) == SECRET)
        disks = [disk for guest in self.guests for disk in guest.disks]
        prove("no two VMs share a disk", len(set(disks)) == len(disks))
        for disk in disks:
            prove(f"{disk.name} stands alone", "backing-filename" not in _info(disk))
        return "", "each reads back its own; no disk depends on another"

    # The end

    def report(self) -> None:
        table = Table(title=f"Triptych on {self.name}", title_justify="left")
        for title, justify in (("step", "left"), ("time", "right"), ("way", "left")):
            table.add_column(title, justify=justify, no_wrap=True)  # type: ignore[arg-type]
        table.add_column("proven")
        for title, seconds, way, proof in self.steps:
            table.add_row(title, f"{seconds:.1f} s", way, proof)
        console.print(table)

    def remove(self) -> None:
        for guest in self.guests:
            guest.remove()


def _way(operation: dict[str, Any]) -> str:
    return str(operation["result"].get("way", ""))


def _pause(copy: dict[str, Any]) -> str:
    ms = copy["pause_ms"]
    return "the guest was not paused" if not ms else f"the guest was paused for {ms:.0f} ms"


def _inside(guest: Guest, command: str) -> str:
    status, output = guest.run(command)
    prove(f"{guest.name} answers {command!r}", status == 0)
    return output.strip()


def _info(disk: Path) -> dict[str, Any]:
    done = subprocess.run(
        ["qemu-img", "info", "-U", "--output=json", str(disk)], capture_output=True, check=True
    )
    information: dict[str, Any] = json.loads(done.stdout)
    return information


@contextlib.contextmanager
def storage() -> Iterator[Path]:
    """A reflink file system where one may be mounted, else a plain directory."""
    if filesystems.can_mount() and shutil.which("mkfs.xfs"):
        with filesystems.xfs(4 * 2**30) as folder:
            yield folder
        return
    folder = Path(tempfile.mkdtemp(prefix="triptych-demo-", dir="/var/tmp"))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@contextlib.contextmanager
def stack(state: Path, hypervisor: Hypervisor, vault: Path) -> Iterator[Stack]:
    made = Stack(
        state,
        port=free_port(),
        settings={
            "TRIPTYCH_HOST": "demo",
            "TRIPTYCH_LIBVIRT_URI": hypervisor.uri,
            "TRIPTYCH_VAULT": str(vault),
        },
    )
    try:
        made.start()
        yield made
    finally:
        made.stop()


def main() -> int:
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--keep", action="store_true", help="leave it running at the end")
    if parser.parse_args().keep:
        return _kept()
    return show()


def _kept() -> int:
    """Run the demo in a process that stays behind, and return when it is done showing."""
    done, told = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(done)
        os.setsid()
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        return show(stay=lambda: (os.write(told, b"."), os.close(told), signal.pause()))
    os.close(told)
    if os.read(done, 1):
        console.print(f"  stop it   kill {child}\n")
        return 0
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def show(stay: Callable[[], object] | None = None) -> int:
    """Set everything up, do the job, take everything down; returns the exit status."""
    began = time.perf_counter()
    with contextlib.ExitStack() as undo:
        with console.status("building the guest (once; later runs have it) …"):
            image()
        hypervisor = undo.enter_context(libvirtd())
        folder = undo.enter_context(storage())
        state = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="triptych-demo-")))
        with console.status("starting Redis, API, workers and beat …"):
            running = undo.enter_context(stack(state, hypervisor, folder / "vault"))
        demo = Demo(hypervisor, running, folder / "disks")
        undo.callback(demo.remove)
        try:
            demo.run()
        except Exception as error:
            demo.report()
            console.print(f"[red]✗ {type(error).__name__}: {error}[/]")
            _show_logs(state)
            return 1
        demo.report()
        console.print(f"All proven in {time.perf_counter() - began:.0f} s.")
        if stay:
            _greet(demo, running, state)
            stay()
    return 0


def _greet(demo: Demo, running: Stack, state: Path) -> None:
    console.print(
        f"\nStill running:\n"
        f"  API       {running.url} (documentation: {running.url}/docs)\n"
        f"  client    . {state}/env && {ROOT}/.venv/bin/triptych server show {demo.name}\n"
        f"  libvirt   virsh -c '{demo.hypervisor.uri}' list\n"
        f"  vault     {running.environment['TRIPTYCH_VAULT']}"
    )


def _show_logs(state: Path) -> None:
    for log in sorted((state / "log").glob("*.log")):
        lines = log.read_text(errors="replace").splitlines()[-5:]
        console.print(f"[dim]{log.name}[/]")
        console.print(*lines, sep="\n", markup=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
