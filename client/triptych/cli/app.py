"""The root command and its global options; the commands themselves are one module a noun."""

from typing import Annotated

import typer

import triptych
from triptych.cli import (
    clones,
    events,
    farms,
    hosts,
    images,
    login,
    operations,
    schedules,
    servers,
    snapshots,
)
from triptych.cli.grammar import group
from triptych.cli.session import Session

app = group(
    "Snapshots, images and clones of libvirt/QEMU virtual machines.",
    epilog=(
        "The options above work before or after any command.\n\n"
        "Exit codes: 0 done, 1 the operation failed, 2 usage, 3 refused by the API, "
        "4 API unreachable, 70 a bug, 130 interrupted.\n\n"
        "Start with: triptych login http://host:port"
    ),
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"triptych {triptych.__version__}")
        raise typer.Exit


@app.callback()
def root(
    ctx: typer.Context,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print the API's answer: one JSON document, or JSON lines."),
    ] = False,
    no_wait: Annotated[
        bool,
        typer.Option("--no-wait", help="Start long work, print the operation's id and return."),
    ] = False,
    url: Annotated[
        str | None,
        typer.Option(metavar="URL", help="The API's address, instead of TRIPTYCH_URL."),
    ] = None,
    token: Annotated[
        str | None,
        typer.Option(
            metavar="TOKEN",
            help="The API token, instead of TRIPTYCH_TOKEN or TRIPTYCH_TOKEN_FILE, which other "
            "users of this machine cannot see.",
        ),
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    session = Session(as_json=as_json, wait=not no_wait, url=url, token=token)
    ctx.obj = session
    ctx.call_on_close(session.close)


login.register(app)
for noun in (hosts, servers, snapshots, images, clones, farms, schedules, operations):
    app.add_typer(noun.app, name=noun.NAME)
events.register(app)
