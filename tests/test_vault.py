"""The vault: whole folders only, readable by people, removed without a trace."""

import contextlib
import json
import subprocess
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import pytest
from blake3 import blake3
from operations.spine import at_once

from shared.manifest import (
    Manifest,
    ManifestDisk,
    ManifestLeftOut,
    ManifestServer,
    ManifestUnreadable,
    VaultError,
    read_manifest,
    write_manifest,
)
from shared.vault import CopyExists, Vault


@pytest.fixture
def vault(tmp_path: Path) -> Vault:
    """An empty vault."""
    return Vault(tmp_path / "vault")


def manifest(copy_id: str = "img1", **changes: object) -> Manifest:
    """An image's manifest with one disk."""
    fields = {
        "kind": "image",
        "id": copy_id,
        "server": ManifestServer(id="srv1", name="web1", uuid="1-2-3"),
        "taken_at": datetime(2026, 3, 1, 4, 5, 6, tzinfo=UTC),
        "way": "stream",
        "consistency": "crash",
        "disks": [
            ManifestDisk(target="vda", file="vda.qcow2", format="qcow2", virtual_bytes=10, bytes=4)
        ],
        "left_out": [ManifestLeftOut(target="sda", reason="a CD-ROM is not copied")],
        **changes,
    }
    return Manifest.model_validate(fields)


def publish(vault: Vault, copy_id: str = "img1") -> Path:
    """A whole image in the vault."""
    with vault.begin("image", "srv1", copy_id) as partial:
        (partial.path / "vda.qcow2").write_text("disk")
        return partial.publish(manifest(copy_id), "<domain/>")


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_a_published_copy_is_whole_sealed_and_explains_itself(vault: Vault) -> None:
    """Folder 0700, files 0400, and manifest, definition and notes beside the disks."""
    folder = publish(vault)
    assert folder == vault.root / "images" / "srv1" / "img1"
    assert mode(folder) == 0o700
    assert {path.name: mode(path) for path in folder.iterdir()} == dict.fromkeys(
        ["RESTORE.md", "domain.xml", "manifest.json", "vda.qcow2"], 0o400
    )
    assert read_manifest(folder).without_digests() == manifest(sealed=True)
    notes = (folder / "RESTORE.md").read_text()
    for words in (
        "b3sum vda.qcow2",
        "virsh define domain.xml",
        "virsh start --force-boot web1",
        "vda.qcow2",
        "web1",
        "a CD-ROM is not copied",
    ):
        assert words in notes


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ("qcow2", "cp --sparse=always --reflink=auto vda.qcow2 THE-PATH-OF-VDA"),
        ("raw", "qemu-img convert -f qcow2 -O raw vda.qcow2 THE-PATH-OF-VDA"),
    ],
)
def test_notes_say_how_a_disk_gets_its_own_format(vault: Vault, own: str, said: str) -> None:
    """A raw disk that was streamed is a qcow2, and its guest would find the wrapping on it."""
    definition = (
        "<domain type='qemu'><name>web1</name><uuid>5fff5a09-9f9a-4651-859f-ca28d3775a66</uuid>"
        f"<memory>1</memory><devices><disk type='file' device='disk'><driver type='{own}'/>"
        "<source file='/srv/web1'/><target dev='vda'/></disk></devices></domain>"
    )
    with vault.begin("image", "srv1", "img1") as partial:
        (partial.path / "vda.qcow2").write_text("disk")
        folder = partial.publish(manifest("img1"), definition)
    assert f"    {said}\n" in (folder / "RESTORE.md").read_text()


def test_directories_above_can_be_walked_by_qemu(vault: Vault) -> None:
    """QEMU's own user can reach a copy in the making, and list nothing."""
    partial = vault.begin("image", "srv1", "img1")
    for path in (vault.root, vault.root / "images", partial.path.parent, partial.path):
        assert mode(path) == 0o711


def test_nothing_is_left_of_a_copy_that_failed(vault: Vault) -> None:
    """An error inside leaves neither a copy nor a partial one."""
    with (
        pytest.raises(RuntimeError, match="disk full"),
        vault.begin("image", "srv1", "img1") as partial,
    ):
        (partial.path / "vda.qcow2").write_text("half")
        raise RuntimeError("disk full")
    assert not list(vault.copies())
    assert vault.partials() == []


def test_a_dead_workers_partial_is_found_and_never_counts(vault: Vault) -> None:
    """A folder left by a crash is listed as partial, is no copy, and gives way to a new try."""
    left = vault.begin("image", "srv1", "img1")
    (left.path / "vda.qcow2").write_text("half")
    assert vault.partials() == [left.path]
    assert list(vault.copies()) == []
    again = vault.begin("image", "srv1", "img1")
    assert list(again.path.iterdir()) == []


def test_a_copy_without_its_disk_is_not_published(vault: Vault) -> None:
    """A manifest that names a missing file is refused."""
    with pytest.raises(VaultError), vault.begin("image", "srv1", "img1") as partial:
        partial.publish(manifest(), "<domain/>")
    assert list(vault.copies()) == []


def test_a_whole_copy_is_never_replaced(vault: Vault) -> None:
    """The same id twice is refused and the first stays."""
    folder = publish(vault)
    with pytest.raises(CopyExists):
        vault.begin("image", "srv1", "img1")
    assert (folder / "vda.qcow2").read_text() == "disk"


