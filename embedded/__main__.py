"""`python -m embedded up|down|status`: what `make up` and `make down` call."""

import os
import sys
from pathlib import Path

from embedded.stack import ROOT, AlreadyRunning, Stack, StackError


def main() -> int:
    action = sys.argv[1] if len(sys.argv) > 1 else ""
    stack = Stack(ROOT / ".triptych", port=int(os.environ.get("PORT", "8000")))
    try:
        if action == "up":
            stack.start()
            _greet(stack)
        elif action == "down":
            stack.stop()
            print("Triptych is down. Your VMs, copies and database are untouched.")
        elif action == "status":
            print("up" if stack.running() else "down")
            return 0 if stack.running() else 3
        else:
            print(__doc__, file=sys.stderr)
            return 2
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
    print(
        f"Triptych is up at {stack.url} (API documentation: {stack.url}/docs).\n"
        f"Use it:   . {env} && .venv/bin/triptych host list\n"
        "Stop it:  make down"
    )


if __name__ == "__main__":
    sys.exit(main())
