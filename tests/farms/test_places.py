"""Where clones' files go, where they cannot, and that they go away again."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from farms.farmed import Farmed, outcomes
from lxml import etree

from shared.commands import CloneSource, CreateClones, DeleteClone
from shared.models import Server
from shared.settings import settings

pytestmark = pytest.mark.vm


@pytest.fixture
def device(farmed: Farmed) -> Iterator[str]:
    """A block device of the host's."""
    losetup = ["losetup", "--find", "--show", str(farmed.disk())]
    path = subprocess.run(losetup, check=True, capture_output=True, text=True).stdout.strip()
    yield path
    subprocess.run(["losetup", "--detach", path], check=True)


def test_disks_do_not_go_beside_a_device(
    farmed: Farmed, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """/dev is in the host's memory: without a directory for clones they are refused, with words
    that say what is to be set; with one they are made there."""
    guest = farmed.guest()
    guest.domain.attachDeviceFlags(
        f"<disk type='block' device='disk'><driver name='qemu' type='raw'/>"
        f"<source dev='{device}'/><target dev='vdb' bus='virtio'/></disk>",
        2,  # VIR_DOMAIN_AFFECT_CONFIG
    )
    source = Server(name=guest.name, host="kvm-1", domain_uuid=guest.domain.UUIDString())
    farmed.world.add(source)
    command = CreateClones(
        source=CloneSource(kind="server", id=source.id),
        name=f"{guest.name}-clone",
        start=False,
        identity="keep",
    )

    refused = farmed.done(command)

    assert [str(each) for each in Path("/dev").glob(f"{guest.name}*")] == []
    assert (refused.state, (refused.error or {})["code"]) == ("failed", "unsupported")
    assert "TRIPTYCH_CLONE_DIR" in (refused.error or {})["message"]
    assert device in (refused.error or {})["message"]

    folder = farmed.disks / "clones"
    folder.mkdir()
    monkeypatch.setenv("TRIPTYCH_CLONE_DIR", str(folder))
    settings.cache_clear()
    made = farmed.done(command)
    assert made.state == "succeeded", made.error
    assert sorted(each.name for each in folder.iterdir()) == [
        f"{guest.name}-clone-vda.raw",
        f"{guest.name}-clone-vdb.raw",
    ]
    farmed.adopt(f"{guest.name}-clone")


def test_directory_that_is_gone_is_named(farmed: Farmed, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the one of a server that was deleted with it, and whose image is cloned: nothing is
    written, and the error says what to do."""
    guest = farmed.guest()
    source = Server(name=guest.name, host="kvm-1", domain_uuid=guest.domain.UUIDString())
    farmed.world.add(source)
    gone = farmed.disks / "gone"
    monkeypatch.setenv("TRIPTYCH_CLONE_DIR", str(gone))
    settings.cache_clear()
    refused = farmed.done(
        CreateClones(
            source=CloneSource(kind="server", id=source.id), name="c", start=False, identity="keep"
        )
    )
    assert (refused.state, (refused.error or {})["code"]) == ("failed", "unsupported")
    assert str(gone) in (refused.error or {})["message"]
    assert not gone.exists()


def test_file_of_a_serial_line_goes_with_its_clone(farmed: Farmed) -> None:
    """It was made for the clone alone: its first start makes it, its deletion takes it away, and
    the source's own stays."""
    guest = farmed.guest()
    printed = farmed.disks / f"{guest.name}.printed"
    root = etree.fromstring(guest.domain.XMLDesc())
    line = etree.SubElement(root.find("devices"), "parallel", type="file")
    etree.SubElement(line, "source", path=str(printed))
    guest.connection.defineXML(etree.tostring(root, encoding="unicode"))
    guest.domain.create()
    source = Server(name=guest.name, host="kvm-1", domain_uuid=guest.domain.UUIDString())
    farmed.world.add(source)
    name = f"{guest.name}-clone"

    made = farmed.done(
        CreateClones(
            source=CloneSource(kind="server", id=source.id), name=name, start=True, identity="keep"
        )
    )

    farmed.adopt(name)
    assert made.state == "succeeded", made.error
    own = farmed.disks / f"{name}.printed"
    assert (printed.exists(), own.exists()) == (True, True)
    deleted = farmed.done(DeleteClone(clone=outcomes(made)[name]["id"]))
    assert deleted.state == "succeeded", deleted.error
    assert (printed.exists(), own.exists()) == (True, False)