def test_remove_is_whole_and_can_be_repeated(vault: Vault) -> None:
    """A removed copy is gone, its neighbour stays, and removing again does nothing."""
    folder, neighbour = publish(vault), publish(vault, "img2")
    vault.remove(folder)
    vault.remove(folder)
    assert list(vault.copies("image")) == [neighbour]
    vault.remove(neighbour)
    assert not (vault.root / "images" / "srv1").exists()


def test_a_half_removed_copy_is_found_and_finished(vault: Vault) -> None:
    """A crash during removal leaves a leftover that no longer counts and can be removed."""
    folder = publish(vault)
    doomed = folder.rename(folder.with_name("img1.deleting"))
    assert vault.leftovers() == [doomed]
    assert list(vault.copies()) == []
    vault.remove(doomed)
    assert vault.leftovers() == []


@pytest.mark.parametrize("bad", ["..", "a/b", "", ".x", "x.partial", "a" * 200])
def test_ids_that_are_no_plain_names_are_refused(vault: Vault, bad: str) -> None:
    """No id leads out of the vault or looks like a folder in the making."""
    with pytest.raises(VaultError):
        vault.begin("image", "srv1", bad)


def test_remove_stays_inside_the_vault(vault: Vault, tmp_path: Path) -> None:
    """Nothing outside the vault is ever removed."""
    outside = tmp_path / "outside"
    outside.mkdir()
    for path in (outside, vault.root / "images" / ".." / ".." / "outside", vault.root):
        with pytest.raises(VaultError):
            vault.remove(path)
    assert outside.exists()


def test_a_manifest_from_a_newer_version_is_read(vault: Vault) -> None:
    """Fields that this version does not know are ignored, and sealed like the others."""
    folder = publish(vault)
    before = read_manifest(folder)
    *lines, _, _ = (folder / "manifest.json").read_text().splitlines(keepends=True)
    above = "".join(lines).replace("{", '{"novel": 1,', 1)
    seal = blake3(above.encode()).hexdigest()
    (folder / "manifest.json").write_text(f'{above}  "seal": "{seal}"\n}}\n')
    assert read_manifest(folder) == before


def test_a_manifest_from_an_older_version_is_read(vault: Vault) -> None:
    """It has no seal; it gets one when digests are added to it."""
    folder = publish(vault)
    old = manifest().model_dump(mode="json", exclude={"sealed", "digests"})
    (folder / "manifest.json").write_text(json.dumps(old, indent=2) + "\n")
    assert read_manifest(folder) == manifest()
    vault.record(folder, {"domain.xml": "00"})
    assert read_manifest(folder) == manifest(sealed=True, digests={"domain.xml": "00"})


def test_the_seal_can_be_checked_by_hand(vault: Vault) -> None:
    """As the notes beside it tell; b3sum is what blake3 is here."""
    folder = publish(vault)
    above = subprocess.run(
        ["head", "-n", "-2", "manifest.json"], cwd=folder, check=True, capture_output=True
    ).stdout
    document = json.loads((folder / "manifest.json").read_text())
    assert document["seal"] == blake3(above).hexdigest()
    assert document["digests"] == {
        name: blake3((folder / name).read_bytes()).hexdigest()
        for name in ("domain.xml", "RESTORE.md")
    }


def test_every_byte_of_a_manifest_is_sealed(vault: Vault) -> None:
    """Whichever of its bytes is flipped, whichever bit of it: the copy is not used."""
    path = publish(vault) / "manifest.json"
    path.chmod(0o600)
    whole = path.read_bytes()
    unnoticed = []
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with contextlib.suppress(ManifestUnreadable):
            read_manifest(path.parent)
            unnoticed.append((place, whole[max(0, place - 20) : place + 1]))
    assert unnoticed == []
    path.write_bytes(whole)
    read_manifest(path.parent)


def test_digests_from_two_sides(vault: Vault) -> None:
    """What one has written the other keeps, as well as what was there first."""
    folder = publish(vault)
    names = ("vda.qcow2", "domain.xml")
    at_once(*(partial(vault.record, folder, {name: "11"}) for name in names for _ in range(8)))
    found = read_manifest(folder)
    assert found.digest_of("vda.qcow2") == "11"
    assert found.digest_of("domain.xml") == blake3(b"<domain/>").hexdigest()
    assert vault.record(folder, {"vda.qcow2": "22"}).digest_of("vda.qcow2") == "11"
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


def test_digests_for_a_copy_that_goes(vault: Vault) -> None:
    """Nothing is written where it was, and its end is not held up."""
    folder = publish(vault)
    vault.remove(folder)
    with pytest.raises(ManifestUnreadable):
        vault.record(folder, {"vda.qcow2": "11"})
    assert not folder.exists()


def test_a_damaged_manifest_is_said(vault: Vault) -> None:
    """A copy whose manifest is cut short is not used and not touched."""
    folder = publish(vault)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(ManifestUnreadable):
        read_manifest(folder)
    assert (folder / "vda.qcow2").exists()


def test_digests_are_added_later(vault: Vault) -> None:
    """The manifest of a whole copy can be replaced, as a whole and sealed."""
    folder = publish(vault)
    disk = manifest().disks[0].model_copy(update={"digest": "blake3:00"})
    write_manifest(folder, manifest(disks=[disk]))
    assert read_manifest(folder).disks[0].digest == "blake3:00"
    assert mode(folder / "manifest.json") == 0o400
