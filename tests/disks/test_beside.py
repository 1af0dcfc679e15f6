"""The small files beside the disks."""

from pathlib import Path

import pytest

from shared.disks.beside import Beside, beside_of
from shared.hypervisor.definition import DomainDefinition


def copied(folder: Path) -> tuple[Beside, dict[str, str]]:
    """The copies in `folder` of what a domain has in `folder.parent`; what is left out, and why."""
    home = folder.parent
    live = DomainDefinition.parse(
        f"<domain><name>a</name><uuid>u-1</uuid><os><nvram>{home}/nvram.fd</nvram></os><devices>"
        "<tpm><backend type='emulator' version='2.0'/></tpm></devices></domain>"
    )
    folder.mkdir()
    files, left_out = beside_of(live, folder, home)
    files.warm()
    files.take()
    return files, {each.target: each.reason for each in left_out}


@pytest.mark.parametrize("gone", [{"nvram"}, {"tpm"}, {"nvram", "tpm"}, set()])
def test_what_cannot_be_read_is_named(tmp_path: Path, gone: set[str]) -> None:
    """The copy goes without it, and the result says why; the other is copied."""
    sources = {
        "nvram": tmp_path / "nvram.fd",
        "tpm": tmp_path / "u-1" / "tpm2" / "tpm2-00.permall",
    }
    sources["tpm"].parent.mkdir(parents=True)
    for name in sources.keys() - gone:
        sources[name].write_text(name)

    files, left_out = copied(tmp_path / "copy")

    assert left_out.keys() == gone
    for name, reason in left_out.items():
        assert f"cannot be read from {sources[name]}: No such file" in reason
    taken = {"nvram": files.nvram.taken, "tpm": files.tpm.taken}
    assert {name: path and path.read_text() for name, path in taken.items()} == {
        name: None if name in gone else name for name in sources
    }


def test_uefi_variables_that_are_no_file_are_named(tmp_path: Path) -> None:
    """They are left out as those are that are not there."""
    (tmp_path / "nvram.fd").mkdir()
    files, left_out = copied(tmp_path / "copy")
    assert files.nvram.taken is None
    assert left_out["nvram"].startswith("the UEFI variables cannot be read")
