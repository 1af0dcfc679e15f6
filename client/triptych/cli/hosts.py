"""`triptych host`: the libvirt hosts, what runs on them, and taking one out of service."""

from typing import Annotated, Any

import typer
from rich.text import Text

from triptych.cli.grammar import command, group
from triptych.cli.render import clean, distance, fields_of, plain, record, size, table
from triptych.cli.session import EXIT_FAILED, EXIT_INTERRUPTED, Session, print_json, session_of
from triptych.types import Host

NAME = "host"
app = group("libvirt hosts, what each can do, and the domains on it.")

HostName = Annotated[str, typer.Argument(metavar="HOST", help="The host's name.")]


@command(app, "list")
def list_hosts(ctx: typer.Context) -> None:
    """List the hosts."""
    session = session_of(ctx)
    hosts = session.client.hosts.list()
    facts = ("reflink", "quiesce", "memory", "libvirt", "qemu", "vault")
    session.emit_list(
        hosts,
        lambda: table(
            session.out,
            ["name", "state", "queued", "running", *facts, "copies", "free"],
            [
                [
                    host["name"],
                    _state(host),
                    *(str(count) for count in _load(host)),
                    *(plain(name, host.get(name)) for name in facts),
                    _copies(host),
                    f"{size(host.get('free_bytes'))} of {size(host.get('total_bytes'))}",
                ]
                for host in hosts
            ],
        ),
        "No host has reported yet. Start the workers of one; it then shows up by itself.",
    )


@command(app, "show", "triptych host show kvm1")
def show(ctx: typer.Context, host: HostName) -> None:
    """Show what a host can do: reflink, quiesce, memory, space used and free."""
    session = session_of(ctx)
    found = session.client.hosts.get(host)
    session.emit(found, lambda: record(session.out, [("state", _state(found)), *fields_of(found)]))


@command(app, "drain", "triptych host drain kvm1", long_work=True)
def drain(ctx: typer.Context, host: HostName) -> None:
    """Let a host take no new work, and wait until it has none left: then it can be serviced."""
    session = session_of(ctx)
    found = session.client.hosts.drain(host)
    if not session.wait:
        session.emit(found, lambda: session.say(f"Host {host} is draining: {_left(found)}."))
        return
    try:
        found = _watch(session, host)
    except KeyboardInterrupt:
        session.note(
            f"\nNo longer waiting; host {host} goes on draining.\n"
            f"  triptych host drain {host}   waits again\n"
            f"  triptych host resume {host}  lets it take work again"
        )
        raise typer.Exit(EXIT_INTERRUPTED) from None
    _conclude(session, found)


@command(app, "resume", "triptych host resume kvm1")
def resume(ctx: typer.Context, host: HostName) -> None:
    """Let a host that was drained take new work again."""
    session = session_of(ctx)
    found = session.client.hosts.resume(host)
    session.emit(
        found, lambda: session.say(f"Host {host} takes new work. It is {_state(found)} now.")
    )


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


def _watch(session: Session, host: str) -> Host:
    """A line that changes on a terminal, elsewhere one line per change."""
    last = ""
    with session.err.status(Text(f"{host}: asking")) as status:

        def show(found: Host) -> None:
            nonlocal last
            words = f"{host} is {_state(found)}: {_left(found)}"
            status.update(Text(clean(words)))
            if words != last and not session.err.is_terminal:
                session.note(words)
            last = words

        return session.client.wait_drained(host, show)


def _conclude(session: Session, host: Host) -> None:
    """Tells how the drain ended; exits with 1 where work is left that cannot end by itself."""
    name = host["name"]
    done = host["draining"] and not any(_load(host))
    if session.as_json:
        print_json(host)
    elif done:
        session.say(
            f"Host {name} is drained: nothing is queued or running there. Its workers may be "
            f"stopped now. `triptych host resume {name}` lets it take work again."
        )
    elif not host["draining"]:
        session.note(f"error: Host {name} was resumed meanwhile; {_left(host)}.")
    else:
        session.note(
            f"error: Host {name} is {_state(host)}, so its work cannot end: {_left(host)}. It "
            f"goes on draining. Start its workers and run `triptych host drain {name}` again, or "
            "cancel what is queued (`triptych operation list --state queued`)."
        )
    if not done:
        raise typer.Exit(EXIT_FAILED)


def _load(host: Host) -> tuple[int, int]:
    operations: dict[str, Any] = host.get("operations") or {}
    return operations.get("queued", 0), operations.get("running", 0)


def _copies(host: Host) -> str:
    """How many the vault holds, and what of them is shared with nothing."""
    used: dict[str, Any] = host.get("vault_usage") or {}
    if not used:
        return "–"
    return f"{used['copies']} of {size(used['apparent_bytes'])}, own {size(used['unique_bytes'])}"


def _left(host: Host) -> str:
    queued, running = _load(host)
    return f"{queued} queued and {running} running"


def _state(host: Host) -> str:
    """Draining, silence and problem in a few words."""
    words = ["draining"] if host.get("draining") else []
    if host.get("silent"):
        seen = host.get("last_seen_at")
        words.append(f"silent (last seen {distance(seen)})" if seen else "silent (never seen)")
    if host.get("problem"):
        words.append(host["problem"])
    return ", ".join(words or ["answering"])
