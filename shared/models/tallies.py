"""Counters of what ended operations came to; they outlive the operations."""

from sqlmodel import Field, SQLModel


class Tally(SQLModel, table=True):
    """One running sum (shared.operations.tally); a histogram is a row per bucket that was hit."""

    measure: str = Field(primary_key=True)
    """operations · duration · pause · bytes"""
    host: str = Field(primary_key=True)
    service: str = Field(primary_key=True)
    kind: str = Field(primary_key=True)
    label: str = Field(primary_key=True)
    """operations, duration: the state; bytes: the way; pause: empty."""
    bucket: str = Field(primary_key=True)
    """Of a histogram the upper bound, or `sum`; else empty."""
    value: float
