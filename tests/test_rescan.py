"""The database's rows rebuilt from the vault's folders (docs/reference/vault.md)."""

from __future__ import annotations

import json
import shutil
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from operations.spine import (  # noqa: F401
    World,
    any_database,
    database_url,
    environment,
    world,
)
from sqlalchemy import select, update

from shared import admin, recovery  # noqa: F401  registers the journal's actions
from shared.commands import CreateImage, RevertSnapshot
from shared.copying import Stored
from shared.database import now, transaction
from shared.manifest import (
    Manifest,
    ManifestAbout,
    ManifestDisk,
    ManifestServer,
    read_manifest,
)
from shared.models import Event, Image, Server, Snapshot
from shared.operations import journal
from shared.operations.admission import admit
from shared.rescan import rescan, survey
from shared.settings import settings
from shared.vault import Vault

pytestmark = pytest.mark.usefixtures("any_database")


@pytest.fixture
def vault(world: World) -> Vault:  # noqa: F811
    made = Vault(settings().vault)
    made.create()
    return made


def copy(vault: Vault, kind: Any, copy_id: str, server: Server, **about: Any) -> Manifest:
    """A whole copy in the vault, of one small disk."""
    manifest = Manifest(
        kind=kind,
        id=copy_id,
        server=ManifestServer(id=server.id, name=server.name, uuid=server.domain_uuid),
        about=ManifestAbout(**about),
        taken_at=now() - timedelta(hours=1),
        way="reflink",
        consistency="file-system",
        disks=[
            ManifestDisk(target="vda", file="vda.raw", format="raw", virtual_bytes=512, bytes=4096)
        ],
    )
    with vault.begin(kind, server.id, copy_id) as partial:
        (partial.path / "vda.raw").write_bytes(b"x" * 512)
        partial.publish(manifest, "<domain/>")
    return manifest


def verdicts(vault: Vault) -> dict[str, str]:
    """The verdict on each copy, by its id."""
    seen = survey(vault)
    with transaction() as session:
        return {Path(each.path).name: each.verdict for each in rescan(session, vault, seen)}


def rows(model: Any) -> list[Any]:
    with transaction() as session:
        return list(session.scalars(select(model)))


def test_rows_are_as_they_were(world: World, vault: Vault) -> None:  # noqa: F811
    """A lost database: servers, images and snapshots are there again, by their own ids."""
    lost = Server(id="srv_lost", name="web", host="kvm-1", domain_uuid="u-1")
    image = copy(vault, "image", "img_1", lost, name="golden", origin="daily", pinned=True)
    snapshot = copy(vault, "snapshot", "snp_1", lost, description="before the update")

    assert verdicts(vault) == {"img_1": "adopted", "snp_1": "adopted"}

    (server,) = rows(Server)
    assert (server.id, server.name, server.domain_uuid) == ("srv_lost", "web", "u-1")
    assert server.forgotten_at is None
    (found,) = rows(Image)
    assert found.model_dump() == Stored(image).image_row().model_dump()
    assert (found.name, found.origin, found.pinned) == ("golden", "daily", True)
    (taken,) = rows(Snapshot)
    assert taken.description == "before the update"
    assert taken.expires_at == snapshot.taken_at + settings().snapshot_retention
    assert {each.type for each in rows(Event)} == {
        "triptych.image.adopted",
        "triptych.snapshot.adopted",
    }
    assert verdicts(vault) == {"img_1": "known", "snp_1": "known"}


@pytest.mark.parametrize("fault", ["gone", "short"])
@pytest.mark.parametrize("known", [False, True])
def test_copy_that_is_only_half_back_does_not_count(
    world: World,  # noqa: F811
    vault: Vault,
    fault: str,
    known: bool,
) -> None:
    """As while it is being copied back, its manifest first. Rotation would remove a whole image
    in its stead."""
    server = world.server("web")
    copy(vault, "image", "img_1", server)
    disk = vault.folder("image", server.id, "img_1") / "vda.raw"
    if known:
        assert verdicts(vault) == {"img_1": "adopted"}
        with transaction() as session:
            session.execute(update(Image).values(state="missing"))
    whole = disk.read_bytes()
    disk.unlink()
    if fault == "short":
        disk.write_bytes(b"")

    assert verdicts(vault) == {"img_1": "incomplete"}
    assert [each.state for each in rows(Image)] == (["missing"] if known else [])

    disk.write_bytes(whole)
    assert verdicts(vault) == {"img_1": "found_again" if known else "adopted"}
    assert [each.state for each in rows(Image)] == ["complete"]


