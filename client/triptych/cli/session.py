"""What every command shares: the global options, the client, output, confirmation."""

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any, cast

import typer
from rich.console import Console

from triptych.cli.render import clean
from triptych.client import Client
from triptych.problem import Problem

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_REFUSED = 3
EXIT_UNREACHABLE = 4
EXIT_BUG = 70
EXIT_INTERRUPTED = 130

FLAGS = ("--json", "--no-wait")
VALUES = ("--url", "--token")


def hoist(arguments: Sequence[str]) -> tuple[list[str], bool]:
    """Moves the global options to the front, where the parser looks for them.

    So `triptych --json server list` and `triptych server list --json` are one. Returns the
    words in their new order and whether JSON was asked for. Nothing after `--` is touched.
    """
    front: list[str] = []
    rest: list[str] = []
    words = list(arguments)
    while words:
        word = words.pop(0)
        if word == "--":
            rest += [word, *words]
            break
        if word in FLAGS or word.partition("=")[0] in VALUES:
            front.append(word)
            if word in VALUES and words:
                front.append(words.pop(0))
        else:
            rest.append(word)
    return front + rest, "--json" in front


class Session:
    """One run of the command line. Results go to stdout, all else to stderr."""

    def __init__(
        self, *, as_json: bool, wait: bool, url: str | None = None, token: str | None = None
    ) -> None:
        self.as_json = as_json
        self.wait = wait
        self.url = url
        self.token = token
        self.out = _console(stderr=False)
        self.err = _console(stderr=True)
        self._client: Client | None = None

    @property
    def client(self) -> Client:
        if self._client is None:
            self._client = Client(self.url, self.token)
        return self._client

    def close(self) -> None:
        if self._client is not None:
            self._client.close()

    def say(self, text: str) -> None:
        """A result in words."""
        self.out.print(clean(text), markup=False, highlight=False)

    def note(self, text: str) -> None:
        """What helps a person and would hinder a script."""
        self.err.print(clean(text), markup=False, highlight=False)

    def emit(self, document: Any, show: Callable[[], None]) -> None:
        """The document itself with --json, else what `show` prints of it."""
        if self.as_json:
            print_json(document)
        else:
            show()

    def emit_list(self, items: Sequence[Any], show: Callable[[], None], nothing: str) -> None:
        """A list in the API's own form with --json, else a table, or `nothing` in words."""
        following = getattr(items, "next", None)
        if self.as_json:
            print_json({"items": list(items), "next": following})
            return
        if not items:
            self.note(nothing)
            return
        show()
        if following:
            self.note("There are more: --limit N shows further ones.")

    def confirm(self, question: Callable[[], str], yes: bool) -> None:
        """Lets pass what was agreed to. Without a terminal, only --yes agrees."""
        if yes:
            return
        if not sys.stdin.isatty():
            raise usage("confirmation_needed", "This destroys something. Add --yes to agree.")
        if not typer.confirm(clean(question()), err=True):
            self.note("Nothing was done.")
            raise typer.Exit(EXIT_USAGE)


def session_of(ctx: typer.Context) -> Session:
    return cast(Session, ctx.obj)


def usage(code: str, detail: str) -> Problem:
    """A problem that the command line itself has with what was asked."""
    return Problem(code, detail)


def print_json(document: Any, *, line: bool = False) -> None:
    """One document, indented; with `line` one line of JSON Lines, out at once."""
    print(json.dumps(document, ensure_ascii=False, indent=None if line else 2), flush=line)


def _console(*, stderr: bool) -> Console:
    """Without a terminal nothing is wrapped: a line stays a line for grep."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, soft_wrap=not stream.isatty(), highlight=False)
