"""Digests of copies, computed in the background (docs/decisions/0021)."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from blake3 import blake3
from operations.spine import World
from operations.waiting import wait_for
from tending.conftest import Copies

from lab import filesystems
from lab.filesystems import MIB
from lab.processes import holder_of
from shared.disks import leisure
from shared.errors import Cancelled
from shared.manifest import read_manifest, write_manifest
from shared.operations import presence
from shared.tending.digester import Digester
from shared.vault import Vault


def digest_of(folder: Path) -> str | None:
    return read_manifest(folder).digest_of("vda.raw")


def blake(path: Path) -> str:
    found: str = blake3(path.read_bytes()).hexdigest()
    return found


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Digests take until this is called, or they are told to stop."""
    real, go = leisure.digest, threading.Event()

    def digest(path: Path, workers: Path, stopping: Callable[[], bool]) -> str:
        while not go.wait(0.02):
            if stopping():
                raise Cancelled("stopped")
        return real(path, workers, stopping)

    monkeypatch.setattr(leisure, "digest", digest)
    yield go.set
    go.set()


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> Iterator[Digester]:
    monkeypatch.setattr("shared.tending.tender.EVERY_S", 0.05)
    thread = Digester("image")
    thread.start()
    yield thread
    thread.stop()
    thread.join(60)
    assert not thread.is_alive()


def test_what_is_there_and_what_comes(world: World, copies: Copies, running: Digester) -> None:
    """Copies that were made before the worker started, and after it; files stay 0400."""
    server = world.server()
    for name in ("img_1", "img_2"):
        folder = copies.image(name, server, os.urandom(MIB))
        wait_for(lambda folder=folder: digest_of(folder))
        assert digest_of(folder) == blake(folder / "vda.raw")
        manifest = read_manifest(folder)
        assert manifest.sealed
        assert {name: manifest.digest_of(name) for name in manifest.files} == {
            name: blake(folder / name) for name in manifest.files
        }
        assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o400}


def test_copies_of_an_older_version(world: World, copies: Copies) -> None:
    """What it left without seal and digests gets both; what was verified keeps its digest."""
    folder = copies.image("img_1", world.server(), b"disk")
    disk = read_manifest(folder).disks[0].model_copy(update={"digest": "11"})
    old = read_manifest(folder).model_copy(update={"disks": [disk], "digests": {}})
    path = folder / "manifest.json"
    path.chmod(0o600)
    path.write_text(old.model_dump_json(exclude={"sealed", "digests"}))

    Digester("image").turn()

    found = read_manifest(folder)
    assert (found.sealed, found.digest_of("vda.raw")) == (True, "11")
    assert found.digest_of("domain.xml") == blake(folder / "domain.xml")


def test_a_copy_that_is_deleted_meanwhile(
    world: World, copies: Copies, slow: Callable[[], None], running: Digester
) -> None:
    """It goes at once, and the next one has its turn."""
    server = world.server()
    first = copies.image("img_1", server, b"disk")
    wait_for((copies.vault.root / ".digester.lock").exists)
    second = copies.image("img_2", server, b"disk")
    copies.vault.remove(first)
    slow()
    wait_for(lambda: digest_of(second))
    assert not first.exists()
    assert list(first.parent.iterdir()) == [second]


def test_a_file_that_is_deleted_gives_its_room_back(copies: Copies, tmp_path: Path) -> None:
    """The helper lets go of it within a piece, instead of reading to the end."""
    disk = copies.vault.root / "big.raw"
    with disk.open("wb") as file:
        file.truncate(1 << 50)  # a hole whose zeros would take days
    workers = tmp_path / "none"
    outcome: list[BaseException] = []

    def read() -> None:
        try:
            leisure.digest(disk, workers, bool)
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    helper = wait_for(lambda: holder_of(disk))
    assert os.sched_getscheduler(helper) == os.SCHED_IDLE
    assert os.getpriority(os.PRIO_PROCESS, helper) == 19
    ionice = ["ionice", "-p", str(helper)]
    assert subprocess.run(ionice, capture_output=True, text=True).stdout.strip() == "idle"
    disk.unlink()
    thread.join(60)  # what gives way to all others may have to wait long
    assert [type(error) for error in outcome] == [FileNotFoundError]
    assert holder_of(disk) is None


def test_stopping_takes_effect_at_once(
    world: World, copies: Copies, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that ends waits for no disk, and leaves no process."""
    folder = copies.image_of(
        "img_1", world.server(), "raw", lambda path: path.open("wb").truncate(1 << 50)
    )
    thread = Digester("image")
    thread.start()
    wait_for(lambda: holder_of(folder / "vda.raw"))
    asked = time.monotonic()
    thread.stop()
    thread.join(60)
    assert time.monotonic() - asked < 5  # so long a worker's end waits for it
    assert holder_of(folder / "vda.raw") is None
    assert digest_of(folder) is None


def test_one_at_a_time_on_a_host(
    world: World, copies: Copies, slow: Callable[[], None], running: Digester
) -> None:
    """The other services, and a second worker of the same, wait until it has ended; or until
    they end."""
    folder = copies.image("img_1", world.server(), b"disk")
    wait_for((copies.vault.root / ".digester.lock").exists)
    other = Digester("image")
    other.stop()
    with pytest.raises(Cancelled), other._alone(copies.vault):
        pass  # pragma: no cover
    slow()
    wait_for(lambda: digest_of(folder))
    with Digester("snapshot")._alone(copies.vault):
        pass


def test_a_full_disk_costs_no_second_reading(
    world: World, copies: Copies, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What could not be written is kept in mind, and written as soon as it can be."""
    folder = copies.image("img_1", world.server(), b"disk")
    real, read = leisure.digest, []

    def counted(path: Path, *given: Any) -> str:
        read.append(path)
        return real(path, *given)

    monkeypatch.setattr(leisure, "digest", counted)
    monkeypatch.setattr("shared.tending.digester.AGAIN_S", 0)
    padded = read_manifest(folder).model_copy(update={"consistency_reason": "x" * MIB})
    write_manifest(folder, padded)
    digester = Digester("image")
    ballast = filesystems.fill(copies.vault.root, crumbs=4096)
    try:
        digester.turn()
        assert digest_of(folder) is None
    finally:
        ballast.unlink()
    digester.turn()
    assert digest_of(folder) == blake(folder / "vda.raw")
    assert read == [folder / "vda.raw"]


def test_a_copy_that_cannot_be_read_holds_up_no_other(world: World, copies: Copies) -> None:
    """It is logged, and tried again an hour later."""
    server = world.server()
    broken, whole = (copies.image(name, server, b"disk") for name in ("img_1", "img_2"))
    (broken / "manifest.json").chmod(0o600)
    (broken / "manifest.json").write_text("{")
    Digester("image").turn()
    assert digest_of(whole)


@pytest.mark.parametrize("beside_work", [False, True])
def test_it_rests_more_beside_work(
    vault: Vault, monkeypatch: pytest.MonkeyPatch, beside_work: bool
) -> None:
    """As long as a piece took; nine times as long while an operation is going on."""
    slept: list[float] = []
    clock = iter([0.0, 2.0, 2.0]) if not beside_work else iter([0.0, 0.5, 0.5])
    its_time = SimpleNamespace(monotonic=lambda: next(clock), sleep=slept.append)
    monkeypatch.setattr(leisure, "time", its_time)
    pace = leisure._Pace(0, presence.folder(), os.getppid())
    if beside_work:
        with presence.attempt("imager"):
            pace.rest(0)
    else:
        pace.rest(0)
    assert slept == [4.5 if beside_work else 2.0]
