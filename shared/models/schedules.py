"""Schedules and their runs: one row per nominal slot (I5)."""

from datetime import datetime

from sqlalchemy import UniqueConstraint
from sqlmodel import Field, SQLModel

from shared.models.columns import CreatedAt, Id, Moment


class Schedule(SQLModel, table=True):
    __table_args__ = (UniqueConstraint("server_id", "kind"),)

    id: str = Id("sch")
    server_id: str = Field(foreign_key="server.id")
    kind: str
    """daily · weekly"""
    at: str
    """Local time, `HH:MM`."""
    weekday: str | None = None
    """mon … sun, for weekly ones."""
    timezone: str
    keep: int
    require: str = Field(default="complete", sa_column_kwargs={"server_default": "complete"})
    """complete · verified: what an image must be to count, and for older ones to go."""
    enabled: bool = True
    catch_up_s: int
    """How late a missed slot may still run, in seconds."""
    next_run_at: datetime | None = Moment(default=None, index=True)
    """The next slot nobody has claimed yet; None when disabled."""
    failures_in_row: int = 0
    created_at: datetime = CreatedAt()


class ScheduleRun(SQLModel, table=True):
    __tablename__ = "schedule_run"
    __table_args__ = (UniqueConstraint("schedule_id", "slot"),)

    id: str = Id("run")
    schedule_id: str = Field(foreign_key="schedule.id", ondelete="CASCADE")
    slot: datetime = Moment(nullable=False)
    """The nominal instant, in UTC."""
    state: str
    """scheduled · running · succeeded · failed · skipped"""
    operation_id: str | None = Field(default=None, index=True)
    image_id: str | None = None
    reason: str | None = None
    created_at: datetime = CreatedAt()
