"""Fixtures of the tests of operations; they stand in `spine`, for the schedules' tests too."""

from operations.spine import (  # noqa: F401
    any_database,
    database_url,
    environment,
    redis_broker,
    world,
)
from operations.workers import worker  # noqa: F401
