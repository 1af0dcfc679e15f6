"""How values look to people: sizes, times, durations, tables."""

import re
from collections.abc import Sequence
from datetime import UTC, datetime, tzinfo
from typing import Any
from zoneinfo import ZoneInfo

from rich.console import Console
from rich.table import Table
from rich.text import Text

CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")


def clean(text: str) -> str:
    """The text without control characters: a guest's words must not steer the terminal."""
    return CONTROL.sub("�", text)


def size(count: float | None) -> str:
    """Bytes in binary units: 1536 is 1.5 KiB."""
    if count is None:
        return "–"
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB", "PiB"]
    while abs(value) >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{value:.1f} {units[0]}"


def duration(seconds: float) -> str:
    """Seconds in the two largest units that say something."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    # Rounded to the smaller of the two units, so that 48 h less a moment is 2 d.
    step = 3600 if seconds >= 86400 else 60 if seconds >= 3600 else 1
    whole = round(seconds / step) * step
    days, hours, minutes, rest = whole // 86400, whole // 3600 % 24, whole // 60 % 60, whole % 60
    parts = [(days, "d"), (hours, "h"), (minutes, "min"), (rest, "s")]
    while not parts[0][0]:
        parts.pop(0)
    return " ".join(f"{count} {unit}" for count, unit in parts[:2] if count)


def parse(text: str) -> datetime:
    """An RFC 3339 time as the API writes it."""
    moment = datetime.fromisoformat(text)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def moment(text: str | None, zone: str | None = None) -> str:
    """A time where the reader is, or in the named zone."""
    if not text:
        return "–"
    try:
        return parse(text).astimezone(_zone(zone)).strftime("%Y-%m-%d %H:%M:%S %Z")
    except ValueError:
        return text


def distance(text: str) -> str:
    """How far a time is from now: `in 2 h 5 min`, `12 min ago`."""
    try:
        seconds = (parse(text) - datetime.now(UTC)).total_seconds()
    except ValueError:
        return text
    return f"in {duration(seconds)}" if seconds >= 0 else f"{duration(-seconds)} ago"


def between(start: str | None, end: str | None) -> float | None:
    """Seconds from one time to another, or to now."""
    if not start:
        return None
    until = parse(end) if end else datetime.now(UTC)
    return max(0.0, (until - parse(start)).total_seconds())


def plain(name: str, value: Any) -> str:
    """Any field of an answer in words, by what its name says it is."""
    if value is None or value == "":
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float) and (name == "bytes" or name.endswith("bytes")):
        return size(value)
    if isinstance(value, str) and name.endswith("_at"):
        return moment(value)
    if isinstance(value, dict):
        inner = (f"{key} {plain(key, each)}" for key, each in value.items())
        return ", ".join(inner) or "–"
    if isinstance(value, list):
        return "; ".join(plain(name, each) for each in value) or "–"
    return str(value)


def with_reason(value: Any) -> str:
    """What was left out, or left as it was, and why: `sda (CD-ROM)`."""
    if not isinstance(value, dict):
        return str(value)
    return f"{part_of(value)} ({value['reason']})" if value.get("reason") else part_of(value)


def part_of(value: dict[str, Any]) -> str:
    """What such an entry is about."""
    names = (value.get(key) for key in ("part", "target", "path", "name"))
    return str(next(filter(None, names), "a disk"))


def table(console: Console, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns without lines; without a terminal, nothing is cut or wrapped."""
    cells = [[clean(cell) for cell in row] for row in rows]
    if console.is_terminal:
        grid = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
        for head in heads:
            grid.add_column(head, overflow="fold")
        for row in cells:
            grid.add_row(*(Text(cell) for cell in row))
        console.print(grid)
        return
    lines = [list(heads), *cells]
    widths = [max(len(line[at]) for line in lines) for at in range(len(heads))]
    for line in lines:
        padded = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        text = "  ".join(padded).rstrip()
        console.print(text, markup=False, highlight=False, soft_wrap=True)


def record(console: Console, fields: Sequence[tuple[str, str]]) -> None:
    """One thing, a field a line."""
    width = max(len(name) for name, _ in fields)
    for name, value in fields:
        line = Text(f"{name.ljust(width)}  ", style="bold") + Text(clean(value), style="not bold")
        console.print(line, soft_wrap=True)


def fields_of(document: dict[str, Any]) -> list[tuple[str, str]]:
    """All fields of an answer, nested ones flattened by one level."""
    rows: list[tuple[str, str]] = []
    for name, value in document.items():
        if isinstance(value, dict) and value:
            rows += [(f"{name}.{key}", plain(key, each)) for key, each in value.items()]
        else:
            rows.append((name, plain(name, value)))
    return [(name.replace("_", " "), value) for name, value in rows]


def _zone(name: str | None) -> tzinfo | None:
    if not name:
        return None
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        return None
