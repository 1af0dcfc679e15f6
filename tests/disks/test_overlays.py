"""Overlays on a base: what linked clones write to."""

from pathlib import Path

import pytest

from lab import offline
from lab.guest import make_disk
from shared.disks.errors import CopyFailed
from shared.disks.overlays import BASE_PREFIX, base_path, create_overlay


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_an_overlay_holds_what_its_base_does(tmp_path: Path, image_format: str) -> None:
    """Until it is written to; the base never is, and both can be moved together."""
    disk = make_disk(tmp_path, image_format, "data", 16 << 20)
    offline.write_file(disk, "/word", "common")
    base = base_path(tmp_path, "op_1", "vda", image_format)
    assert base.name == f"{BASE_PREFIX}op_1-vda.{image_format}"
    disk.rename(base)
    base.chmod(0o400)
    before = base.read_bytes()
    overlay = tmp_path / "qa-1-vda.qcow2"

    create_overlay(base, image_format, overlay)

    about = offline.info(overlay)
    assert (about["backing-filename"], about["backing-filename-format"]) == (
        base.name,
        image_format,
    )
    assert overlay.stat().st_mode & 0o777 == 0o600
    assert about["virtual-size"] == offline.info(base)["virtual-size"]
    moved = tmp_path.rename(tmp_path.with_name(f"{tmp_path.name}-moved"))
    overlay = moved / overlay.name
    assert offline.read_file(overlay, "/word") == "common"
    offline.write_file(overlay, "/word", "its own")
    assert offline.read_file(overlay, "/word") == "its own"
    assert (moved / base.name).read_bytes() == before


def test_an_overlay_that_cannot_be_made_leaves_nothing(tmp_path: Path) -> None:
    """A base that is gone is said; a file that is there is left alone."""
    with pytest.raises(CopyFailed, match=r"gone\.raw"):
        create_overlay(tmp_path / "gone.raw", "raw", tmp_path / "new.qcow2")
    assert list(tmp_path.iterdir()) == []

    (tmp_path / "theirs.qcow2").write_text("somebody's")
    with pytest.raises(FileExistsError):
        create_overlay(tmp_path / "gone.raw", "raw", tmp_path / "theirs.qcow2")
    assert (tmp_path / "theirs.qcow2").read_text() == "somebody's"
