"""One figure: ours beside its peer, both medians of the same run."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Result:
    """`ours` and `peer` in `unit`; `peer_command` is what the peer ran, `note` what a reader must
    know to judge it, `also` further values of the same runs, by name with their unit in it."""

    ours: float
    peer: float | None
    peer_name: str | None
    runs: int
    unit: str = "s"
    peer_command: str | None = None
    note: str | None = None
    also: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        ours: list[float],
        peer: list[float],
        peer_name: str | None,
        unit: str = "s",
        **more: Any,
    ) -> Result:
        """From what each run of both took; without a peer's runs there is no peer."""
        of_peer = statistics.median(peer) if peer else None
        return cls(statistics.median(ours), of_peer, peer_name, len(ours), unit, **more)

    def document(self) -> dict[str, Any]:
        ratio = self.ours / self.peer if self.peer else None
        known = {
            "ours": self.ours,
            "peer": self.peer,
            "peer_name": self.peer_name,
            "ratio": ratio,
            "unit": self.unit,
            "runs": self.runs,
        }
        more = {"peer_command": self.peer_command, "note": self.note, "also": self.also}
        return known | {name: value for name, value in more.items() if value}


def in_words(value: float | None, unit: str) -> str:
    """The value with its unit, for people: short times in milliseconds, sizes in MiB or GiB."""
    if value is None:
        return "–"
    if unit == "s" and value < 1:
        value, unit = value * 1000, "ms"
    if unit == "B":
        value, unit = (value / 2**30, "GiB") if value >= 2**30 else (value / 2**20, "MiB")
    return f"{value:.2f} {unit}" if value < 10 else f"{value:,.1f} {unit}"
