"""Waiting for a database that is away, for as long as the work is still ours.

A copy of hours must not be thrown away because PostgreSQL was restarted at the moment of its
commit. The heartbeat says when waiting has become vain (`context`).
"""

import time
from collections.abc import Callable
from typing import TypeVar

import structlog
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

log = structlog.get_logger()

DATABASE_AWAY = (OperationalError, InterfaceError, PoolTimeout)
"""Not there, silent, out of disk space or too busy: what may be over at the next try."""
RETRY = 1.0
"""Seconds between two tries."""

Result = TypeVar("Result")


def patiently(check: Callable[[], None], step: Callable[[], Result]) -> Result:
    """What `step` returns, tried again while the database is away and `check` raises nothing.

    The answer of a try that failed may be all that was lost: `step` must bear being done twice.
    """
    while True:
        try:
            return step()
        except DATABASE_AWAY as error:
            check()
            log.warning("database.waited_for", reason=str(error).splitlines()[0])
            time.sleep(RETRY)
            check()
