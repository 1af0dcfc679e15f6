"""A server that is off, and its vault on a file system that can be unmounted: what the workers do,
in this process, on a real libvirt."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from operations.spine import World

from lab import filesystems
from lab.guest import Guest, make_disk
from lab.libvirtd import Hypervisor
from services.cloner import clones  # noqa: F401  registers the handlers
from services.imager import images  # noqa: F401
from services.snapshotter import snapshots  # noqa: F401
from shared import mounted, recovery  # noqa: F401  registers the journal's actions
from shared.commands import Command
from shared.hypervisor.connection import forget
from shared.models import Operation, Server
from shared.operations import runner
from shared.settings import settings

SIZE = 64 * 1024


class Live:
    """A host with a server that is off, and its vault on a file system of its own."""

    def __init__(self, world: World, guest: Guest, disk: Path, device: Path, at: Path) -> None:
        self.world, self.guest, self.disk, self.device, self.root = world, guest, disk, device, at
        self.server = Server(name=guest.name, host="kvm-1", domain_uuid=guest.domain.UUIDString())
        world.add(self.server)

    def mount(self) -> None:
        subprocess.run(["mount", "--bind", self.device, self.root], check=True)

    def unmount(self) -> None:
        filesystems.unmount(self.root)

    def done(self, command: Command) -> Operation:
        operation = self.world.submit(command)
        runner.run(operation)
        return self.world.row(operation)

    def succeeds(self, command: Command) -> dict[str, Any]:
        ended = self.done(command)
        assert ended.state == "succeeded", ended.error
        return ended.result or {}


@pytest.fixture
def live(
    world: World,
    hypervisor: Hypervisor,
    workspace: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Live]:
    if not filesystems.can_mount():
        pytest.skip("mounting a loop device needs root")
    root = workspace / "vault"
    root.mkdir()
    monkeypatch.setenv("TRIPTYCH_LIBVIRT_URI", hypervisor.uri)
    monkeypatch.setenv("TRIPTYCH_VAULT", str(root))
    settings.cache_clear()
    disk = make_disk(workspace, "raw", "blank", SIZE)
    guest = Guest.create(hypervisor, workspace, None, [str(disk)])
    with filesystems.ext4(64 * filesystems.MIB) as device:
        made = Live(world, guest, disk, device, root)
        made.mount()
        mounted.adopt()
        yield made
        made.unmount()
    guest.remove()
    forget(hypervisor.uri)
