"""Results for people: a table in `README.md` and a plot each part, made of the file of results."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from bench.result import in_words

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
Figures = dict[str, dict[str, Any]]

_WIDTH, _BAR, _GAP, _NAMES, _NUMBERS = 860, 14, 34, 290, 120
_STYLE = """\
text { font: 12px system-ui, sans-serif; fill: #1f2328 }
.peer { fill: #8c959f } .ours { fill: #0969da } .soft { fill: #59636e }
@media (prefers-color-scheme: dark) { text { fill: #f0f6fc } .soft { fill: #9198a1 }
  .ours { fill: #4493f8 } }"""


def write(
    folder: Path, results: Figures, machine: dict[str, Any], order: Sequence[str] = ()
) -> None:
    """Bring `README.md` and `plots/` in `folder` up to date with the parts that are in `results`.

    The text around the tables stays, and so do the sections of other parts, as an earlier run
    left them, here or elsewhere. They stand in the `order` of the parts that it names.
    """
    plots = folder / "plots"
    plots.mkdir(exist_ok=True)
    readme = folder / "README.md"
    before = readme.read_text() if readme.exists() else f"{BEGIN}\n{END}\n"
    made = sections(before)
    for part, figures in by_part(results).items():
        told = [f"`make bench ONLY={part}`, on {_in_one_line(machine)}."]
        (plots / f"{part}.svg").unlink(missing_ok=True)
        if svg := plot(figures):
            (plots / f"{part}.svg").write_text(svg)
            told.append(f"![{part}: ours and its peers](plots/{part}.svg)")
        made[part] = "\n\n".join([*told, table(figures)])
    place = {part: number for number, part in enumerate(order)}
    parts = sorted(made, key=lambda part: place.get(part, len(place)))
    readme.write_text(between_marks(before, "\n".join(f"\n### {p}\n\n{made[p]}" for p in parts)))


def sections(text: str) -> dict[str, str]:
    """What stands between the marks, by the part that it is of."""
    between = text.partition(BEGIN)[2].partition(END)[0]
    found = (each.partition("\n") for each in between.split("\n### ")[1:])
    return {part: f"{told.strip()}\n" for part, _, told in found}


def by_part(results: Figures) -> dict[str, Figures]:
    """The figures of each part, in the order they were recorded."""
    parts: dict[str, Figures] = {}
    for name, figure in results.items():
        parts.setdefault(figure.get("part") or "other", {})[name] = figure
    return parts


def between_marks(text: str, made: str) -> str:
    """`text` with all between its marks replaced. Raises ValueError where it has none."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"there is no {BEGIN} … {END}")
    return f"{before}{BEGIN}\n{made}\n{END}{after}"


def table(figures: Figures) -> str:
    """Rows of a Markdown table, and below it what each figure says beyond its numbers."""
    lines = [
        "| figure | ours | peer | ours / peer | runs | peer is |",
        "|---|--:|--:|--:|--:|---|",
    ]
    notes = []
    for name, figure in figures.items():
        if failed := figure.get("failed"):
            lines.append(f"| `{name}` | not measured | | | | |")
            notes.append(f"- `{name}`: {_cell(failed)}")
            continue
        unit, ratio = figure["unit"], figure["ratio"]
        lines.append(
            f"| `{name}` | {in_words(figure['ours'], unit)} | {in_words(figure['peer'], unit)} "
            f"| {in_short(ratio)} | {figure['runs']} | {_cell(figure['peer_name'] or '')} |"
        )
        notes += _notes(name, figure)
    below = "\n" + "\n".join(notes) + "\n" if notes else ""
    return "\n".join(lines) + "\n" + below


def in_short(ratio: float | None) -> str:
    """A ratio with as many digits as say something."""
    if ratio is None:
        return "–"
    return f"{ratio:.3f}" if ratio < 0.1 else f"{ratio:.2f}"


def _notes(name: str, figure: dict[str, Any]) -> list[str]:
    told = []
    if command := figure.get("peer_command"):
        told.append(f"peer: `{command}`" if "," not in command else f"peer: {command}")
    if note := figure.get("note"):
        told.append(_cell(note))
    if also := figure.get("also"):
        told.append(", ".join(f"{key} {_plain(value)}" for key, value in also.items()))
    return [f"- `{name}`: " + "; ".join(told)] if told else []


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return " and ".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _in_one_line(machine: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in machine.items() if value is not None)


def plot(figures: Figures) -> str | None:
    """Horizontal bars, two for each figure with a peer, the longer one as wide as there is room;
    None where no figure has one. Each pair has its own scale: units and sizes differ."""
    shown = {name: each for name, each in figures.items() if each["ours"] and each["peer"]}
    if not shown:
        return None
    rows, top = [], 30
    for name, figure in shown.items():
        rows.append(_pair(name, figure, top))
        top += 2 * _BAR + _GAP
    legend = (
        f'<rect class="ours" x="{_NAMES}" y="8" width="12" height="12"/>'
        f'<text x="{_NAMES + 18}" y="18">ours</text>'
        f'<rect class="peer" x="{_NAMES + 70}" y="8" width="12" height="12"/>'
        f'<text x="{_NAMES + 88}" y="18">peer; shorter is better, each pair to its own scale</text>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {top}" '
        f'width="{_WIDTH}" height="{top}" role="img">\n<style>{_STYLE}</style>\n{legend}\n'
        + "\n".join(rows)
        + "\n</svg>\n"
    )


def _pair(name: str, figure: dict[str, Any], top: int) -> str:
    room = _WIDTH - _NAMES - _NUMBERS
    longest = max(figure["ours"], figure["peer"])
    bars = [
        f'<text x="{_NAMES - 10}" y="{top + 12}" text-anchor="end">{escape(name)}</text>',
        f'<text class="soft" x="{_NAMES - 10}" y="{top + 27}" text-anchor="end" '
        f'font-size="11">{escape(_shortened(figure["peer_name"] or ""))}</text>',
    ]
    for index, whose in enumerate(("ours", "peer")):
        width = max(room * figure[whose] / longest, 1)
        y = top + index * (_BAR + 2)
        said = escape(in_words(figure[whose], figure["unit"]))
        bars.append(
            f'<rect class="{whose}" x="{_NAMES}" y="{y}" width="{width:.1f}" height="{_BAR}"/>'
            f'<text x="{_NAMES + width + 6:.1f}" y="{y + 12}">{said}</text>'
        )
    return "\n".join(bars)


def _shortened(text: str, most: int = 44) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
