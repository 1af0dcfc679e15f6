"""File systems to copy on: one that shares extents, one that does not."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import filesystems


@pytest.fixture(scope="session")
def xfs() -> Iterator[Path]:
    """A small XFS with reflinks."""
    if not filesystems.can_mount():
        pytest.skip("mounting a loop device needs root")
    with filesystems.xfs(400 * filesystems.MIB) as directory:
        yield directory


@pytest.fixture(scope="session")
def btrfs() -> Iterator[Path]:
    """A small btrfs."""
    if not filesystems.can_mount():
        pytest.skip("mounting a loop device needs root")
    with filesystems.btrfs(200 * filesystems.MIB) as directory:
        yield directory


@pytest.fixture(scope="session")
def ext4() -> Iterator[Path]:
    """A small ext4, which shares no extents."""
    if not filesystems.can_mount():
        pytest.skip("mounting a loop device needs root")
    with filesystems.ext4(64 * filesystems.MIB) as directory:
        yield directory


@pytest.fixture
def on_xfs(xfs: Path, request: pytest.FixtureRequest) -> Path:
    """A directory of this test's own on XFS."""
    directory = xfs / request.node.name.replace("/", "_")
    directory.mkdir()
    return directory
