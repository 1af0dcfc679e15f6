"""`triptych clone`: living servers made from a server, its snapshot or an image."""

from enum import StrEnum
from typing import Annotated, Any

import typer

from triptych.cli.grammar import Limit, Quiesce, Ttl, Yes, command, group
from triptych.cli.render import moment, plain, record, table, with_reason
from triptych.cli.session import Session, session_of
from triptych.cli.wait import finish
from triptych.types import Clone

NAME = "clone"
CloneName = Annotated[str, typer.Argument(metavar="CLONE", help="The clone's name or id.")]
app = group("Clones: new servers of their own, made from a server, its snapshot or an image.")


class Source(StrEnum):
    server = "server"
    snapshot = "snapshot"
    image = "image"


@command(
    app,
    "create",
    "triptych clone create web1 --name staging",
    "triptych clone create web1 --count 10 --name 'qa-{n:03}'",
    "triptych clone create web1 --count 5 --name 'qa-{n:03}' --first 11",
    "triptych clone create web1 --count 10 --name 'qa-{n:03}' --with-memory",
    "triptych clone create golden --from image --count 20 --name 'ci-{n}' --ttl 8h",
    "triptych clone create golden --from image --name web2 --vcpus 4 --memory-mib 8192",
    long_work=True,
)
def create(
    ctx: typer.Context,
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="The server or the image, by name or id.")
    ],
    name: Annotated[
        str,
        typer.Option(
            metavar="PATTERN",
            help="The clone's name; for several with their number, as in 'qa-{n:03}'.",
        ),
    ],
    origin: Annotated[
        Source,
        typer.Option("--from", help="What SOURCE names; for snapshot, the server that has it."),
    ] = Source.server,
    count: Annotated[
        int, typer.Option(min=1, max=100, metavar="N", help="How many, 1 to 100.")
    ] = 1,
    first: Annotated[
        int | None,
        typer.Option(min=0, metavar="N", help="The number of the first.", show_default="1"),
    ] = None,
    vcpus: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Virtual CPUs.", show_default="as the source"),
    ] = None,
    memory_mib: Annotated[
        int | None,
        typer.Option(min=64, metavar="MIB", help="RAM in MiB.", show_default="as the source"),
    ] = None,
    with_memory: Annotated[
        bool,
        typer.Option("--with-memory", help="Run on from the instant of the source, with its RAM."),
    ] = False,
    linked: Annotated[
        bool,
        typer.Option(
            "--linked",
            help="Where disks cannot share extents: one copy that all clones stand on, instead "
            "of a copy for each.",
        ),
    ] = False,
    start: Annotated[
        bool | None,
        typer.Option("--start/--no-start", help="Start the clones.", show_default="start"),
    ] = None,
    identity: Annotated[
        str | None,
        typer.Option(
            metavar="HOW",
            help="Renew hostname, machine-id, SSH host keys and DHCP state: by agent, cloud-init "
            "or offline, by what the guest offers (auto), or leave them (keep).",
            show_default="auto",
        ),
    ] = None,
    quiesce: Annotated[
        Quiesce | None,
        typer.Option(
            help="Freeze the file systems of a server that runs for the copy: where its agent can "
            "(auto), or fail (require), or not at all (never).",
            show_default="auto",
        ),
    ] = None,
    ttl: Ttl = None,
) -> None:
    """Make one or more clones, each isolated from its source and the others."""
    session = session_of(ctx)
    operation = session.client.clones.create(
        source,
        name=name,
        source_kind=origin.value,
        count=count,
        first=first,
        vcpus=vcpus,
        memory_mib=memory_mib,
        with_memory=with_memory,
        linked=linked,
        start=start,
        identity=identity,
        quiesce=quiesce.value if quiesce else None,
        expires_in_h=ttl,
    )
    finish(session, operation, source)


@command(app, "list")
def list_clones(ctx: typer.Context, limit: Limit = None) -> None:
    """List the clones and where each came from."""
    session = session_of(ctx)
    clones = session.client.clones.list(limit=limit)
    session.emit_list(
        clones,
        lambda: table(
            session.out,
            ["name", "state", "from", "created", "memory", "server", "id"],
            [
                [
                    each["name"],
                    plain("state", each.get("state")),
                    _source(each),
                    moment(each.get("created_at")),
                    plain("with_memory", each.get("with_memory")),
                    plain("server", each.get("server")),
                    each["id"],
                ]
                for each in clones
            ],
        ),
        "No clones yet. Make one: triptych clone create SERVER --name NAME",
    )


@command(app, "show", "triptych clone show qa-001")
def show(
    ctx: typer.Context,
    clone: CloneName,
) -> None:
    """Show a clone: from what, when, how, and what of its identity is its own."""
    session = session_of(ctx)
    found = session.client.clones.get(clone)
    session.emit(found, lambda: _show(session, found))


@command(app, "delete", "triptych clone delete qa-001 --yes", long_work=True)
def delete(ctx: typer.Context, clone: CloneName, yes: Yes = False) -> None:
    """Delete a clone: its VM, the files that were made for it, and its snapshot."""
    session = session_of(ctx)
    session.confirm(lambda: f"Delete clone {clone} for good, with its disks? Its images stay.", yes)
    finish(session, session.client.clones.delete(clone), clone)


def _source(clone: Clone) -> str:
    source = clone.get("source") or {}
    return f"{source.get('kind', '')} {source.get('id', '')}".strip() or "–"


def _parts(parts: list[Any] | None) -> str:
    return "; ".join(map(with_reason, parts or [])) or "–"


def _show(session: Session, clone: Clone) -> None:
    identity = clone.get("identity") or {}
    record(
        session.out,
        [
            ("name", clone["name"]),
            ("id", clone["id"]),
            ("server", plain("server", clone.get("server"))),
            ("host", plain("host", clone.get("host"))),
            ("state", plain("state", clone.get("state"))),
            ("farm", plain("farm", clone.get("farm"))),
            ("from", _source(clone)),
            ("created", moment(clone.get("created_at"))),
            ("memory", plain("with_memory", clone.get("with_memory"))),
            ("linked to", plain("linked_to", clone.get("linked_to"))),
            ("hostname", plain("hostname", identity.get("hostname"))),
            ("renewed", plain("renewed", identity.get("renewed"))),
            ("pending", _parts(identity.get("pending"))),
            ("kept", _parts(identity.get("kept"))),
            ("left out", _parts(identity.get("left_out"))),
            ("error", plain("error", clone.get("error"))),
        ],
    )
