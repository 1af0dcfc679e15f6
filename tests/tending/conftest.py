"""A vault on a file system that shares extents, and the rows of what is in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from operations.spine import (  # noqa: F401
    World,
    any_database,
    database_url,
    environment,
    forget_caches,
    vault_of_its_own,
    world,
)

from lab import filesystems
from shared.copying import Stored
from shared.database import now
from shared.disks import images
from shared.manifest import Kind, Manifest, ManifestDisk, ManifestServer
from shared.models import Server
from shared.vault import Vault


@pytest.fixture(scope="session")
def xfs() -> Iterator[Path]:
    """A small XFS with reflinks."""
    if not filesystems.can_mount():
        pytest.skip("mounting a loop device needs root")
    with filesystems.xfs(filesystems.XFS_MINIMUM) as directory:
        yield directory


@pytest.fixture
def vault(
    world: World,  # noqa: F811
    xfs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Vault:
    """The host's vault, of this test alone."""
    root = xfs / tmp_path.name
    monkeypatch.setenv("TRIPTYCH_VAULT", str(root))
    forget_caches()
    return vault_of_its_own()


class Copies:
    """Whole copies with one disk, made half an hour ago as far as their rows say."""

    def __init__(self, world: World, vault: Vault) -> None:  # noqa: F811
        self.world, self.vault = world, vault

    def image(self, copy_id: str, server: Server, disk: bytes) -> Path:
        """An image with this raw disk, and its row; its folder."""
        return self.image_of(copy_id, server, "raw", lambda path: path.write_bytes(disk))

    def image_of(
        self, copy_id: str, server: Server, image_format: str, write: Callable[[Path], object]
    ) -> Path:
        """The same with a disk that `write(path)` makes."""
        return self.made("image", copy_id, server, image_format, write)

    def snapshot(self, copy_id: str, server: Server, disk: bytes) -> Path:
        """A snapshot with this raw disk, and its row; its folder."""
        return self.made("snapshot", copy_id, server, "raw", lambda path: path.write_bytes(disk))

    def made(
        self,
        kind: Kind,
        copy_id: str,
        server: Server,
        image_format: str,
        write: Callable[[Path], object],
    ) -> Path:
        name = f"vda.{image_format}"
        with self.vault.begin(kind, server.id, copy_id) as partial:
            write(partial.path / name)
            size = (partial.path / name).stat()
            disk = ManifestDisk(
                target="vda",
                file=name,
                format=image_format,
                virtual_bytes=images.virtual_bytes(partial.path / name, image_format) or 0,
                bytes=size.st_blocks * 512,
            )
            manifest = Manifest(
                kind=kind,
                id=copy_id,
                server=ManifestServer(id=server.id, name=server.name, uuid=server.domain_uuid),
                taken_at=now() - timedelta(minutes=30),
                way="reflink",
                consistency="crash",
                disks=[disk],
            )
            folder = partial.publish(manifest, "<domain/>")
        stored = Stored(manifest)
        self.world.add(stored.image_row() if kind == "image" else stored.snapshot_row())
        return folder


@pytest.fixture
def copies(world: World, vault: Vault) -> Copies:  # noqa: F811
    return Copies(world, vault)
