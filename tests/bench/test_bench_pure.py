"""What the bench does with numbers: results kept, shown, drawn, and gaps and blocks counted."""

from pathlib import Path
from string import Formatter
from xml.etree import ElementTree

import numpy as np
import pytest

from bench import peers, report
from bench.__main__ import PARTS
from bench.book import Book
from bench.clone import growth
from bench.result import Result, in_words
from bench.site import SITES
from bench.space import covered
from bench.ticker import Window, gaps

MS = 1_000_000


def test_a_figure_that_is_not_measured_again_stays(tmp_path: Path) -> None:
    """A run of one part leaves the other parts' figures as they were, each with its time."""
    path = tmp_path / "results" / "latest.json"
    first = Book(path)
    first.part = "image"
    first.record("image_reflink_2g", Result.of([1.0, 3.0, 2.0], [40.0], "qemu-img"))
    second = Book(path)
    second.part = "revert"
    second.record("revert", Result(1, 2, "virsh", 1))
    results = second.results
    assert list(results) == ["image_reflink_2g", "revert"]
    assert results["image_reflink_2g"]["ratio"] == 2 / 40
    assert {name: each["part"] for name, each in results.items()} == {
        "image_reflink_2g": "image",
        "revert": "revert",
    }
    assert all(each["at"] for each in results.values())


def test_a_failed_figure_says_why_and_loses_no_other(tmp_path: Path) -> None:
    """The reason stands in place of an earlier value."""
    book = Book(tmp_path / "latest.json")
    book.record("kept", Result(1, None, None, 1))
    book.record("lost", Result(1, None, None, 1))
    book.fail("lost", "no borg")
    assert book.results["kept"]["ours"] == 1
    assert (book.results["lost"]["ours"], book.results["lost"]["failed"]) == (None, "no borg")
    assert book.failures == {"lost": "no borg"}


def test_the_table_is_put_between_its_marks(tmp_path: Path) -> None:
    """What people wrote around it stays, also in a second run."""
    readme = tmp_path / "README.md"
    readme.write_text(f"# Before\n{report.BEGIN}\nold\n{report.END}\nAfter\n")
    book = Book(tmp_path / "latest.json")
    book.part = "image"
    book.record("image_vs_borg", Result(0.2, 26, "borg", 3, peer_command="borg create {disk}"))
    for _ in range(2):
        report.write(tmp_path, book.results, {"cpus": 2})
    text = readme.read_text()
    assert text.startswith("# Before\n") and text.endswith("\nAfter\n")
    assert "old" not in text
    assert "| `image_vs_borg` | 200.0 ms | 26.0 s | 0.008 | 3 | borg |" in text
    assert "make bench ONLY=image" in text and "`borg create {disk}`" in text
    assert (tmp_path / "plots" / "image.svg").exists()


def test_parts_that_were_not_measured_stay_in_the_readme(tmp_path: Path) -> None:
    """A run of one part, in a clone without the results of the others, leaves their sections."""
    book = Book(tmp_path / "latest.json")
    for part, name in (("clone", "clone_cold_1"), ("revert", "restore"), ("image", "image_8g")):
        book.part = part
        book.record(name, Result(1, 2, "bare", 1))
    order = ["image", "revert", "clone"]
    report.write(tmp_path, book.results, {"cpus": 2}, order)
    there = report.sections((tmp_path / "README.md").read_text())
    again = Book(tmp_path / "another.json")
    again.part = "revert"
    again.record("restore", Result(3, 2, "bare", 1))

    report.write(tmp_path, again.results, {"cpus": 64}, order)

    text = (tmp_path / "README.md").read_text()
    now = report.sections(text)
    assert list(now) == order
    assert {part: now[part] for part in ("image", "clone")} == {
        part: there[part] for part in ("image", "clone")
    }
    assert "on cpus 64." in now["revert"] and "cpus 2" not in now["revert"]
    assert (tmp_path / "plots" / "clone.svg").exists()
    report.write(tmp_path, again.results, {"cpus": 64}, order)
    assert (tmp_path / "README.md").read_text() == text


def test_a_readme_without_marks_is_refused() -> None:
    """Rather than a table at a place that nobody chose."""
    with pytest.raises(ValueError, match="there is no"):
        report.between_marks("# Bench\n", "table")


def test_a_plot_is_drawn_to_scale_of_each_pair() -> None:
    """Whatever is in a peer's name, it is XML; what has no peer, or failed, is left out."""
    figures = {
        "a": Result(1, 4, "a < b & c", 1).document(),
        "b": Result(5, None, None, 1).document(),
        "c": Result(0, None, None, 0).document() | {"ours": None, "failed": "no"},
    }
    svg = report.plot(figures)
    assert svg is not None
    drawn = ElementTree.fromstring(svg)  # noqa: S314
    bars = [
        float(each.attrib["width"])
        for each in drawn.iter("{http://www.w3.org/2000/svg}rect")
        if each.attrib["height"] == "14"
    ]
    assert len(bars) == 2
    assert bars[1] == pytest.approx(4 * bars[0], rel=0.01)
    assert report.plot({"b": figures["b"]}) is None


@pytest.mark.parametrize(
    ("value", "unit", "expected"),
    [
        (0.0123, "s", "12.3 ms"),
        (2.5, "s", "2.50 s"),
        (3 * 2**30, "B", "3.00 GiB"),
        (100 * 2**20, "B", "100.0 MiB"),
        (None, "s", "–"),
    ],
)
def test_values_in_words(value: float | None, unit: str, expected: str) -> None:
    """Short times are milliseconds, sizes in the unit that fits."""
    assert in_words(value, unit) == expected


def test_a_gap_that_reaches_into_the_window_counts() -> None:
    """A hold that begins before the window ends is seen, though its end is later."""
    stamps = np.array([0, 1, 2, 30, 31, 90], np.uint64) * np.uint64(MS)
    assert list(gaps(stamps, Window(10 * MS, 40 * MS))) == [28, 1, 59]
    assert list(gaps(stamps, Window(0, 2 * MS))) == [1, 1]


def test_shared_blocks_are_counted_once() -> None:
    """Pieces that overlap, touch, lie inside another or stand alone."""
    pieces = np.array([[0, 10], [5, 8], [8, 12], [12, 13], [20, 21]], np.uint64)
    assert covered(pieces) == 14


def test_each_figure_is_measured_once_and_at_a_site_that_there_is() -> None:
    """A name that two groups record would be the later one's, whatever the first had found."""
    figures = [figure for part in PARTS.values() for figure in part]
    names = [name for figure in figures for name in figure.names]
    assert len(names) == len(set(names))
    assert {figure.site for figure in figures} <= {*SITES, None}


@pytest.mark.parametrize(
    "bare", [each for each in vars(peers).values() if isinstance(each, peers.Bare)], ids=str
)
def test_what_is_shown_of_a_peer_is_a_command(bare: peers.Bare) -> None:
    """No place is left in braces, and each place that was there is still told by its name."""
    places = {field for _, field, _, _ in Formatter().parse(bare.text) if field}
    assert "{" not in str(bare) and "}" not in str(bare)
    assert places and all(place in str(bare) for place in places)


def test_a_farm_grows_by_the_clone_not_by_its_size() -> None:
    """Beside ours in a small farm, not beside the peer; the peer's own growth is told as well."""
    result = growth(Result(0.4, 0.3, "bare", 5), Result(0.5, 0.6, "bare", 2))
    assert result.document()["ratio"] == pytest.approx(1.25)
    assert result.also == {"growth_of_bare": pytest.approx(2)}
