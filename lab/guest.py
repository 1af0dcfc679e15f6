"""Owns lab guests: small real virtual machines, made, driven through their agent, and removed.

A guest's own files stand in the directory it was made in. Its kernel and initramfs are shared
by all guests of a hypervisor and live in the hypervisor's state directory, so that a clone of a
guest stands on nothing that goes away with the guest.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import secrets
import shlex
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.sax.saxutils import escape

import libvirt
import libvirt_qemu

from lab.image import DATA_SIZE, ROOT_SIZE, Image, image, make_ext4
from lab.libvirtd import Hypervisor, check_reachable, connect

PREFIX = "triptych-lab-"
STATES = {
    libvirt.VIR_DOMAIN_RUNNING: "running",
    libvirt.VIR_DOMAIN_PAUSED: "paused",
    libvirt.VIR_DOMAIN_SHUTOFF: "stopped",
}
_UNDEFINE = (
    libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
    | libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
    | libvirt.VIR_DOMAIN_UNDEFINE_NVRAM
    | libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA
    | libvirt.VIR_DOMAIN_UNDEFINE_TPM
)

_DOMAIN = """\
<domain type='qemu'>
  <name>{name}</name>
  <memory unit='MiB'>{memory_mib}</memory>
  <vcpu>{vcpus}</vcpu>
  <os>
    <type arch='x86_64' machine='{machine}'>hvm</type>
    <kernel>{kernel}</kernel>
    <initrd>{initrd}</initrd>
    <cmdline>{cmdline}</cmdline>
  </os>
  <features><acpi/></features>
  <on_reboot>restart</on_reboot>
  <devices>
{devices}
    <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
    <serial type='pty'><log file='{console}' append='on'/></serial>
    <controller type='virtio-serial' index='0'>{at_serial}</controller>
    <controller type='usb' model='none'/>
    <controller type='pci' index='1' model='pcie-root-port'/>
    <memballoon model='none'/>
  </devices>
</domain>
"""
_DISK = """\
    <disk type='file' device='disk'>
      <driver name='qemu' type='{format}' discard='unmap'/>
      <source file='{path}'/>
      <target dev='vd{letter}' bus='virtio'/>
      {at}
    </disk>"""
# On the root bus itself: a port for each, as libvirt would have it, costs a boot a tenth of its
# time. The one port is free for what a test plugs in.
_AT = "<address type='pci' domain='0' bus='0' slot='{slot}' function='0'/>"
_SLOT_NIC = 8
_SLOT_SERIAL = 9
_SLOT_DISKS = 10
# After the first five, what is left out costs an emulated boot the most: tests of ciphers that
# nobody uses here, patching of locks for one CPU, zeroing of each page that is about to be filled.
_CMDLINE = (
    "console=ttyS0 quiet panic=1 mitigations=off no_timer_check "
    "cryptomgr.notests noreplace-smp init_on_alloc=0"
)


_AGENT_LOST = "agent is not available due to an error"
"""Seen once in some 150 times that a QEMU was killed and its guest started at once: libvirt 9.0
took the end of the old one's connection for that of the new one's, until the next boot."""


class GuestNotReady(TimeoutError):
    """The guest's agent did not answer in time; the message ends with its console."""


def make_disk(
    directory: Path,
    fmt: str = "qcow2",
    role: str = "root",
    size: int | None = None,
    name: str | None = None,
) -> Path:
    """Make a disk in `directory` and return its path.

    `role` is "root" (boots), "data" (an empty ext4) or "blank" (zeros); `fmt` "qcow2" or "raw";
    `size` in bytes, 128 MiB at least for a root disk.
    """
    target = directory / (name or f"{role}-{secrets.token_hex(3)}.{fmt}")
    raw = target.with_name(f".{target.name}.partial")
    if role == "root":
        size = max(size or ROOT_SIZE, ROOT_SIZE)
        _run("cp", "--sparse=always", "--reflink=auto", str(image().root), str(raw))
        os.truncate(raw, size)
    elif role == "data":
        make_ext4(raw, size or DATA_SIZE)
    else:
        raw.touch()
        os.truncate(raw, size or DATA_SIZE)
    if fmt == "raw":
        raw.rename(target)
    else:
        _run("qemu-img", "convert", "-f", "raw", "-O", fmt, str(raw), str(target))
        raw.unlink()
    return target


