"""Room for a farm: for all of its clones, before the first is made (E6)."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from farms.farmed import SIZE, Farmed

from shared.commands import CloneSource, CreateClones
from shared.disks import materialise, space
from shared.models import Server

pytestmark = pytest.mark.vm


def test_farm_without_room_for_all_is_refused_whole(
    farmed: Farmed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is room for one of two, the operation says how much is needed, and no disk is
    written; for one there is."""
    guest = farmed.guest()
    source = Server(name=guest.name, host="kvm-1", domain_uuid=guest.domain.UUIDString())
    farmed.world.add(source)
    monkeypatch.setattr(materialise, "can_reflink", lambda *_: False)
    monkeypatch.setattr(materialise.images, "measure", lambda *_: SIZE)
    room = SimpleNamespace(f_blocks=1000, f_frsize=4096, f_bavail=50 + SIZE * 3 // 2 // 4096)
    monkeypatch.setattr(space, "os", SimpleNamespace(statvfs=lambda _: room))
    before = set(farmed.disks.iterdir())

    def clones(count: int) -> CreateClones:
        return CreateClones(
            source=CloneSource(kind="server", id=source.id),
            name=f"{guest.name}-{{n}}",
            count=count,
            start=False,
            identity="keep",
        )

    refused = farmed.done(clones(2))
    assert (refused.state, (refused.error or {})["code"]) == ("failed", "insufficient_space")
    assert "128.0 KiB are needed" in (refused.error or {})["message"]
    assert set(farmed.disks.iterdir()) == before

    assert farmed.done(clones(1)).state == "succeeded"
    farmed.adopt(f"{guest.name}-1")
