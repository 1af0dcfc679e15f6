"""What a check of the doctor says."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass
class Finding:
    """One difference. `detail` is what differs, `remedy` what `--fix` or a person does about it."""

    check: str
    subject: str
    detail: str
    remedy: str
    fixed: bool = False
    repair: Callable[[], bool] | None = None
    """Puts it right, or leaves it alone and returns False where somebody is at work on it by
    now. Safe to call again. None where a person must decide."""

    def told(self) -> dict[str, Any]:
        return {
            "check": self.check,
            "subject": self.subject,
            "detail": self.detail,
            "remedy": self.remedy,
            "fixed": self.fixed,
        }

    def line(self) -> str:
        state = "fixed" if self.fixed else "by hand" if self.repair is None else "to fix"
        remedy = self.remedy[:1].upper() + self.remedy[1:]
        return f"{state:8} {self.check}: {self.subject}: {self.detail}. {remedy}."
