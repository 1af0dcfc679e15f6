"""Setting live files aside and putting them back, with a crash after every step."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from shared.disks import setaside
from shared.disks.errors import DiskError, SetAsideConflict

OPERATION = "01HOP"


class Crash(BaseException):
    """The process died here."""


@pytest.fixture
def live(tmp_path: Path) -> dict[str, Path]:
    """Two live disks in different directories, prepared with new contents."""
    disks = {}
    for target in ("vda", "vdb"):
        path = tmp_path / target / f"{target}.qcow2"
        path.parent.mkdir()
        path.write_text(f"old {target}")
        path.chmod(0o640)
        os.chown(path, 107, 108)
        disks[target] = path
    return prepared(disks)


def prepared(disks: dict[str, Path]) -> dict[str, Path]:
    for target, new in setaside.prepare(disks, OPERATION).items():
        new.write_text(f"new {target}")
    return disks


def contents(live: dict[str, Path]) -> list[str]:
    return [path.read_text() for path in live.values()]


def crash_after(monkeypatch: pytest.MonkeyPatch, steps: int, action: Callable[[], None]) -> bool:
    """Run `action`, dying just before its file system step number `steps`; True if it died."""
    left = [steps]

    def counted(real: Callable[..., object]) -> Callable[..., object]:
        def step(*arguments: object, **options: object) -> object:
            if left[0] == 0:
                raise Crash
            left[0] -= 1
            return real(*arguments, **options)

        return step

    with monkeypatch.context() as patch:
        for module, name in (
            (os, "link"),
            (Path, "replace"),
            (Path, "unlink"),
            (os, "chown"),
            (setaside, "sync_folder"),
        ):
            patch.setattr(module, name, counted(getattr(module, name)))
        try:
            action()
        except Crash:
            return True
    return False


def test_swap_puts_the_new_files_live_with_owner_and_mode(live: dict[str, Path]) -> None:
    """After a swap the new contents are live, and belong to whom the old ones did."""
    setaside.swap(live, OPERATION)
    assert contents(live) == ["new vda", "new vdb"]
    for path in live.values():
        status = path.stat()
        assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (107, 108, 0o640)
    assert setaside.swapped(live, OPERATION) == live


def test_swap_back_puts_the_old_files_live(live: dict[str, Path]) -> None:
    """A swap is undone without a trace in the live files."""
    before = [path.stat().st_ino for path in live.values()]
    setaside.swap(live, OPERATION)
    setaside.swap_back(live, OPERATION)
    assert contents(live) == ["old vda", "old vdb"]
    assert [path.stat().st_ino for path in live.values()] == before
    assert not setaside.swapped(live, OPERATION)


@pytest.mark.parametrize("steps", range(14))
def test_a_crash_in_swap_is_put_back(
    live: dict[str, Path], steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever swap dies, every live name holds a whole disk and swap_back restores the old."""
    died = crash_after(monkeypatch, steps, lambda: setaside.swap(live, OPERATION))
    assert died == (steps < 12)
    for path in live.values():
        assert path.read_text()[:4] in ("old ", "new ")
    setaside.swap_back(live, OPERATION)
    assert contents(live) == ["old vda", "old vdb"]


@pytest.mark.parametrize("steps", range(14))
def test_a_crash_in_swap_is_finished_by_swap(
    live: dict[str, Path], steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calling swap again after a crash finishes it."""
    crash_after(monkeypatch, steps, lambda: setaside.swap(live, OPERATION))
    setaside.swap(live, OPERATION)
    assert contents(live) == ["new vda", "new vdb"]
    setaside.swap_back(live, OPERATION)
    assert contents(live) == ["old vda", "old vdb"]


@pytest.mark.parametrize("steps", range(14))
def test_a_crash_in_swap_back_is_finished_by_swap_back(
    live: dict[str, Path], steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever swap_back dies, calling it again ends with the old files live."""
    setaside.swap(live, OPERATION)
    crash_after(monkeypatch, steps, lambda: setaside.swap_back(live, OPERATION))
    for path in live.values():
        assert path.exists()
    setaside.swap_back(live, OPERATION)
    assert contents(live) == ["old vda", "old vdb"]


@pytest.mark.parametrize("change", [setaside.swap, setaside.swap_back])
def test_names_change_one_right_after_the_other(
    live: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[dict[str, Path], str], None],
) -> None:
    """A power cut between two would have a server started on disks of two instants."""
    if change is setaside.swap_back:
        setaside.swap(live, OPERATION)
    done: list[str] = []
    for module, name in ((os, "link"), (Path, "replace"), (setaside, "sync_folder")):
        real = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *given, _name=name, _real=real: done.append(_name) or _real(*given)
        )
    change(live, OPERATION)
    first = done.index("replace")
    assert done[first : first + 2] == ["replace", "replace"]
    assert done.count("replace") == 2
    assert set(done[first + 2 :]) == {"sync_folder"}


