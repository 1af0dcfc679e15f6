"""`make bench`: ours and its peers in one run on one machine, medians into results/latest.json.

    python -m bench [--only snapshot,…]

Runs against nothing but what it made itself. A figure that cannot be measured is written down
with its reason, the others are measured all the same, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import signal
import sys
import time
import traceback
from collections import defaultdict
from pathlib import Path
from typing import Any

from rich.console import Console

from bench import clone, image, load, report, revert, schedule, snapshot, space
from bench.book import Book, machine
from bench.figure import Figure
from bench.result import in_words
from bench.site import SITES, Site, opened
from bench.sizes import SHRUNK
from lab.libvirtd import Hypervisor, libvirtd

PARTS = {
    "snapshot": snapshot.FIGURES,
    "image": image.FIGURES,
    "revert": revert.FIGURES,
    "space": space.FIGURES,
    "clone": clone.FIGURES,
    "load": load.FIGURES,
    "schedule": schedule.FIGURES,
}
"""In the order in which those that share a site are measured there: the one that leaves the
disk in pieces comes last."""
HERE = Path(__file__).parent
OUT = HERE / "results" / "shrunk" if SHRUNK else HERE

console = Console(highlight=False)


def main() -> int:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--only", default="", help=f"parts to run, of: {', '.join(PARTS)}")
    only = [name for name in parser.parse_args().only.split(",") if name] or list(PARTS)
    if unknown := set(only) - PARTS.keys():
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    for stop in (signal.SIGINT, signal.SIGTERM):  # also where a shell has Ctrl-C ignored
        signal.signal(stop, signal.default_int_handler)
    book = Book((OUT if SHRUNK else HERE / "results") / "latest.json", _tell)
    spent = Run(book).measure([name for name in PARTS if name in only])
    report.write(OUT, _in_order(book.results), machine(), list(PARTS))
    for what, seconds in spent.items():
        console.print(f"{what}: {seconds:.0f} s")
    for name, reason in book.failures.items():
        console.print(f"[red]{name}[/]: {reason}", markup=True)
    return 1 if book.failures else 0


class Run:
    """One run of some parts: site after site, so that each is made once."""

    def __init__(self, book: Book) -> None:
        self.book = book
        self.spent: dict[str, float] = defaultdict(float)

    def measure(self, parts: list[str]) -> dict[str, float]:
        """Measure all figures of the parts; returns seconds by part, and by the making of sites."""
        wanted = [(part, figure) for part in parts for figure in PARTS[part]]
        for part, figure in wanted:
            if figure.site is None:
                self._one(part, figure, None)
        sites = [name for name in SITES if any(figure.site == name for _, figure in wanted)]
        with contextlib.ExitStack() as undo:
            hypervisor = undo.enter_context(libvirtd(own=True)) if sites else None
            for name in sites:
                assert hypervisor is not None
                self._at_site(name, hypervisor, [each for each in wanted if each[1].site == name])
        return dict(self.spent)

    def _at_site(self, name: str, hypervisor: Hypervisor, wanted: list[tuple[str, Figure]]) -> None:
        began = time.monotonic()
        parts = {part for part, _ in wanted}
        names = list(itertools.chain(*(figure.names for _, figure in wanted)))
        label = f"site {name}"
        console.print(f"{label}: making it, for {', '.join(sorted(parts))}")
        try:
            with opened(SITES[name], hypervisor) as site:
                self.spent[label] += time.monotonic() - began
                for part, figure in wanted:
                    self._one(part, figure, site)
        except Exception as error:
            # Also when it cannot be taken away, and then there may be nothing left to fail.
            traceback.print_exc()
            self._fail(names, f"{label}: {error!r}")
            self.book.failures.setdefault(label, repr(error))

    def _one(self, part: str, figure: Figure, site: Site | None) -> None:
        began = time.monotonic()
        self.book.part = part
        try:
            figure.measure(site, self.book)
        except Exception as error:
            traceback.print_exc()
            self._fail(figure.names, f"{type(error).__name__}: {error}")
            if site:
                self._tidy(site)
        self.spent[part] += time.monotonic() - began

    def _fail(self, names: Any, reason: str) -> None:
        for name in names:
            if name not in self.book.recorded:
                self.book.fail(name, reason)

    def _tidy(self, site: Site) -> None:
        """What a failed measurement left must not fail the next one too."""
        with contextlib.suppress(Exception):
            if site.guest.state() == "paused":
                site.guest.domain.resume()
            if site.guest.state() == "stopped":
                site.guest.start()
            site.guest.wait_ready()
            site.clear()


def _in_order(results: report.Figures) -> report.Figures:
    """As the parts name them, whatever was measured first."""
    known = [name for part in PARTS.values() for figure in part for name in figure.names]
    order = {name: place for place, name in enumerate(known)}
    return dict(sorted(results.items(), key=lambda each: order.get(each[0], len(order))))


def _tell(name: str, figure: dict[str, Any]) -> None:
    if figure["ours"] is None:
        console.print(f"  {name}: [red]not measured[/]: {figure['failed']}")
        return
    told = f"  {name}: {in_words(figure['ours'], figure['unit'])}"
    if figure["peer"] is not None:
        told += f", peer {in_words(figure['peer'], figure['unit'])} ({figure['peer_name']})"
        told += f", ratio {report.in_short(figure['ratio'])}"
    console.print(told)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
