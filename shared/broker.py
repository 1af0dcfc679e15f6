"""Redis as a plain client, beside Celery's use of it."""

from functools import cache

import redis

from shared.settings import settings


@cache
def redis_client() -> redis.Redis:
    return redis.Redis.from_url(
        settings().broker_url.get_secret_value(),
        socket_connect_timeout=2,
        socket_timeout=5,
        health_check_interval=25,
    )