def test_swap_back_of_nothing_changes_nothing(live: dict[str, Path]) -> None:
    """Undoing a swap that never began leaves the live files alone."""
    setaside.swap_back(live, OPERATION)
    assert contents(live) == ["old vda", "old vdb"]


def test_swap_refuses_when_a_new_file_is_missing(live: dict[str, Path]) -> None:
    """One missing new file refuses the whole swap before anything moves."""
    setaside.new_path(live["vdb"], OPERATION).unlink()
    with pytest.raises(SetAsideConflict):
        setaside.swap(live, OPERATION)
    assert contents(live) == ["old vda", "old vdb"]


def test_without_hard_links_it_renames(
    live: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system without hard links is served by renames."""

    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    setaside.swap(live, OPERATION)
    assert contents(live) == ["new vda", "new vdb"]
    setaside.swap_back(live, OPERATION)
    assert contents(live) == ["old vda", "old vdb"]


def test_what_was_set_aside_and_is_lost_is_named(live: dict[str, Path]) -> None:
    """Nothing is put back when one of the old files is gone."""
    setaside.swap(live, OPERATION)
    setaside.refuse_lost(live, OPERATION)
    setaside.old_path(live["vdb"], OPERATION).unlink()
    with pytest.raises(SetAsideConflict, match="of vdb is gone"):
        setaside.refuse_lost(live, OPERATION)


def test_prepare_again_starts_afresh(live: dict[str, Path]) -> None:
    """What an earlier attempt had prepared is thrown away; the live files stay."""
    again = setaside.prepare(live, OPERATION)
    assert not any(path.exists() for path in again.values())
    assert contents(live) == ["old vda", "old vdb"]


def test_prepare_refuses_after_the_swap(live: dict[str, Path]) -> None:
    """Old files set aside are never overwritten by preparing again."""
    setaside.swap(live, OPERATION)
    with pytest.raises(SetAsideConflict):
        setaside.prepare(live, OPERATION)
    assert setaside.old_path(live["vda"], OPERATION).read_text() == "old vda"


def test_prepare_refuses_what_is_no_plain_file(tmp_path: Path) -> None:
    """A device or link cannot be replaced as a whole."""
    link = tmp_path / "disk"
    link.symlink_to("/dev/null")
    with pytest.raises(DiskError):
        setaside.prepare({"vda": link}, OPERATION)


def test_discard_removes_the_directories_and_keeps_what_is_live(live: dict[str, Path]) -> None:
    """After discard only the live files are left, and calling it again is fine."""
    setaside.swap(live, OPERATION)
    setaside.discard(live, OPERATION)
    setaside.discard(live, OPERATION)
    assert contents(live) == ["new vda", "new vdb"]
    assert [p.name for p in live["vda"].parent.iterdir()] == ["vda.qcow2"]


@pytest.mark.parametrize("lost", ["vda", "vdb"])
def test_discard_never_removes_the_only_copy(tmp_path: Path, lost: str) -> None:
    """An old file whose live name is gone is put back rather than removed, whichever it is of the
    disks of one directory."""
    disks = {target: tmp_path / f"{target}.qcow2" for target in ("vda", "vdb")}
    for target, path in disks.items():
        path.write_text(f"old {target}")
    live = prepared(disks)
    setaside.swap(live, OPERATION)
    live[lost].unlink()
    setaside.discard(live, OPERATION)
    assert contents(live) == [f"{'old' if each == lost else 'new'} {each}" for each in live]
    assert sorted(tmp_path.iterdir()) == list(live.values())


def test_a_lost_disk_is_restored(tmp_path: Path) -> None:
    """A restore works where the live file is gone."""
    path = tmp_path / "vda.qcow2"
    new = setaside.prepare({"vda": path}, OPERATION)["vda"]
    new.write_text("new")
    setaside.swap({"vda": path}, OPERATION)
    assert path.read_text() == "new"


def test_what_had_no_file_before_is_taken_away_again(live: dict[str, Path]) -> None:
    """A restore of a lost disk, undone: the disk is lost again, and a crash can redo it."""
    lost = {"vda": live["vda"]}
    lost["vda"].unlink()
    setaside.swap(lost, OPERATION)

    setaside.take_away(lost, OPERATION)
    gone = not lost["vda"].exists()
    setaside.swap(lost, OPERATION)

    assert gone
    assert contents(lost) == ["new vda"]