def test_domain_that_was_registered_anew_keeps_its_server(
    world: World,  # noqa: F811
    vault: Vault,
) -> None:
    """The copies' own server is added as a forgotten one: two would fight for the domain."""
    new = world.server("web")
    old = Server(id="srv_old", name="web", host="kvm-1", domain_uuid=new.domain_uuid)
    copy(vault, "image", "img_1", old)

    assert verdicts(vault) == {"img_1": "adopted"}

    assert {each.id: each.forgotten_at is None for each in rows(Server)} == {
        new.id: True,
        "srv_old": False,
    }


def test_snapshot_of_a_domain_that_was_registered_anew_waits_for_its_server(
    world: World,  # noqa: F811
    vault: Vault,
) -> None:
    """As a forgotten server's nobody could use it, and it would expire. Once the new registration
    is gone it is its own server's, which is registered again."""
    new = world.server("web")
    old = Server(id="srv_old", name="web", host="kvm-1", domain_uuid=new.domain_uuid)
    copy(vault, "image", "img_1", old)
    copy(vault, "snapshot", "snp_1", old)

    assert verdicts(vault) == {"img_1": "adopted", "snp_1": "registered_anew"}
    assert rows(Snapshot) == []

    with transaction() as session:
        session.get_one(Server, new.id).forgotten_at = now()
    assert verdicts(vault) == {"img_1": "known", "snp_1": "adopted"}
    with transaction() as session:
        assert admit(RevertSnapshot(server="web"), session).server.id == "srv_old"


@pytest.mark.parametrize("state", ["complete", "missing", None])
def test_copies_of_another_host_are_left_alone(
    world: World,  # noqa: F811
    vault: Vault,
    state: str | None,
) -> None:
    """Somebody put them here; their rows are that host's, which has its own."""
    server = Server(name="web", host="kvm-2", domain_uuid="a")
    world.add(server)
    image = Stored(copy(vault, "image", "img_1", server)).image_row()
    if state:
        image.state = state
        world.add(image)

    assert verdicts(vault) == {"img_1": "foreign"}

    assert [each.state for each in rows(Image)] == [state] * bool(state)


def test_names_and_places_that_are_taken(world: World, vault: Vault) -> None:  # noqa: F811
    """An image gets another name; a second snapshot is left for somebody to decide about."""
    server = world.server("web")
    for each in ("img_1", "img_2"):
        copy(vault, "image", each, server, name="golden")
    for each in ("snp_1", "snp_2"):
        copy(vault, "snapshot", each, server)

    assert verdicts(vault) == {
        "img_1": "adopted",
        "img_2": "adopted",
        "snp_1": "adopted",
        "snp_2": "conflict",
    }

    assert sorted(each.name for each in rows(Image)) == ["golden", "golden-img_2"]
    assert [each.id for each in rows(Snapshot)] == ["snp_1"]


def test_what_is_under_way_or_deleted_is_left_alone(
    world: World,  # noqa: F811
    vault: Vault,
) -> None:
    """A copy that its operation has not committed yet is that one's; what was deleted stays so."""
    server = world.server("web")
    copy(vault, "image", "img_making", server)
    deleted = Stored(copy(vault, "image", "img_deleted", server)).image_row()
    deleted.deleted_at = now()
    world.add(deleted)
    operation = world.submit(CreateImage(server=server.id))
    with transaction() as session:
        folder = str(vault.folder("image", server.id, "img_making"))
        journal.write(session, operation, "undo", "remove_copy", folder=folder)

    assert verdicts(vault) == {"img_making": "under_way", "img_deleted": "deleted"}

    assert [each.id for each in rows(Image)] == ["img_deleted"]


