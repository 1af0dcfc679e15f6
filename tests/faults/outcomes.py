"""What came of a walk: one table, also where its tests were divided into shares.

Each share writes what it did to a file. `python tests/faults/outcomes.py FOLDER` prints the table
of all of them, and fails if a test was left out or done twice, a case did not end well, there
are fewer cases than were promised, or a point of the code is in none.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

LEAST = 150
"""Distinct cases of a whole walk."""
ROOT = Path(__file__).parents[2]
ELSEWHERE = {"clone:edited", "defined", "stream:compressed"}
"""Points that no walk passes: it has no libguestfs (real guests in tests/guests do), no server
whose domain is gone (tests/system/test_tpm.py), and workers that do not compress
(tests/hypervisor/test_engine.py)."""


@dataclass
class Outcomes:
    """Of one share."""

    whole: bool
    wanted: list[str]
    """The tests of all shares."""
    shares: int = 1
    done: list[str] = field(default_factory=list)
    """The tests of this share that have passed."""
    cases: list[dict[str, Any]] = field(default_factory=list)

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self)))


def table(cases: list[dict[str, Any]]) -> list[str]:
    rows: dict[tuple[str, str], Counter[str]] = {}
    for case in cases:
        at = rows.setdefault((case["point"], case["fault"]), Counter())
        at[case["outcome"] or "FAILED"] += 1
    lines = []
    for (point, fault), outcomes in rows.items():
        told = ", ".join(f"{count} {state}" for state, count in sorted(outcomes.items()))
        lines.append(f"{point:34} {fault:12} {told}")
    longest = max(cases, key=lambda case: case["seconds"])
    which = " ".join(longest[each] for each in ("kind", "power", "point", "fault"))
    lines.append(
        f"{len(cases)} cases, {distinct(cases)} of them distinct, "
        f"{sum(not case['outcome'] for case in cases)} failures; the longest took "
        f"{longest['seconds']:.0f} s: {which}"
    )
    return lines


def distinct(cases: list[dict[str, Any]]) -> int:
    names = ("kind", "power", "way", "point", "fault")
    return len({tuple(case[each] for each in names) for case in cases})


def points_of(*folders: Path) -> set[str]:
    """The points that are named in the code; what is journalled has points by other names."""
    texts = (path.read_text() for folder in folders for path in folder.rglob("*.py"))
    return {name for text in texts for name in re.findall(r'faults\.point\(\s*"([^"]+)"', text)}


def passed_over(cases: list[dict[str, Any]], points: set[str]) -> list[str]:
    """What is wrong with the points that the cases were at."""
    missing = points - {case["point"] for case in cases} - ELSEWHERE
    said = [f"nothing was done at: {point}" for point in sorted(missing)]
    return said + [f"there is no such point: {point}" for point in sorted(ELSEWHERE - points)]


def complaints(found: list[Outcomes]) -> list[str]:
    """What is wrong with the shares of a walk."""
    if not found or len(found) != found[0].shares:
        return [f"only {len(found)} shares have ended"]
    said = []
    if any(each.wanted != found[0].wanted for each in found):
        said.append("the shares do not agree on what there is to do")
    times = Counter(test for each in found for test in each.done)
    said += [f"not done: {test}" for test in found[0].wanted if test not in times]
    said += [f"done {count} times: {test}" for test, count in times.items() if count > 1]
    cases = [case for each in found for case in each.cases]
    said += [f"failed: {case}" for case in cases if not case["outcome"]]
    if found[0].whole and distinct(cases) < LEAST:
        said.append(f"fewer than {LEAST} distinct cases")
    return said


def main(folder: Path) -> int:
    found = [Outcomes(**json.loads(path.read_text())) for path in sorted(folder.glob("*.json"))]
    cases = [case for each in found for case in each.cases]
    if cases:
        print("\nPoints and outcomes", *table(cases), sep="\n")
    said = complaints(found) + passed_over(cases, points_of(ROOT / "shared", ROOT / "services"))
    print(*said, sep="\n", end="\n" if said else "")
    return int(bool(said))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
