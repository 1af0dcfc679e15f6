"""`make faults` divides its tests into shares that run side by side, and leaves none out."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from faults.conftest import SHARES
from faults.outcomes import ELSEWHERE, LEAST, Outcomes, complaints, passed_over, points_of

ROOT = Path(__file__).resolve().parents[1]
WELL = {"kind": "image.create", "power": "running", "way": "reflink", "fault": "kill"}
CASES = [
    {**WELL, "point": str(number), "outcome": "succeeded", "seconds": 1.0}
    for number in range(LEAST)
]
FIRST = Outcomes(True, ["one", "two"], 2, ["one"], CASES[:100])
SECOND = Outcomes(True, ["one", "two"], 2, ["two"], CASES[100:])


def chosen_for(share: str, whole: str) -> list[str]:
    wanted = {"TRIPTYCH_FAULTS_SHARE": share, "TRIPTYCH_FAULTS_ALL": whole}
    command = [sys.executable, "-m", "pytest", "tests/faults", "--collect-only", "-q"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **wanted}, capture_output=True, text=True
    )
    return [line for line in done.stdout.splitlines() if "::" in line]


@pytest.mark.parametrize("whole", ["0", "1"])
def test_each_test_is_in_exactly_one_share(whole: str) -> None:
    """Of the whole walk, and of its part."""
    shares = [chosen_for(str(share), whole) for share in range(1, SHARES + 1)]

    assert all(shares)
    assert sorted(chosen_for("0", whole)) == sorted(itertools.chain(*shares))


def test_shares_that_did_all_are_well() -> None:
    assert complaints([FIRST, SECOND]) == []


@pytest.mark.parametrize(
    ("shares", "said"),
    [
        ([], "only 0 shares have ended"),
        ([FIRST], "only 1 shares have ended"),
        ([FIRST, replace(SECOND, wanted=["two"])], "do not agree"),
        ([FIRST, replace(SECOND, done=[])], "not done: two"),
        ([FIRST, replace(SECOND, done=["one", "two"])], "done 2 times: one"),
        ([FIRST, replace(SECOND, cases=[*CASES[100:], {**CASES[0], "outcome": ""}])], "failed: "),
        ([FIRST, replace(SECOND, cases=CASES[101:])], f"fewer than {LEAST} distinct cases"),
    ],
)
def test_what_is_missing_is_told(shares: list[Outcomes], said: str) -> None:
    """A share that ended early, a test left out or done twice, a case not ended well."""
    found = complaints(shares)

    assert len(found) == 1
    assert said in found[0]


def test_a_point_that_is_passed_over_is_told() -> None:
    """And one that is said to be tested elsewhere, and is no point any more."""
    code = points_of(ROOT / "shared", ROOT / "services")
    cases = [{"point": point} for point in code - ELSEWHERE]
    assert len(code) > 40
    assert passed_over(cases, code) == []
    left = cases.pop()["point"]
    assert passed_over(cases, code) == [f"nothing was done at: {left}"]
    (gone, *_) = ELSEWHERE
    assert passed_over(cases, {*code} - {left, gone}) == [f"there is no such point: {gone}"]
