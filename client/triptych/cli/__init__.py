"""The command line. `main` runs it; every way out has its exit code and no traceback.

0 done · 1 the operation failed · 2 usage · 3 refused by the API · 4 API unreachable ·
70 a bug · 130 interrupted.
"""

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from triptych.cli import errors
from triptych.cli.app import app
from triptych.cli.session import EXIT_BUG, EXIT_INTERRUPTED, hoist
from triptych.problem import Problem


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs one command line and exits."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    words, as_json = hoist(given)
    try:
        app(words, prog_name="triptych")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    except Problem as problem:
        code = errors.show(problem, as_json=as_json)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        code = EXIT_INTERRUPTED
    except BrokenPipeError:
        code = 0
    except Exception as error:
        if os.environ.get("TRIPTYCH_DEBUG"):
            raise
        print(
            f"error: triptych itself went wrong ({type(error).__name__}: {error}). "
            "Set TRIPTYCH_DEBUG=1 to see where, and please report it.",
            file=sys.stderr,
        )
        code = EXIT_BUG
    _close_stdout()
    sys.exit(code)


def _close_stdout() -> None:
    """Flushes now; a reader that has gone (`| head`) is no error."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