def test_folders_that_explain_nothing(world: World, vault: Vault) -> None:  # noqa: F811
    """A damaged manifest, or that of another copy, adds no row."""
    server = world.server("web")
    copy(vault, "image", "img_1", server)
    right = vault.folder("image", server.id, "img_1")
    shutil.copytree(right, right.with_name("img_2"))
    copy(vault, "image", "img_3", server)
    manifest = vault.folder("image", server.id, "img_3") / "manifest.json"
    manifest.chmod(0o600)
    manifest.write_bytes(manifest.read_bytes()[:-20])

    assert verdicts(vault) == {"img_1": "adopted", "img_2": "unreadable", "img_3": "unreadable"}


def test_copies_that_are_removed_meanwhile_are_not_told_of(
    world: World,  # noqa: F811
    vault: Vault,
) -> None:
    """Their folder was there when the vault was read, whole or half of it."""
    server = world.server("web")
    for each in ("img_1", "img_2", "img_3"):
        copy(vault, "image", each, server)
    whole, half = (vault.folder("image", server.id, each) for each in ("img_1", "img_2"))
    (half / "manifest.json").unlink()
    seen = survey(vault)
    for folder in (whole, half):
        shutil.rmtree(folder)

    with transaction() as session:
        found = rescan(session, vault, seen)

    assert [(Path(each.path).name, each.verdict) for each in found] == [("img_3", "adopted")]
    assert [each.id for each in rows(Image)] == ["img_3"]


def test_others_write_while_the_vault_is_read(
    world: World,  # noqa: F811
    vault: Vault,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Manifests may be many and their disk slow: no transaction is open meanwhile."""
    copy(vault, "image", "img_1", world.server("web"))

    def read(folder: Path) -> Manifest:
        world.add(Event(type="test.written"))
        return read_manifest(folder)

    monkeypatch.setattr("shared.rescan.read_manifest", read)
    monkeypatch.setattr(sys, "argv", ["triptych-admin", "vault", "rescan"])

    assert admin.main() == 0

    assert {each.type for each in rows(Event)} == {"test.written", "triptych.image.adopted"}


def test_rows_without_a_folder(world: World, vault: Vault) -> None:  # noqa: F811
    """The image is not offered any more, until its folder is back."""
    server = world.server("web")
    copy(vault, "image", "img_1", server)
    verdicts(vault)
    folder = vault.folder("image", server.id, "img_1")
    aside = folder.rename(folder.parent / "img_1.partial")

    assert verdicts(vault) == {"img_1": "missing"}
    assert [each.state for each in rows(Image)] == ["missing"]
    aside.rename(folder)
    assert verdicts(vault) == {"img_1": "found_again"}
    assert [each.state for each in rows(Image)] == ["complete"]


def test_a_damaged_image_that_was_away_is_damaged_still(
    world: World,  # noqa: F811
    vault: Vault,
) -> None:
    """It was found so, and nobody looked since: nothing is restored from it, none goes for it."""
    server = world.server("web")
    copy(vault, "image", "img_1", server)
    verdicts(vault)
    with transaction() as session:
        session.execute(update(Image).values(state="damaged", verified_result="damaged"))
    folder = vault.folder("image", server.id, "img_1")
    aside = folder.rename(folder.parent / "img_1.partial")
    verdicts(vault)
    aside.rename(folder)

    assert verdicts(vault) == {"img_1": "found_again"}
    assert [each.state for each in rows(Image)] == ["damaged"]


def test_command_says_first_what_it_would_do(
    world: World,  # noqa: F811
    vault: Vault,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """--dry-run changes nothing; the exit status tells whether something is left to look at."""
    server = world.server("web")
    copy(vault, "image", "img_1", server)

    def run(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["triptych-admin", "vault", "rescan", *words])
        return admin.main(), capsys.readouterr().out

    path = f"images/{server.id}/img_1"
    assert run("--dry-run") == (0, f"adopted      {path}\n1 copies, 1 would be adopted\n")
    assert rows(Image) == []
    status, printed = run("--json")
    assert (status, json.loads(printed)) == (
        0,
        [{"path": path, "verdict": "adopted", "detail": ""}],
    )
    shutil.rmtree(vault.folder("image", server.id, "img_1"))
    status, printed = run()
    assert status == 1
    assert "missing" in printed