class Guest:
    """One virtual machine of the lab: its own, or one that the code under test made."""

    def __init__(self, hypervisor: Hypervisor, name: str, directory: Path | None = None) -> None:
        self.hypervisor = hypervisor
        self.name = name
        self.directory = directory
        self._connection = connect(hypervisor.uri)

    @classmethod
    def create(
        cls,
        hypervisor: Hypervisor,
        directory: Path,
        name: str | None = None,
        disks: list[str] | None = None,
        *,
        vcpus: int = 1,
        memory_mib: int = 192,
        nic: bool = False,
        graphics: bool = False,
        machine: str = "q35",
        extra_devices: str = "",
        boot: Image | None = None,
    ) -> Guest:
        """Define a guest in `directory`, not started.

        `disks` are formats or paths: the first is the root, the second shows up at /data, the
        third at /data2. `nic` adds a virtio NIC on QEMU's own user network, `graphics` a VNC
        display, `extra_devices` any XML, `boot` another kernel and initramfs than the lab's own.
        Raises ValueError if QEMU's user cannot get to `directory`.
        """
        name = name or f"{PREFIX}{secrets.token_hex(4)}"
        directory.mkdir(parents=True, exist_ok=True)
        check_reachable(directory, hypervisor.qemu_user)
        devices = [
            _DISK.format(
                format=fmt,
                path=escape(str(path)),
                letter="abcdefgh"[index],
                at=_AT.format(slot=_SLOT_DISKS + index),
            )
            for index, (fmt, path) in enumerate(_disks(directory, name, disks or ["qcow2"]))
        ]
        if nic:
            at = _AT.format(slot=_SLOT_NIC)
            devices.append(f"    <interface type='user'><model type='virtio'/>{at}</interface>")
        if graphics:
            devices.append("    <graphics type='vnc' port='-1' autoport='yes'/>")
        files = _boot_files(hypervisor, boot or image())
        xml = _DOMAIN.format(
            name=escape(name),
            memory_mib=memory_mib,
            vcpus=vcpus,
            machine=machine,
            kernel=escape(str(files.kernel)),
            initrd=escape(str(files.initrd)),
            cmdline=_CMDLINE,
            at_serial=_AT.format(slot=_SLOT_SERIAL),
            devices="\n".join([*devices, extra_devices]),
            console=escape(str(directory / f"{name}.console.log")),
        )
        guest = cls(hypervisor, name, directory)
        guest.connection.defineXML(xml)
        return guest

    @property
    def connection(self) -> libvirt.virConnect:
        """A connection that is alive, also after libvirtd was started again."""
        try:
            self._connection.getLibVersion()  # isAlive() needs an event loop to know
        except libvirt.libvirtError:
            self._connection = connect(self.hypervisor.uri)
        return self._connection

    @property
    def domain(self) -> libvirt.virDomain:
        """The libvirt domain; raises libvirtError if it is gone."""
        return self.connection.lookupByName(self.name)

    @property
    def xml(self) -> ElementTree.Element:
        """The definition that the next start will use."""
        text = self.domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
        return ElementTree.fromstring(text)  # noqa: S314

    @property
    def disks(self) -> list[Path]:
        """The files of its disks as defined, in order."""
        sources = self.xml.iterfind("./devices/disk[@device='disk']/source[@file]")
        return [Path(source.attrib["file"]) for source in sources]

    @property
    def console(self) -> str:
        """What it wrote to its serial console."""
        log = self.xml.find("./devices/serial/log")
        path = Path(log.attrib["file"]) if log is not None else None
        return path.read_text(errors="replace") if path and path.exists() else ""

    def state(self) -> str:
        """`running`, `paused` or `stopped` (or libvirt's number); `missing` if not defined.

        One that has just powered off is `stopped` once QEMU is gone, which is waited for.
        """
        deadline = time.monotonic() + 30
        try:
            while (number := self.domain.state()[0]) == libvirt.VIR_DOMAIN_SHUTDOWN:
                if time.monotonic() > deadline:
                    break
                time.sleep(0.02)
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                return "missing"
            raise
        return STATES.get(number, str(number))

    def start(self, *, wait: bool = True) -> Guest:
        """Start it and, unless told otherwise, wait for its agent."""
        self.domain.create()
        return self.wait_ready() if wait else self

    def wait_ready(self, timeout: float = 120) -> Guest:
        """Return once its agent answers; raise GuestNotReady after `timeout` seconds.

        One whose agent libvirt has lost for good is booted again.
        """
        deadline = time.monotonic() + timeout
        while True:
            try:
                self.agent("guest-ping", timeout=2)
                return self
            except libvirt.libvirtError as error:
                if _AGENT_LOST in str(error):
                    self._boot_anew()
                if time.monotonic() > deadline:
                    tail = self.console[-2000:]
                    raise GuestNotReady(f"{self.name} ({self.state()}): {error}\n{tail}") from None
            time.sleep(0.05)

    def _boot_anew(self) -> None:
        """Again, where libvirt takes the old QEMU's end for that of the new one."""
        for last in (False, False, True):
            self.destroy()
            try:
                self.domain.create()
                return
            except libvirt.libvirtError:
                if last:
                    raise
                time.sleep(1)

    def wait_state(self, state: str, timeout: float = 60) -> None:
        """Return once it is in `state`; raise TimeoutError after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while (now := self.state()) != state:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.name} is {now}, not {state}")
            time.sleep(0.05)

    def agent(self, command: str, timeout: int = 10, **arguments: Any) -> Any:
        """Send `command` to its agent and return the answer, once a copy has thawed the guest."""
        request: dict[str, Any] = {"execute": command}
        if arguments:
            request["arguments"] = {k.replace("_", "-"): v for k, v in arguments.items()}
        deadline = time.monotonic() + timeout
        while True:
            try:
                answer = libvirt_qemu.qemuAgentCommand(self.domain, json.dumps(request), timeout, 0)
                return json.loads(answer)["return"]
            except libvirt.libvirtError as error:
                if "not allowed" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    def run(self, command: str, timeout: float = 60) -> tuple[int, str]:
        """Run a shell command inside; return its exit status and what it printed."""
        started = self.agent(
            "guest-exec", path="/bin/sh", arg=["-c", f"{{ {command}\n}} 2>&1"], capture_output=True
        )
        deadline = time.monotonic() + timeout
        pause = 0.01
        while not (status := self.agent("guest-exec-status", pid=started["pid"]))["exited"]:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.name} still runs {command!r}")
            time.sleep(pause)
            pause = min(pause * 2, 0.2)
        output = base64.b64decode(status.get("out-data", "")).decode(errors="replace")
        return status.get("exitcode", 128 + status.get("signal", 0)), output

    def read(self, path: str) -> str:
        """The text of a file inside; raises FileNotFoundError."""
        status, output = self.run(f"cat {shlex.quote(path)}")
        if status:
            raise FileNotFoundError(f"{self.name}: {output.strip()}")
        return output

    def write(self, path: str, text: str) -> None:
        """Write a file inside (up to some 60 KiB), down to its disk."""
        content = base64.b64encode(text.encode()).decode()
        place = shlex.quote(path)
        status, output = self.run(f"echo {content} | base64 -d > {place} && sync {place}")
        if status:
            raise OSError(f"{self.name}: {output.strip()}")

    def shutdown(self, timeout: float = 60) -> None:
        """Ask its agent to power it off, and wait until it is."""
        with contextlib.suppress(libvirt.libvirtError):  # some agents are gone before they answer
            self.domain.shutdownFlags(libvirt.VIR_DOMAIN_SHUTDOWN_GUEST_AGENT)
        self.wait_state("stopped", timeout)

    def destroy(self) -> None:
        """Cut its power, if it has any."""
        with contextlib.suppress(libvirt.libvirtError):
            self.domain.destroy()

    def remove(self) -> None:
        """Cut its power, forget its definition, delete its disks and its console log."""
        if self.state() == "missing":
            return
        self.destroy()
        files = self.disks
        if (log := self.xml.find("./devices/serial/log")) is not None:
            files.append(Path(log.attrib["file"]))
        self.domain.undefineFlags(_UNDEFINE)
        for path in files:
            path.unlink(missing_ok=True)

    def __enter__(self) -> Guest:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()
        self._connection.close()


def attach(hypervisor: Hypervisor, domain_name: str) -> Guest:
    """Take hold of a domain that the code under test made: a clone, say."""
    return Guest(hypervisor, domain_name)


def _disks(directory: Path, name: str, wanted: list[str]) -> list[tuple[str, Path]]:
    made: list[tuple[str, Path]] = []
    for index, item in enumerate(wanted):
        if item in ("qcow2", "raw"):
            role = "data" if index else "root"
            file_name = f"{name}-vd{'abcdefgh'[index]}.{item}"
            made.append((item, make_disk(directory, item, role, name=file_name)))
        else:
            done = _run("qemu-img", "info", "--output=json", item)
            made.append((json.loads(done)["format"], Path(item)))
    return made


def _boot_files(hypervisor: Hypervisor, cached: Image) -> Image:
    """The kernel and initramfs, copied to where QEMU's user and every clone can read them."""
    home = hypervisor.state_dir / "boot" / cached.kernel.parent.name
    if not home.exists():
        partial = home.with_name(f"{home.name}.{secrets.token_hex(4)}")
        partial.mkdir(parents=True)
        for path in (cached.kernel, cached.initrd):
            shutil.copy(path, partial / path.name)
        with contextlib.suppress(OSError):  # another process was first
            partial.rename(home)
    check_reachable(home, hypervisor.qemu_user)
    return Image(home / "kernel", home / "initrd", cached.root, cached.versions)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
