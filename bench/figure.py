"""What a part consists of: groups of figures, each measured at one site by one function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bench.book import Book


@dataclass(frozen=True)
class Figure:
    """`measure(site, book)` records `names`; `site` is one of `bench.site.SITES`, or None."""

    names: tuple[str, ...]
    site: str | None
    measure: Callable[[Any, Book], None]
