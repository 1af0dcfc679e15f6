"""`triptych server`: libvirt domains registered with Triptych."""

from typing import Annotated

import typer

from triptych.cli.grammar import Limit, ServerName, Yes, command, group
from triptych.cli.render import plain, record, size, table
from triptych.cli.session import Session, session_of, usage
from triptych.types import Forgotten, Server

NAME = "server"
app = group("Servers: the libvirt domains that Triptych may copy.")


@command(app, "list", "triptych server list --unprotected")
def list_servers(
    ctx: typer.Context,
    limit: Limit = None,
    unprotected: Annotated[
        bool,
        typer.Option(
            "--unprotected", help="Only those without an image as new as their schedules promise."
        ),
    ] = False,
) -> None:
    """List the registered servers."""
    session = session_of(ctx)
    servers = session.client.servers.list(unprotected=unprotected or None, limit=limit)
    session.emit_list(
        servers,
        lambda: table(
            session.out,
            ["name", "host", "state", "vcpus", "memory", "snapshot", "newest image", "id"],
            [
                [
                    each["name"],
                    plain("host", each.get("host")),
                    plain("state", each.get("state")),
                    plain("vcpus", each.get("vcpus")),
                    size(each.get("memory_bytes")),
                    "yes" if each.get("snapshot") else "–",
                    plain("newest_image", each.get("newest_image")),
                    each["id"],
                ]
                for each in servers
            ],
        ),
        "Every server with a schedule has an image as new as that promises."
        if unprotected
        else "No servers yet. Register one: triptych server add DOMAIN",
    )


@command(app, "add", "triptych server add web1", "triptych server add web1 --host kvm1")
def add(
    ctx: typer.Context,
    domain: Annotated[
        str, typer.Argument(metavar="DOMAIN", help="The libvirt domain's name or UUID.")
    ],
    host: Annotated[
        str | None,
        typer.Option(metavar="HOST", help="The host it is on; needed where there are several."),
    ] = None,
) -> None:
    """Register a libvirt domain as a server. Nothing is done to the VM."""
    session = session_of(ctx)
    server = session.client.servers.add(host or _only_host(session), domain)
    session.emit(
        server,
        lambda: session.say(
            f"Server {server['name']} ({server['id']}) on host {server.get('host')} is "
            f"registered. Take a snapshot: triptych snapshot take {server['name']}"
        ),
    )


@command(app, "show", "triptych server show web1")
def show(ctx: typer.Context, server: ServerName) -> None:
    """Show a server: its state, size, disks and copies."""
    session = session_of(ctx)
    found = session.client.servers.get(server)
    session.emit(found, lambda: _show(session, found))


@command(app, "forget", "triptych server forget web1 --yes")
def forget(ctx: typer.Context, server: ServerName, yes: Yes = False) -> None:
    """End a server's registration. The VM and its images stay."""
    session = session_of(ctx)
    session.confirm(lambda: f"Forget server {server}? Its VM and its images stay.", yes)
    found = session.client.servers.forget(server)
    session.emit(
        {"server": server, "forgotten": True, **found}, lambda: session.say(_left_behind(found))
    )


def _left_behind(server: Forgotten) -> str:
    text = f"Server {server['name']} is forgotten; the VM was not touched."
    if schedules := server.get("schedules_ended"):
        text += f" Ended with it: its {' and '.join(schedules)} schedule."
    if kept := server.get("images_kept"):
        images = "1 image stays" if kept == 1 else f"{kept} images stay"
        text += (
            f" {images} ({size(server.get('images_kept_bytes'))}): "
            f"triptych image list {server['id']}"
        )
    return text


def _only_host(session: Session) -> str:
    hosts = session.client.hosts.list()
    names = [str(host.get("name") or host["id"]) for host in hosts]
    if not names:
        raise usage("host_missing", "No host has reported yet: start the workers of one first.")
    if len(names) > 1:
        raise usage("host_ambiguous", f"Say which host with --host: {', '.join(names)}.")
    return names[0]


def _show(session: Session, server: Server) -> None:
    rows = [
        ("name", server["name"]),
        ("id", server["id"]),
        ("host", plain("host", server.get("host"))),
        ("domain", plain("domain", server.get("domain"))),
        ("uuid", plain("uuid", server.get("uuid"))),
        ("state", plain("state", server.get("state"))),
        ("vcpus", plain("vcpus", server.get("vcpus"))),
        ("memory", size(server.get("memory_bytes"))),
        ("snapshot", plain("snapshot", server.get("snapshot"))),
        ("newest image", plain("newest_image", server.get("newest_image"))),
    ]
    record(session.out, rows)
    if disks := server.get("disks"):
        session.say("")
        table(
            session.out,
            ["disk", "format", "capacity", "writable", "path"],
            [
                [
                    plain("target", disk.get("target")),
                    plain("format", disk.get("format")),
                    size(disk.get("capacity_bytes")),
                    plain("writable", disk.get("writable")),
                    plain("path", disk.get("path")),
                ]
                for disk in disks
            ],
        )
