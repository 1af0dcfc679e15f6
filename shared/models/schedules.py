"""Schedules and their runs: one row per nominal slot (I5)."""

from datetime import datetime

from sqlalchemy import Index, UniqueConstraint, text
from sqlmodel import Field, SQLModel

from shared.models.columns import CreatedAt, Id, Moment


class Schedule(SQLModel, table=True):
    __table_args__ = (
        UniqueConstraint("server_id", "kind"),
        Index("schedule_due", "kind", "start_at", "id"),
    )

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
    next_run_at: datetime | None = Moment(default=None)
    """The next slot nobody has claimed yet; None when disabled. Set by `shared.runs.plan`."""
    start_at: datetime | None = Moment(default=None)
    """When its run starts: the slot and the server's place in the spread."""
    failures_in_row: int = 0
    created_at: datetime = CreatedAt()


class ScheduleRun(SQLModel, table=True):
    __tablename__ = "schedule_run"
    __table_args__ = (
        UniqueConstraint("schedule_id", "slot"),
        Index(
            "schedule_run_waiting",
            "give_up_at",
            sqlite_where=text("state = 'running'"),
            postgresql_where=text("state = 'running'"),
        ),
    )

    id: str = Id("run")
    schedule_id: str = Field(foreign_key="schedule.id", ondelete="CASCADE")
    slot: datetime = Moment(nullable=False)
    """The nominal instant, in UTC."""
    first_slot: datetime | None = Moment(default=None)
    """Of a skipped one that stands for many slots the first; the last of them is `slot`."""
    start_at: datetime | None = Moment(default=None)
    """When it was to start; lateness counts from here."""
    give_up_at: datetime | None = Moment(default=None)
    """No worker begins it later: its window is over, or the next slot has come."""
    state: str
    """scheduled · running · succeeded · failed · skipped"""
    operation_id: str | None = Field(default=None, index=True)
    image_id: str | None = None
    reason: str | None = None
    created_at: datetime = CreatedAt()
