"""`triptych image`: full copies of servers' disks, kept until deleted."""

from typing import Annotated

import typer

from triptych.cli.grammar import (
    Description,
    ImageName,
    Limit,
    Quiesce,
    QuiesceOption,
    ServerName,
    Yes,
    command,
    group,
)
from triptych.cli.render import moment, plain, record, size, table
from triptych.cli.session import Session, session_of
from triptych.cli.wait import finish
from triptych.types import Image

NAME = "image"
app = group("Images: full, independent copies of servers, kept until deleted.")


@command(
    app,
    "create",
    "triptych image create web1",
    "triptych image create web1 --name golden --pin",
    long_work=True,
)
def create(
    ctx: typer.Context,
    server: ServerName,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="The image's name.")] = None,
    description: Description = None,
    pin: Annotated[bool, typer.Option("--pin", help="Keep it from every rotation.")] = False,
    quiesce: QuiesceOption = Quiesce.auto,
) -> None:
    """Make an image of a server, running or not."""
    session = session_of(ctx)
    operation = session.client.images.create(
        server, name=name, description=description, pinned=pin, quiesce=quiesce.value
    )
    finish(session, operation, server)


@command(app, "list", "triptych image list", "triptych image list web1")
def list_images(
    ctx: typer.Context,
    server: Annotated[
        str | None,
        typer.Argument(metavar="[SERVER]", help="Only this server's images.", show_default=False),
    ] = None,
    limit: Limit = None,
) -> None:
    """List the images, of all servers or of one."""
    session = session_of(ctx)
    images = session.client.images.list(server, limit=limit)
    sizes = ("size", "of its own")
    session.emit_list(
        images,
        lambda: table(
            session.out,
            ["name", "server", "created", "origin", "state", "pinned", *sizes, "proof", "id"],
            [
                [
                    each["name"],
                    plain("server", each.get("server")),
                    moment(each.get("created_at")),
                    plain("origin", each.get("origin")),
                    plain("state", each.get("state")),
                    plain("pinned", each.get("pinned")),
                    size(each.get("bytes")),
                    size(each.get("unique_bytes")),
                    plain("result", (each.get("proof") or {}).get("result")),
                    each["id"],
                ]
                for each in images
            ],
        ),
        "No images yet. Make one: triptych image create SERVER",
    )


@command(app, "show", "triptych image show golden")
def show(ctx: typer.Context, image: ImageName) -> None:
    """Show an image: what it holds, how it was made, whether it is proven."""
    session = session_of(ctx)
    found = session.client.images.get(image)
    session.emit(found, lambda: _show(session, found))


@command(app, "restore", "triptych image restore golden --yes", long_work=True)
def restore(ctx: typer.Context, image: ImageName, yes: Yes = False) -> None:
    """Put the original server back as it was. Its present state is set aside for 24 hours."""
    session = session_of(ctx)

    def question() -> str:
        found = session.client.images.get(image)
        return (
            f"Restore server {found.get('server')} to image {found.get('name', image)} of "
            f"{moment(found.get('created_at'))}? All that was written since is replaced; it is "
            "set aside for 24 hours."
        )

    session.confirm(question, yes)
    finish(session, session.client.images.restore(image), image)


@command(
    app,
    "verify",
    "triptych image verify golden",
    long_work=True,
)
def verify(
    ctx: typer.Context,
    image: ImageName,
    boot: Annotated[
        bool,
        typer.Option("--boot", help="Boot proof; refused in this version."),
    ] = False,
) -> None:
    """Check an image's disks against its manifest."""
    session = session_of(ctx)
    finish(session, session.client.images.verify(image, boot=boot), image, needs_proof=boot)


@command(app, "pin", "triptych image pin golden")
def pin(ctx: typer.Context, image: ImageName) -> None:
    """Keep an image from every rotation; it no longer counts in its schedule."""
    _update(session_of(ctx), image, "is pinned: no rotation deletes it", pinned=True)


@command(app, "unpin", "triptych image unpin golden")
def unpin(ctx: typer.Context, image: ImageName) -> None:
    """Let an image take part in its schedule's rotation again."""
    _update(session_of(ctx), image, "is no longer pinned", pinned=False)


@command(app, "rename", "triptych image rename golden golden-2")
def rename(
    ctx: typer.Context,
    image: ImageName,
    name: Annotated[str, typer.Argument(metavar="NEW_NAME", help="The new name.")],
    description: Description = None,
) -> None:
    """Give an image another name, and with --description another note."""
    _update(session_of(ctx), image, f"is now {name}", name=name, description=description)


@command(app, "delete", "triptych image delete golden --yes", long_work=True)
def delete(ctx: typer.Context, image: ImageName, yes: Yes = False) -> None:
    """Delete an image for good. Servers, clones and other images do not change."""
    session = session_of(ctx)
    session.confirm(lambda: f"Delete image {image} for good?", yes)
    finish(session, session.client.images.delete(image), image)


def _update(
    session: Session,
    image: str,
    told: str,
    *,
    name: str | None = None,
    description: str | None = None,
    pinned: bool | None = None,
) -> None:
    found = session.client.images.update(image, name=name, description=description, pinned=pinned)
    session.emit(found, lambda: session.say(f"Image {image} {told}."))


def _show(session: Session, image: Image) -> None:
    pause = image.get("pause_ms")
    record(
        session.out,
        [
            ("name", image["name"]),
            ("id", image["id"]),
            ("server", plain("server", image.get("server"))),
            ("created", moment(image.get("created_at"))),
            ("origin", plain("origin", image.get("origin"))),
            ("state", plain("state", image.get("state"))),
            ("pinned", plain("pinned", image.get("pinned"))),
            ("size", size(image.get("bytes"))),
            ("of its own", size(image.get("unique_bytes"))),
            ("consistency", plain("consistency", image.get("consistency"))),
            ("way", plain("way", image.get("way"))),
            ("pause", f"{pause:.0f} ms" if pause else "none"),
            ("verified", plain("verified", image.get("verified"))),
            ("boot proof", plain("proof", image.get("proof"))),
            ("left out", plain("left_out", image.get("left_out"))),
            ("description", plain("description", image.get("description"))),
        ],
    )
