"""`python -m embedded up|down|status [--state DIRECTORY]`: what `make up` and `make down` call."""

import argparse
import os
import sys
from pathlib import Path

from embedded.stack import ROOT, AlreadyRunning, Stack, StackError

STATE = ROOT / ".triptych"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m embedded")
    parser.add_argument("action", choices=("up", "down", "status"))
    parser.add_argument("--state", type=Path, default=STATE, help="where it keeps its things")
    arguments = parser.parse_args()
    action = arguments.action
    stack = Stack(arguments.state.absolute(), port=int(os.environ.get("PORT", "8000")))
    try:
        if action == "up":
            stack.start()
            _greet(stack)
        elif action == "down":
            stack.stop()
            print("Triptych is down. Your VMs, copies and database are untouched.")
        else:
            print("up" if stack.running() else "down")
            return 0 if stack.running() else 3
    except AlreadyRunning as error:
        print(f"triptych: {error}", file=sys.stderr)
        return 1
    except StackError as error:
        print(f"triptych: {error}", file=sys.stderr)
        if action == "up":
            stack.stop()
        return 1
    return 0


def _greet(stack: Stack) -> None:
    try:
        env = (stack.state / "env").relative_to(Path.cwd())
    except ValueError:
        env = stack.state / "env"
    stop = "make down" if stack.state == STATE else f"python -m embedded down --state {stack.state}"
    print(
        f"Triptych is up at {stack.url} (API documentation: {stack.url}/docs).\n"
        f"Copies go to {stack.environment['TRIPTYCH_VAULT']}\n"
        f"Use it:   . {env} && .venv/bin/triptych host list\n"
        f"Stop it:  {stop}"
    )


if __name__ == "__main__":
    sys.exit(main())
