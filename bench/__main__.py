"""`make bench`: ours and its peers in one run on one machine, medians into results/latest.json.

    python -m bench [--only snapshot,…]

Runs against nothing but what it made itself.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench import load, snapshot
from bench.result import Result

PARTS = {"snapshot": snapshot.measure, "load": load.measure}
RESULTS = Path(__file__).parent / "results"

console = Console(highlight=False)


def main() -> int:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--only", default="", help=f"parts to run, of: {', '.join(PARTS)}")
    only = [name for name in parser.parse_args().only.split(",") if name]
    if unknown := set(only) - PARTS.keys():
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    results: dict[str, Result] = {}
    for name in only or PARTS:
        with console.status(f"measuring {name} …"):
            results |= PARTS[name]()
    _write(results)
    console.print(_table(results))
    return 0


def _write(results: dict[str, Result]) -> None:
    RESULTS.mkdir(exist_ok=True)
    document = {
        "machine": {
            "cpus": os.cpu_count(),
            "kernel": platform.release(),
            "python": platform.python_version(),
        },
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "results": {name: result.document() for name, result in results.items()},
    }
    (RESULTS / "latest.json").write_text(json.dumps(document, indent=2) + "\n")


def _table(results: dict[str, Result]) -> Table:
    table = Table("figure", "ours", "peer", "ours / peer", "runs", "peer is")
    for name, result in results.items():
        shown = result.document()
        table.add_row(
            name,
            result.shown(result.ours),
            "–" if result.peer is None else result.shown(result.peer),
            "–" if shown["ratio"] is None else f"{shown['ratio']:.1f}",
            str(result.runs),
            result.peer_name or "",
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
