"""Fixtures of the tests of schedules: those of the tests of operations."""

from operations.spine import (  # noqa: F401
    any_database,
    database_url,
    environment,
    redis_broker,
    world,
)
