"""One figure: ours beside its peer, both medians of the same run."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any


@dataclass
class Result:
    ours: float
    peer: float | None
    peer_name: str | None
    runs: int
    unit: str = "s"

    @classmethod
    def of(cls, ours: list[float], peer: list[float], peer_name: str) -> Result:
        """From the seconds that each run of both took."""
        return cls(statistics.median(ours), statistics.median(peer), peer_name, len(ours))

    def shown(self, value: float) -> str:
        """The value with its unit, for people: short times in milliseconds."""
        if self.unit == "s" and value < 1:
            return f"{value * 1000:.1f} ms"
        return f"{value:.1f} {self.unit}"

    def document(self) -> dict[str, Any]:
        ratio = self.ours / self.peer if self.peer else None
        return {
            "ours": self.ours,
            "peer": self.peer,
            "peer_name": self.peer_name,
            "ratio": ratio,
            "unit": self.unit,
            "runs": self.runs,
        }
