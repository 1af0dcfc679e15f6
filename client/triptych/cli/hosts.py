"""`triptych host`: the libvirt hosts and what runs on them."""

from typing import Annotated

import typer

from triptych.cli.grammar import command, group
from triptych.cli.render import fields_of, plain, record, size, table
from triptych.cli.session import session_of

NAME = "host"
app = group("libvirt hosts, what each can do, and the domains on it.")

HostName = Annotated[str, typer.Argument(metavar="HOST", help="The host's name.")]


@command(app, "list")
def list_hosts(ctx: typer.Context) -> None:
    """List the hosts."""
    session = session_of(ctx)
    hosts = session.client.hosts.list()
    names = list(dict.fromkeys(name for host in hosts for name in host if name != "id"))
    session.emit_list(
        hosts,
        lambda: table(
            session.out,
            [name.replace("_", " ") for name in names],
            [[plain(name, host.get(name)) for name in names] for host in hosts],
        ),
        "No host has reported yet. Start the workers of one; it then shows up by itself.",
    )


@command(app, "show", "triptych host show kvm1")
def show(ctx: typer.Context, host: HostName) -> None:
    """Show what a host can do: reflink, quiesce, memory, free space."""
    session = session_of(ctx)
    found = session.client.hosts.get(host)
    session.emit(found, lambda: record(session.out, fields_of(found)))


@command(app, "domains", "triptych host domains kvm1")
def domains(ctx: typer.Context, host: HostName) -> None:
    """List the libvirt domains of a host, registered or not."""
    session = session_of(ctx)
    found = session.client.domains.list(host)
    session.emit_list(
        found,
        lambda: table(
            session.out,
            ["name", "state", "vcpus", "memory", "server", "uuid"],
            [
                [
                    plain("name", each.get("name")),
                    plain("state", each.get("state")),
                    plain("vcpus", each.get("vcpus")),
                    size(each.get("memory_bytes")),
                    plain("server", each.get("server")),
                    plain("uuid", each.get("uuid")),
                ]
                for each in found
            ],
        ),
        f"Host {host} has no domains.",
    )
