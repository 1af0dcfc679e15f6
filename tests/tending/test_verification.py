"""A flipped byte anywhere in an image is found and named, also by its first verification."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from operations.spine import World
from operations.waiting import wait_for
from tending.conftest import Copies

from lab.filesystems import MIB
from services.imager import images, verification
from shared import recovery  # noqa: F401  registers the journal's actions
from shared.commands import PromoteSnapshot, VerifyImage
from shared.database import reading
from shared.disks.errors import CopyFailed
from shared.manifest import Manifest, ManifestUnreadable, read_manifest
from shared.models import Image
from shared.operations.runner import run
from shared.settings import settings
from shared.tending.digester import Digester


@pytest.fixture(autouse=True)
def imager(world: World) -> None:
    world.handler(verification.verify, VerifyImage.kind)


@pytest.fixture
def folder(world: World, copies: Copies) -> Path:
    """A qcow2 image that was never verified, some seconds after it was made."""

    def write(path: Path) -> None:
        raw = path.with_name("raw")
        raw.write_bytes(os.urandom(MIB))
        command = ["qemu-img", "convert", "-O", "qcow2", str(raw), str(path)]
        subprocess.run(command, check=True)
        raw.unlink()

    made = copies.image_of("img_1", world.server(), "qcow2", write)
    Digester("image").turn()
    return made


def flip(path: Path, place: int) -> None:
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ 0x10]))


def verified(world: World, image: str = "img_1") -> dict[str, Any]:
    operation = world.submit(VerifyImage(image=image))
    run(operation)
    row = world.row(operation)
    assert row.state == "succeeded", row.error
    assert row.result
    return row.result


def state() -> tuple[str, str | None]:
    with reading() as session:
        image = session.get_one(Image, "img_1")
        return image.state, image.verified_result


def test_a_whole_image_passes(world: World, folder: Path) -> None:
    """And its manifest is as the background left it."""
    before = (folder / "manifest.json").stat().st_ino
    assert verified(world)["faults"] == []
    assert state() == ("complete", "passed")
    assert (folder / "manifest.json").stat().st_ino == before


@pytest.mark.parametrize(
    ("name", "place"),
    [
        pytest.param("vda.qcow2", -1000, id="data"),
        pytest.param("vda.qcow2", 3, id="magic"),
        pytest.param("vda.qcow2", 90, id="header"),
        pytest.param("vda.qcow2", 65536 * 2 + 1, id="refcounts"),
        pytest.param("vda.qcow2", 65536 * 3 + 3, id="tables"),
        pytest.param("manifest.json", 40, id="manifest"),
        pytest.param("manifest.json", -10, id="seal"),
        pytest.param("domain.xml", 3, id="definition"),
        pytest.param("RESTORE.md", 30, id="notes"),
    ],
)
def test_a_flipped_byte(world: World, folder: Path, name: str, place: int) -> None:
    """In data, in qcow2's own structures, in the manifest and what stands beside it."""
    path = folder / name
    flip(path, place % path.stat().st_size)
    assert [fault["file"] for fault in verified(world)["faults"]] == [name]
    assert state() == ("damaged", "damaged")


def test_a_lost_file(world: World, folder: Path) -> None:
    """It is named as well."""
    (folder / "domain.xml").unlink()
    (fault,) = verified(world)["faults"]
    assert (fault["file"], "No such file" in fault["fault"]) == ("domain.xml", True)


