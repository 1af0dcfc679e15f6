"""Room that others take while a server is being streamed (E6)."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from operations.waiting import wait_for

from lab import filesystems
from lab.guest import Guest
from lab.libvirtd import Hypervisor
from shared.disks import space
from shared.disks.engine import capture
from shared.disks.errors import InsufficientSpace
from shared.hypervisor import undo
from shared.hypervisor.connection import connect
from shared.hypervisor.domains import find_by_name
from shared.hypervisor.watchdog import Watchdog
from shared.vault import Vault

pytestmark = pytest.mark.vm

FLOOR = 0.2


@pytest.fixture
def vault() -> Iterator[Vault]:
    """A vault on a small file system that shares no extents with anything."""
    if not filesystems.can_mount():
        pytest.skip("mounting a loop device needs root")
    with filesystems.ext4(512 * filesystems.MIB) as directory:
        yield Vault(directory / "vault")


@pytest.fixture
def server(hypervisor: Hypervisor, xfs: Path) -> Iterator[Guest]:
    """A server with one disk that takes a moment to copy."""
    disk = xfs / "noise.raw"
    with disk.open("wb") as file, Path("/dev/urandom").open("rb") as noise:
        for _ in range(256):
            file.write(noise.read(filesystems.MIB))
    with Guest.create(hypervisor, xfs / "noisy", disks=[str(disk)]) as made:
        yield made


@pytest.mark.parametrize("power", ["running", "stopped"])
def test_a_stream_leaves_the_floor_free(
    server: Guest, vault: Vault, watchdog: Watchdog, power: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once others have grown past the floor, the copy ends itself: the sentence has the numbers,
    no file and no job is left, the guest runs on, and with room again the next copy is whole."""
    if power == "running":
        server.start(wait=False)
    domain = find_by_name(connect(server.hypervisor.uri), server.name)
    monkeypatch.setattr(space, "LOOK_EVERY_S", 0)
    ballast: list[Path] = []

    def growing() -> bool:
        """Nobody cancels; but as soon as there is something of the copy, others write."""
        copies = list(vault.root.glob("**/vda.*"))
        if not ballast and copies:
            wait_for(lambda: copies[0].stat().st_blocks)
            size = filesystems.size(vault.root)
            ballast.append(filesystems.fill(vault.root, leave=int(size * FLOOR * 0.9)))
        return False

    with pytest.raises(InsufficientSpace) as refusal, vault.begin("image", "srv", "img") as partial:
        capture(domain, partial.path, watchdog=watchdog, free_floor=FLOOR, cancelled=growing)

    assert refusal.value.code == "insufficient_space"
    assert 0 < refusal.value.extra["free_bytes"] < refusal.value.extra["kept_free_bytes"]
    assert vault.partials() == list(vault.copies()) == []
    assert server.state() == power
    assert not undo.abort_backup(domain.uri, domain.uuid)
    ballast[0].unlink()
    with vault.begin("image", "srv", "img") as partial:
        assert capture(domain, partial.path, watchdog=watchdog, free_floor=FLOOR).way == "stream"
