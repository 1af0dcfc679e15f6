"""How a problem is told: its code, the API's sentence, what to do, and the exit code."""

import sys
from typing import Any

from triptych.cli.render import clean
from triptych.cli.session import EXIT_REFUSED, EXIT_UNREACHABLE, EXIT_USAGE, print_json
from triptych.problem import Problem, Unreachable

BY_STATUS = {
    401: "Run `triptych login`, or set TRIPTYCH_TOKEN or TRIPTYCH_TOKEN_FILE.",
    403: "The token's role does not allow this. Ask an admin for one that does.",
}


def show(problem: Problem, *, as_json: bool) -> int:
    """Prints the problem (the document itself to stdout with --json); returns the exit code."""
    if as_json:
        print_json(problem.to_dict())
    for line in lines(problem):
        print(clean(line), file=sys.stderr)
    return exit_code(problem)


def exit_code(problem: Problem) -> int:
    if isinstance(problem, Unreachable):
        return EXIT_UNREACHABLE
    return EXIT_REFUSED if problem.status else EXIT_USAGE


def lines(problem: Problem) -> list[str]:
    told = [f"error: {problem.code}: {problem.detail}"]
    told += [f"  {_field(error)}" for error in problem.errors]
    if hint := BY_STATUS.get(problem.status):
        told.append(hint)
    if problem.conflict:
        told.append(f"In the way: {_reference(problem.conflict)}")
    if problem.operation:
        operation = _reference(problem.operation)
        if isinstance(problem, Unreachable):
            told.append(f"The operation goes on. Watch it: triptych operation watch {operation}")
        else:
            told.append(f"Look at the operation: triptych operation show {operation}")
    return told


def _field(error: Any) -> str:
    """One request field at fault, in the shape that pydantic made common or any other."""
    if not isinstance(error, dict):
        return str(error)
    place = error.get("field") or error.get("loc") or error.get("pointer") or ""
    if isinstance(place, list):
        place = ".".join(str(part) for part in place if part != "body")
    words = error.get("message") or error.get("msg") or error.get("detail") or ""
    return f"{place}: {words}" if place and words else str(place or words or error)


def _reference(value: Any) -> str:
    return str(value.get("id", value)) if isinstance(value, dict) else str(value)
