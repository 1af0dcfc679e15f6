"""`triptych login`: which API, and the token for it, checked and then stored."""

import sys
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import typer

from triptych.cli.grammar import command
from triptych.cli.session import Session, session_of, usage
from triptych.client import Client
from triptych.config import Access, check_token, check_url, save_login


def register(app: typer.Typer) -> None:
    command(
        app,
        "login",
        "triptych login http://127.0.0.1:8000",
        "triptych login https://triptych.example.org < token.txt",
    )(login)


def login(
    ctx: typer.Context,
    url: Annotated[
        str | None, typer.Argument(metavar="URL", help="The API's address.", show_default=False)
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Read the token from this file.")
    ] = None,
) -> None:
    """Store the API's address and a token for all later commands.

    The token is asked for without showing it, or read from standard input where that is no
    terminal. Both are tried before they are stored, in triptych/config.json under
    XDG_CONFIG_HOME, which only you can read.
    """
    session = session_of(ctx)
    address = url or session.url
    if not address:
        if not sys.stdin.isatty():
            raise usage("url_missing", "Name the API: triptych login URL.")
        address = typer.prompt("API address (http://host:port)", err=True)
    address = check_url(str(address))
    secret = _token(session, token_file)
    with Client(address, secret) as client:
        client.servers.list(limit=1)
    path = save_login(Access(address, secret))
    parts = urlsplit(address)
    if parts.scheme == "http" and parts.hostname not in ("localhost", "127.0.0.1", "::1"):
        session.note("warning: http:// sends the token in the clear; prefer https://.")
    session.emit(
        {"url": address, "config": str(path)},
        lambda: session.say(f"Logged in to {address}; stored in {path}."),
    )


def _token(session: Session, token_file: Path | None) -> str:
    if session.token:
        text = session.token
    elif token_file:
        try:
            text = token_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise usage("token_file_unreadable", f"{token_file}: {error}.") from error
    elif sys.stdin.isatty():
        text = typer.prompt("Token", hide_input=True, err=True)
    else:
        text = sys.stdin.readline()
    if not text.strip():
        raise usage("token_missing", "No token was given. Pass --token-file, or pipe it in.")
    return check_token(text)
