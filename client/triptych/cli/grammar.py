"""How commands are declared: the same help layout and the same spelling everywhere."""

import re
from collections.abc import Callable
from enum import StrEnum
from typing import Annotated, Any, TypeVar

import typer

Function = TypeVar("Function", bound=Callable[..., Any])

GLOBALS = "Also takes --json, --url and --token (see triptych --help)."
GLOBALS_LONG_WORK = "Also takes --json, --no-wait, --url and --token (see triptych --help)."

ServerName = Annotated[str, typer.Argument(metavar="SERVER", help="The server's name or id.")]
ImageName = Annotated[str, typer.Argument(metavar="IMAGE", help="The image's name or id.")]
OperationId = Annotated[str, typer.Argument(metavar="ID", help="The operation's id.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")]
Limit = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="At most this many.", show_default="all")
]
Description = Annotated[
    str | None, typer.Option(metavar="TEXT", help="A note for those who come later.")
]


HOURS = {"m": 1 / 60, "h": 1.0, "d": 24.0}


def hours(text: str) -> float:
    """`90m`, `8h` or `3d`, in hours."""
    if found := re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([mhd])", text.strip()):
        return float(found[1]) * HOURS[found[2]]
    raise typer.BadParameter(f"{text!r} is no time such as 90m, 8h or 3d")


Ttl = Annotated[
    float | None,
    typer.Option(
        "--ttl",
        metavar="TIME",
        parser=hours,
        help="How long until it is deleted by itself: 90m, 8h, 3d.",
        show_default="for ever",
    ),
]


class Quiesce(StrEnum):
    auto = "auto"
    require = "require"
    never = "never"


QuiesceOption = Annotated[
    Quiesce,
    typer.Option(
        help="Freeze the guest's file systems for the copy: where its agent can (auto), "
        "or fail (require), or not at all (never)."
    ),
]


class ScheduleKind(StrEnum):
    daily = "daily"
    weekly = "weekly"


class Weekday(StrEnum):
    mon = "mon"
    tue = "tue"
    wed = "wed"
    thu = "thu"
    fri = "fri"
    sat = "sat"
    sun = "sun"


class Require(StrEnum):
    complete = "complete"
    verified = "verified"


def group(help: str, epilog: str | None = None) -> typer.Typer:
    return typer.Typer(
        help=help,
        epilog=epilog,
        no_args_is_help=True,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        add_completion=epilog is not None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )


def command(
    app: typer.Typer, name: str, *examples: str, long_work: bool = False
) -> Callable[[Function], Function]:
    """A command with its examples; the first line of the docstring is its summary."""
    shown = [f"Example: {example}" for example in examples]
    epilog = "\n\n".join([*shown, GLOBALS_LONG_WORK if long_work else GLOBALS])

    def declare(function: Function) -> Function:
        settings = {"help_option_names": ["-h", "--help"]}
        app.command(name, epilog=epilog, context_settings=settings)(function)
        return function

    return declare
