"""Redis as a plain client, beside Celery's use of it."""

from functools import cache

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from shared.settings import settings


@cache
def redis_client() -> redis.Redis:
    return redis.Redis.from_url(
        settings().broker_url.get_secret_value(),
        socket_connect_timeout=1,
        socket_timeout=2,
        health_check_interval=25,
        # A connection that Redis closed while it was idle is opened anew at once. Silence is
        # waited for once: redis-py's own ten tries would be half a minute.
        retry=Retry(NoBackoff(), 1, (redis.ConnectionError,)),
    )
