"""Facts that happened, as CloudEvents 1.0."""

from datetime import datetime
from typing import Any

from sqlmodel import Field, SQLModel

from shared.ids import new_id
from shared.models.columns import CreatedAt, Document, Moment


class Event(SQLModel, table=True):
    seq: int | None = Field(default=None, primary_key=True)
    id: str = Field(default_factory=lambda: new_id("evt"), unique=True, nullable=False)
    type: str
    subject: str | None = Field(default=None, index=True)
    time: datetime = CreatedAt()
    data: dict[str, Any] = Document(dict)
    relayed_at: datetime | None = Moment(default=None, index=True)
