"""Which way is chosen, and the seed that cloud-init is given."""

from __future__ import annotations

import io
import json
from datetime import UTC, datetime
from pathlib import Path

import pycdlib
import pytest
from lxml import etree

from services.cloner.identity import choice
from services.cloner.identity.by_seed import BySeed, write_seed
from services.cloner.identity.choice import Choice, _by_evidence, _Evidence, _evidence
from shared.commands import CreateClones
from shared.errors import CloneNameTaken, IdentityNotRenewed, Unsupported
from shared.hypervisor.agent import CHANNEL, FROZEN, NO_AGENT
from shared.hypervisor.duplicate import CloneDefinition
from shared.hypervisor.seed_drive import had_seed, with_seed
from shared.manifest import Manifest, ManifestServer, write_manifest
from shared.models import Server

ANSWERS = _Evidence(channel=True, answers=True, silent=False, cloud_init=False)
OFF = _Evidence(channel=True, answers=False, silent=False, cloud_init=False)
SILENT = _Evidence(channel=True, answers=False, silent=True, cloud_init=False)
NOTHING = _Evidence(channel=False, answers=False, silent=False, cloud_init=False)
SEEDED = _Evidence(channel=False, answers=False, silent=False, cloud_init=True)
BOTH = _Evidence(channel=True, answers=True, silent=False, cloud_init=True)
OFF_SEEDED = _Evidence(channel=True, answers=False, silent=False, cloud_init=True)


def definition(*disks: str, more: str = "") -> str:
    return f"<domain><name>a</name><devices>{''.join(disks)}{more}</devices></domain>"


def disk(target: str, bus: str, device: str = "disk", path: str = "/d") -> str:
    source = f"<source file='{path}'/>" if path else ""
    return (
        f"<disk type='file' device='{device}'>{source}<target dev='{target}' bus='{bus}'/></disk>"
    )


def command(identity: str, **more: bool) -> CreateClones:
    source = {"kind": "server", "id": "s"}
    return CreateClones.model_validate(
        {"source": source, "name": "c", "identity": identity, **more}
    )


