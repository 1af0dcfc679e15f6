"""Owns the file of results: each figure is in it as soon as it is measured.

A figure that this run does not measure stays as an earlier run left it: each has its own `at`.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.result import Result

VERSIONS = {"qemu": "qemu-img --version", "libvirt": "virsh --version"}


class Book:
    """The results in `path`; `tell` hears of each figure, by name and document."""

    def __init__(
        self, path: Path, tell: Callable[[str, dict[str, Any]], None] = lambda _name, _told: None
    ) -> None:
        self.path = path
        self.recorded: set[str] = set()
        self.failures: dict[str, str] = {}
        self.part = ""
        self._tell = tell

    @property
    def results(self) -> dict[str, dict[str, Any]]:
        """All figures known, this run's and those of earlier ones."""
        if not self.path.exists():
            return {}
        results: dict[str, dict[str, Any]] = json.loads(self.path.read_text())["results"]
        return results

    def record(self, name: str, result: Result) -> None:
        """Write a figure down."""
        self._write(name, result.document())

    def fail(self, name: str, reason: str) -> None:
        """Write down why there is no figure; one of an earlier run goes."""
        self.failures[name] = reason
        self._write(name, Result(0, None, None, 0).document() | {"ours": None, "failed": reason})

    def _write(self, name: str, figure: dict[str, Any]) -> None:
        self.recorded.add(name)
        at = _now()
        figure |= {"part": self.part, "at": at}
        document = {"machine": machine(), "at": at, "results": self.results | {name: figure}}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
        partial.rename(self.path)
        self._tell(name, figure)


def machine() -> dict[str, Any]:
    """What a reader must know of the machine to compare."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    found = {
        "cpus": os.cpu_count(),
        "memory_gib": round(pages / 2**30, 1),
        "kernel": platform.release().partition("-")[0],
        "python": platform.python_version(),
    }
    return found | {name: _first_line(command) for name, command in VERSIONS.items()}


def _first_line(command: str) -> str | None:
    try:
        done = subprocess.run(command.split(), capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.partition("\n")[0]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
