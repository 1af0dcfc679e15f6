"""The tables: hosts and servers, their copies and farms, schedules, operations, events, tallies."""

from shared.models.copies import Clone, Farm, Image, Snapshot
from shared.models.events import Event
from shared.models.hosts import Domain, Host, Server
from shared.models.operations import JournalEntry, Operation, OutboxMessage
from shared.models.schedules import Schedule, ScheduleRun
from shared.models.tallies import Tally

__all__ = [
    "Clone",
    "Domain",
    "Event",
    "Farm",
    "Host",
    "Image",
    "JournalEntry",
    "Operation",
    "OutboxMessage",
    "Schedule",
    "ScheduleRun",
    "Server",
    "Snapshot",
    "Tally",
]