def test_a_disk_that_was_cut_short(world: World, copies: Copies) -> None:
    """By a copy of the vault that ran out of room, before its digest was known: what is left does
    not count as what was stored, now or later."""
    folder = copies.image("img_1", world.server(), os.urandom(MIB))
    disk = folder / "vda.raw"
    disk.chmod(0o600)
    os.truncate(disk, MIB // 2)

    Digester("image").turn()
    (fault,) = verified(world)["faults"]

    told = f"it has {MIB // 2} bytes, the manifest says {MIB} bytes"
    assert fault == {"file": "vda.raw", "fault": told}
    assert read_manifest(folder).digest_of("vda.raw") is None


def test_the_files_of_another_image(world: World, copies: Copies) -> None:
    """Put back under the wrong name they are whole, and not this image's: nothing uses them."""
    server = world.server()
    folder = copies.image("img_1", server, os.urandom(MIB))
    shutil.copytree(copies.image("img_2", server, os.urandom(MIB)), folder.with_name("img_3"))
    shutil.rmtree(folder)
    folder.with_name("img_3").rename(folder)

    (fault,) = verified(world)["faults"]

    assert fault == {"file": "manifest.json", "fault": "it is that of image img_2"}
    with pytest.raises(ManifestUnreadable, match="image img_2"):
        copies.vault.manifest(folder)


@pytest.mark.parametrize("name", ["domain.xml", "RESTORE.md"])
def test_a_copy_is_used_if_what_is_beside_its_disks_is_what_it_was(
    copies: Copies, folder: Path, name: str
) -> None:
    """A definition that rotted is neither defined nor made part of another copy."""
    flip(folder / name, 3)
    if name == "domain.xml":
        with pytest.raises(ManifestUnreadable, match="not what was stored"):
            copies.vault.manifest(folder)
    else:  # which is for people
        assert copies.vault.manifest(folder).id == "img_1"


def test_a_check_that_came_to_no_end_condemns_nothing(
    world: World, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The verification fails, as such; who is told that his image is damaged might delete it."""

    def killed(*_given: object) -> None:
        raise CopyFailed("qemu-img check of vda.qcow2 was killed before it came to an end.")

    monkeypatch.setattr(verification.disk_images, "check_by_qemu", killed)
    operation = world.submit(VerifyImage(image="img_1"))
    run(operation)
    row = world.row(operation)
    assert (row.state, (row.error or {})["code"]) == ("failed", "copy_failed")
    assert state() == ("complete", None)


def test_both_at_once(world: World, copies: Copies, monkeypatch: pytest.MonkeyPatch) -> None:
    """A verification beside the background writes no other digest, and passes."""
    folder = copies.image("img_1", world.server(), os.urandom(8 * MIB))
    monkeypatch.setattr("shared.tending.tender.EVERY_S", 0.02)
    thread = Digester("image")
    thread.start()
    try:
        assert verified(world)["faults"] == []
        wait_for(lambda: read_manifest(folder).digest_of("vda.raw"))
    finally:
        thread.stop()
        thread.join(60)
    assert verified(world)["faults"] == []


def test_a_flip_between_two_readings(
    world: World, copies: Copies, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the background has written meanwhile is what the verification is held against."""
    folder = copies.image("img_1", world.server(), os.urandom(MIB))
    real = verification.digest

    def beaten(path: Path, *given: Any) -> str:
        Digester("image").turn()
        if path.name == "vda.raw":
            flip(path, 1000)
        return real(path, *given)

    monkeypatch.setattr(verification, "digest", beaten)
    assert [fault["file"] for fault in verified(world)["faults"]] == ["vda.raw"]
    assert folder.is_dir()


@pytest.mark.parametrize("way", ["reflink", "stream"])
def test_a_promoted_snapshot_passes(
    world: World, copies: Copies, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where its blocks are shared the image has the snapshot's digest; where qemu-img wrote the
    same disk into another file, one of its own, later."""
    if way == "stream":
        monkeypatch.setattr("shared.disks.materialise.can_reflink", lambda *_: False)
    world.handler(images.promote, PromoteSnapshot.kind)
    server = world.server()
    snapshot = copies.snapshot("snp_1", server, os.urandom(MIB))
    Digester("snapshot").turn()
    operation = world.submit(PromoteSnapshot(server=server.id, name="golden"))
    run(operation)
    result = world.row(operation).result
    assert result, world.row(operation).error
    image = copies.vault.folder("image", server.id, result["image"])
    known = {read_manifest(each).digest_of("vda.raw") for each in (snapshot, image)}
    assert (len(known) == 1, None in known) == (way == "reflink", way == "stream")
    assert verified(world, result["image"])["faults"] == []


def test_an_image_that_went_with_its_mount_is_not_missing(
    world: World, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mount goes in the middle of a verification, which then says nothing of the image."""
    root, real = settings().vault, verification.read_manifest

    def lost(path: Path) -> Manifest:
        manifest = real(path)
        root.rename(root.with_name("mounted"))
        root.mkdir()
        return manifest

    monkeypatch.setattr(verification, "read_manifest", lost)
    operation = world.submit(VerifyImage(image="img_1"))
    run(operation)
    root.rmdir()
    root.with_name("mounted").rename(root)

    row = world.row(operation)
    assert (row.state, (row.error or {})["code"]) == ("failed", "vault_not_mounted")
    with reading() as session:
        image = session.get_one(Image, "img_1")
    assert (image.state, image.verified_at) == ("complete", None)