@pytest.mark.parametrize(
    ("found", "start", "libguestfs", "way"),
    [
        (ANSWERS, True, True, "agent"),
        (BOTH, True, True, "agent"),  # what it does is read back
        (BOTH, False, True, "cloud-init"),  # costs nothing
        (OFF, True, True, "agent"),
        (OFF_SEEDED, True, True, "cloud-init"),  # cloud images often have a channel and no agent
        (SEEDED, True, True, "cloud-init"),
        (ANSWERS, False, True, "offline"),
        (ANSWERS, False, False, "agent-later"),
        (OFF, False, False, "keep"),  # its links would wait for an agent that may not be there
        (SILENT, True, True, "offline"),
        (SILENT, True, False, "keep"),
        (NOTHING, True, True, "offline"),
        (NOTHING, True, False, "keep"),
    ],
)
def test_auto_goes_by_what_is_known(
    found: _Evidence, start: bool, libguestfs: bool, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The agent where one may answer, then a seed, then libguestfs; nothing is required of them."""
    monkeypatch.setattr(choice, "installed", lambda: libguestfs)

    chosen = _by_evidence(found, start)

    assert (chosen.way, chosen.required) == (way, False)
    assert bool(chosen.reason) is (way == "keep")


@pytest.mark.parametrize(
    ("reason", "found"),
    [(FROZEN, ANSWERS), (NO_AGENT, SILENT), ("quiesce was not asked for", OFF)],
)
def test_a_stored_copy_tells_whether_its_guest_had_an_agent(
    reason: str, found: _Evidence, tmp_path: Path
) -> None:
    """By what came of the freeze; clones of a silent one are not waited for."""
    channel = f"<channel type='unix'><target type='virtio' name='{CHANNEL}'/></channel>"
    (tmp_path / "domain.xml").write_text(definition(more=channel))
    manifest = Manifest(
        kind="image",
        id="i",
        server=ManifestServer(id="s", name="web1", uuid="u"),
        taken_at=datetime.now(UTC),
        way="reflink",
        consistency="crash",
        consistency_reason=reason,
        disks=[],
    )
    write_manifest(tmp_path, manifest)

    assert _evidence(Server(), tmp_path) == found


@pytest.mark.parametrize(
    ("found", "way"), [(ANSWERS, "agent"), (BOTH, "agent"), (SILENT, "keep"), (SEEDED, "keep")]
)
def test_nothing_changes_the_disks_of_a_guest_that_goes_on_with_memory(
    found: _Evidence, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the guest has in its caches would no longer be what is on its disks."""
    monkeypatch.setattr(choice, "installed", lambda: True)
    monkeypatch.setattr(choice, "_evidence", lambda *_, **__: found)

    assert choice.choose(command("auto", with_memory=True), Server(), None).way == way


@pytest.mark.parametrize("way", ["agent", "cloud-init", "offline"])
def test_what_is_asked_for_is_required(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A way that was asked for fails the clones in which it does not work out."""
    monkeypatch.setattr(choice, "installed", lambda: True)
    monkeypatch.setattr(choice, "_evidence", lambda *_: SILENT)  # its clones may answer

    assert choice.choose(command(way), Server(), None) == Choice(way, required=True)


@pytest.mark.parametrize("way", ["agent", "offline"])
def test_what_cannot_work_is_refused(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a channel no agent, without libguestfs no offline: nothing is copied for that."""
    monkeypatch.setattr(choice, "installed", lambda: False)
    monkeypatch.setattr(choice, "_evidence", lambda *_: NOTHING)

    with pytest.raises(Unsupported, match="No clone was made"):
        choice.choose(command(way), Server(), None)


@pytest.mark.parametrize(
    ("disks", "drive"),
    [
        ([disk("vda", "virtio"), disk("sda", "sata", "cdrom", "")], ("vdb", "virtio", "disk")),
        ([disk("sda", "sata"), disk("sdb", "sata")], ("sdc", "sata", "cdrom")),
        ([disk("hda", "ide"), disk("hdc", "ide", "cdrom", "")], ("hdb", "ide", "cdrom")),
    ],
)
def test_a_seed_goes_on_the_bus_of_the_first_disk(
    disks: list[str], drive: tuple[str, str, str]
) -> None:
    """The guest has the driver of that bus; the drive is read-only and under a free name."""
    root = etree.fromstring(with_seed(definition(*disks), Path("/clones/c-seed.iso")))

    (node,) = (each for each in root.iterfind("devices/disk") if each.find("readonly") is not None)
    target, source = node.find("target"), node.find("source")
    assert target is not None
    assert source is not None
    assert (target.get("dev"), target.get("bus"), node.get("device")) == drive
    assert source.get("file") == "/clones/c-seed.iso"


@pytest.mark.parametrize(
    ("told", "left"),
    [
        ("ds=nocloud;i=iid-web;h=web", "ds=nocloud"),
        ("ds=nocloud-net;s=http://198.18.0.1/", "ds=nocloud"),
        ("console=ttyS0 ds=nocloud;i=iid-web;h=web ro", "console=ttyS0 ds=nocloud ro"),
        ("C0FFEE-ds=nocloudy", "C0FFEE-ds=nocloudy"),
    ],
)
def test_only_the_seed_tells_who_the_clone_is(told: str, left: str) -> None:
    """What SMBIOS and the command line say of an instance-id, a hostname or another seed counts
    more than the drive, so a clone would be its source's instance again."""
    source = definition(disk("vda", "virtio")).replace(
        "<devices>",
        f"<os><cmdline>{told}</cmdline></os><sysinfo type='smbios'><system>"
        f"<entry name='serial'>{told}</entry></system></sysinfo><devices>",
    )
    root = etree.fromstring(with_seed(source, Path("/clones/c-seed.iso")))
    assert left == root.findtext("os/cmdline")
    assert left == root.findtext("sysinfo/system/entry[@name='serial']")


def test_a_seed_is_known_by_its_label(tmp_path: Path) -> None:
    """A definition had one if a drive holds it, or held one of ours that went with its clone, or
    if SMBIOS tells of one; other drives are none."""
    seed = tmp_path / "seed.iso"
    write_seed(seed, "triptych-1", "web", "1" * 32)
    smbios = (
        "<domain><name>a</name><sysinfo type='smbios'><system>"
        "<entry name='serial'>ds=nocloud;s=http://198.18.0.1/</entry></system></sysinfo></domain>"
    )

    assert had_seed(definition(disk("sda", "sata", "cdrom", str(seed))))
    assert had_seed(definition(disk("vdb", "virtio", path=f"{tmp_path}/gone-seed.iso")))
    assert had_seed(smbios)
    assert not had_seed(definition(disk("vda", "virtio", path=__file__)))
    assert not had_seed(definition(disk("vda", "virtio", path="/no/such/file")))


def test_a_seed_makes_a_guest_another_instance(tmp_path: Path) -> None:
    """It has a new instance-id, the hostname, and what renews the machine-id at the first boot."""
    seed = tmp_path / "seed.iso"

    write_seed(seed, "triptych-1", "web", "1" * 32)

    assert oct(seed.stat().st_mode & 0o777) == "0o600"
    image = pycdlib.PyCdlib()
    image.open(str(seed))
    texts = {}
    for name in ("meta-data", "user-data"):
        content = io.BytesIO()
        image.get_file_from_iso_fp(content, rr_path=f"/{name}")
        texts[name] = content.getvalue().decode()
    image.close()
    meta = {"instance-id": "triptych-1", "local-hostname": "web", "dsmode": "local"}
    assert json.loads(texts["meta-data"]) == meta
    first, _, rest = texts["user-data"].partition("\n")
    assert first == "#cloud-config"
    config = json.loads(rest)
    assert config["ssh_deletekeys"] is True
    ((*_, action, hostname, machine_id),) = config["bootcmd"]
    assert (action, hostname, machine_id) == ("machine", "web", "1" * 32)
    with pytest.raises(FileExistsError):
        write_seed(seed, "triptych-2", "web", "1" * 32)


def test_a_seed_that_has_no_place_is_named_or_refused(tmp_path: Path) -> None:
    """`auto` goes without and says so; asked for, the clone fails. Nobody's file is taken."""
    made = CloneDefinition(definition(disk("xvda", "xen")), "c", "u", {}, ())

    auto = BySeed("c", tmp_path, False, lambda: None)
    assert auto.prepare(made) == made
    assert auto.files == []
    assert "no bus" in auto.renewal.kept[0][1]
    with pytest.raises(IdentityNotRenewed):
        BySeed("c", tmp_path, True, lambda: None).prepare(made)
    (tmp_path / "c-seed.iso").write_text("somebody's")
    with pytest.raises(CloneNameTaken):
        BySeed("c", tmp_path, True, lambda: None).prepare(made)
