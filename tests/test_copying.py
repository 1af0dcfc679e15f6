"""What is written down ahead of a copy's steps upon its guest."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from shared import copying
from shared.disks.engine import Step

FOLDER = Path("/vault/images/srv/img.partial")


@pytest.mark.parametrize(
    ("step", "freezes", "memory", "written"),
    [
        ("pause", True, False, ["thaw_domain", "resume_domain"]),
        ("pause", False, False, ["resume_domain"]),
        ("backup", True, False, ["thaw_domain", "abort_backup"]),
        ("memory", False, True, ["release_memory"]),
        ("pause", False, True, ["resume_domain", "release_memory"]),
    ],
)
def test_what_is_undone_first_is_written_last(
    step: Step, freezes: bool, memory: bool, written: list[str]
) -> None:
    """A guest whose memory is still being saved is resumed by nobody before that has ended."""
    entries: list[tuple[str, dict[str, Any]]] = []
    context: Any = SimpleNamespace(
        undo_all=lambda *steps, durable: entries.extend(steps), strike=lambda *_actions: None
    )
    domain: Any = SimpleNamespace(uuid="1-2-3", state="running")
    copying._journal(context, domain, FOLDER, step, freezes, memory)
    assert [action for action, _ in entries] == written
    assert {arguments["uuid"] for _, arguments in entries} == {"1-2-3"}
    made_room = [given["folder"] for _, given in entries if "folder" in given]
    assert made_room == [str(FOLDER)] * (memory or step == "backup")
