"""What of a copy is its own, measured by turns (docs/decisions/0020)."""

from __future__ import annotations

import os
import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from operations.spine import World
from operations.waiting import wait_for
from sqlalchemy import update
from tending.conftest import Copies

from lab.filesystems import MIB
from shared.database import now, reading, transaction
from shared.disks.reflink import reflink
from shared.models import Image
from shared.tending import measurer
from shared.tending.measurer import SETTLED, STALE, Measurer, due, unique_of
from shared.usage import Usage, by_host
from shared.vault import Vault


def row(copy_id: str) -> Image:
    with reading() as session:
        return session.get_one(Image, copy_id)


def change(copy_id: str, **values: Any) -> None:
    image: Any = Image
    with transaction() as session:
        session.execute(update(Image).where(image.id == copy_id).values(**values))


def waiting(moment: Any = None) -> list[str]:
    with reading() as session:
        return [copy_id for copy_id, _ in due(session, "image", moment or now())]


def pair(world: World, copies: Copies) -> tuple[Path, Path]:
    """Two images of one server, of 2 MiB each, that share all of it."""
    server = world.server()
    first = copies.image("img_1", server, os.urandom(2 * MIB))
    second = copies.image_of("img_2", server, "raw", lambda path: reflink(first / "vda.raw", path))
    return first, second


def test_what_two_copies_share_is_neithers(world: World, copies: Copies) -> None:
    """Until one of them goes: then it is the other's, and is measured again soon."""
    first, second = pair(world, copies)
    Measurer("image").turn()
    assert (row("img_1").unique_bytes, row("img_2").unique_bytes) == (0, 0)
    assert waiting() == []

    copies.vault.remove(first)
    gone = now()
    change("img_1", deleted_at=gone)
    assert waiting(gone + SETTLED) == ["img_2"]
    change("img_2", measured_at=gone - SETTLED)
    change("img_1", deleted_at=gone - SETTLED)
    wait_for(lambda: unique_of(second) == 2 * MIB)  # XFS frees a moment later
    Measurer("image").turn()
    assert row("img_2").unique_bytes == row("img_2").bytes == 2 * MIB


def test_who_is_measured_first(world: World, copies: Copies) -> None:
    """What was never measured; then what was measured longest ago, once that is an hour."""
    server = world.server()
    for name in ("img_1", "img_2", "img_3"):
        copies.image(name, server, b"x")
    moment = now()
    change("img_1", measured_at=moment)
    change("img_2", measured_at=moment)
    assert waiting() == ["img_3"]
    change("img_3", measured_at=moment + timedelta(seconds=1))
    assert waiting(moment + STALE) == []
    assert waiting(moment + STALE + timedelta(seconds=5)) == ["img_1", "img_2", "img_3"]


def test_copies_of_other_hosts_are_theirs(world: World, copies: Copies) -> None:
    """A worker measures what is in its own vault."""
    copies.image("img_1", world.server(host="kvm-2"), b"x")
    assert waiting() == []


def test_a_folder_that_is_gone_is_not_known(world: World, copies: Copies) -> None:
    """It gets no number, and is not asked for again at once."""
    shutil.rmtree(copies.image("img_1", world.server(), b"x"))
    Measurer("image").turn()
    assert (row("img_1").unique_bytes, waiting()) == (None, [])


def test_the_database_may_be_away(
    world: World, copies: Copies, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A turn that fails is followed by another one; stopping takes effect at once."""
    copies.image("img_1", world.server(), b"x")
    real, tries = measurer.due, []

    def fail_first(*given: Any) -> Any:
        tries.append(given)
        if len(tries) == 1:
            raise ConnectionError("the database is away")
        return real(*given)

    monkeypatch.setattr(measurer, "due", fail_first)
    monkeypatch.setattr("shared.tending.tender.EVERY_S", 0.05)
    thread = Measurer("image")
    thread.start()
    wait_for(lambda: row("img_1").unique_bytes)
    thread.stop()
    thread.join(60)
    assert not thread.is_alive()


def test_usage_of_a_vault(world: World, copies: Copies, vault: Vault, any_database: str) -> None:
    """What is measured counts as unique or shared; all of it counts as apparent."""
    server = world.server()
    copies.image("img_1", server, b"x")
    copies.image("img_2", server, b"x")
    copies.image("img_3", server, b"x")
    moment = now()
    for name, values in (
        ("img_1", {"bytes": 100, "unique_bytes": 30, "measured_at": moment}),
        ("img_2", {"bytes": 50, "unique_bytes": 60, "measured_at": moment - STALE}),
        ("img_3", {"bytes": 1000}),
    ):
        change(name, **values)
    with reading() as session:
        assert by_host(session) == {"kvm-1": Usage(3, 2, 1150, 90, 70, moment - STALE)}
