"""The journal's actions on the world, at the crash points where they are needed."""

from pathlib import Path

from shared import recovery
from shared.disks import setaside

OPERATION = "op_1"


def test_an_undo_that_died_half_way_is_rolled_back(tmp_path: Path) -> None:
    """The restore of a lost disk and a kept one, being undone: whatever of it had happened
    when the worker died, what the restore brought is live again, so that the server can start."""
    for died_after in ("nothing", "swap_back", "take_away"):
        folder = tmp_path / died_after
        folder.mkdir()
        live = {"vda": folder / "lost.raw", "vdb": folder / "kept.raw"}
        live["vdb"].write_text("newer")
        for target, path in setaside.prepare(live, OPERATION).items():
            path.write_text(f"restored {target}")
        setaside.swap(live, OPERATION)
        if died_after != "nothing":
            setaside.swap_back(live, OPERATION)
        if died_after == "take_away":
            setaside.take_away({"vda": live["vda"]}, OPERATION)

        recovery.swap_again({name: str(path) for name, path in live.items()}, OPERATION)

        found = {name: path.read_text() for name, path in live.items()}
        assert found == {"vda": "restored vda", "vdb": "restored vdb"}, died_after
        assert setaside.old_path(live["vdb"], OPERATION).read_text() == "newer", died_after
