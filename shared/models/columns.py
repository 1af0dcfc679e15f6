"""Column shorthands used by every table."""

from datetime import datetime
from typing import Any

from sqlalchemy import JSON
from sqlmodel import Field

from shared.database import UTCDateTime, now
from shared.ids import new_id


def Id(prefix: str) -> Any:
    """A primary key that is made here, not by the database."""
    return Field(default_factory=lambda: new_id(prefix), primary_key=True)


def Moment(**options: Any) -> Any:
    return Field(sa_type=UTCDateTime, **options)


def CreatedAt() -> Any:
    return Field(default_factory=now, sa_type=UTCDateTime, nullable=False)


def Document(default: Any = None, **options: Any) -> Any:
    """A JSON column; `default` is a factory such as `dict` or `list`, or None."""
    if default is None:
        return Field(default=None, sa_type=JSON, **options)
    return Field(default_factory=default, sa_type=JSON, nullable=False, **options)


__all__ = ["CreatedAt", "Document", "Id", "Moment", "datetime"]
