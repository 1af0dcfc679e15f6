"""`scripts/side-by-side`, by which `make test` and `make test-deployment` hear of failures."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SIDE_BY_SIDE = Path(__file__).resolve().parents[1] / "scripts/side-by-side"


def run(*commands: str) -> tuple[int, str]:
    """Exit status and output."""
    done = subprocess.run([SIDE_BY_SIDE, *commands], capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout


@pytest.mark.parametrize(
    ("commands", "status"),
    [(("true", "true"), 0), (("false", "true"), 1), (("true", "false"), 1)],
)
def test_fails_if_one_of_them_does(commands: tuple[str, str], status: int) -> None:
    """Whichever it is."""
    assert (status, "\n" + commands[1] + "\n") == run(*commands)


def test_they_run_at_the_same_time_and_both_are_shown(tmp_path: Path) -> None:
    """Each waits for the other; what the second prints stands after it, errors too."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reads, writes = f"cat {pipe}", f"sh -c 'echo heard >{pipe}; echo said; echo sorry >&2'"

    assert (0, f"heard\n\n{writes}\nsaid\nsorry\n") == run(reads, writes)
