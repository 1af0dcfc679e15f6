"""The vault: whole folders only, readable by people, removed without a trace."""

from datetime import UTC, datetime
from pathlib import Path

import pytest

from shared.vault import (
    CopyExists,
    Manifest,
    ManifestDisk,
    ManifestLeftOut,
    ManifestServer,
    ManifestUnreadable,
    Vault,
    VaultError,
    read_manifest,
    write_manifest,
)


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
    assert read_manifest(folder) == manifest()
    notes = (folder / "RESTORE.md").read_text()
    for words in ("virsh define domain.xml", "vda.qcow2", "web1", "a CD-ROM is not copied"):
        assert words in notes


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
    """Fields that this version does not know are ignored."""
    folder = publish(vault)
    text = (folder / "manifest.json").read_text().replace("{", '{"novel": 1,', 1)
    (folder / "manifest.json").chmod(0o600)
    (folder / "manifest.json").write_text(text)
    assert read_manifest(folder) == manifest()


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
