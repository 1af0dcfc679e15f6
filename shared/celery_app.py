"""One factory for every Celery app, so that API, beat and workers agree on the broker.

Why each setting is as it is: docs/explanation/queues.md.
"""

from functools import cache
from typing import Any

import structlog
from celery import Celery
from kombu.entity import Queue
from kombu.transport import redis

from shared.settings import settings

log = structlog.get_logger()

TICKS = "ticks"
"""The queue of beat's own tasks: database work only, read by the beat process."""


class LenientQoS(redis.QoS):
    """Whose messages that were taken and not acknowledged do not keep a channel from closing.

    kombu gives them back then. Where Redis has just died it may have no connection to do that
    with, and the AttributeError of that ended Celery's worker (kombu 5.7, celery 5.7). They are
    given back all the same after `visibility_timeout`, and operations are woken before.
    """

    def restore_unacked_once(self, stderr: Any = None) -> None:
        try:
            super().restore_unacked_once(stderr)  # type: ignore[no-untyped-call]
        except Exception as error:
            log.warning("messages.not_given_back", reason=str(error))


redis.Channel.QoS = LenientQoS


def make_app(name: str, queues: list[str], imports: list[str]) -> Celery:
    """A Celery app that reads `queues`; JSON only, early ack, one task per free slot."""
    app = Celery(name, set_as_current=False)
    app.conf.update(
        broker_url=settings().broker_url.get_secret_value(),
        broker_transport_options={
            "global_keyprefix": settings().queue_prefix,
            "socket_connect_timeout": 3,
            "socket_timeout": 10,
            "socket_keepalive": True,
            "health_check_interval": 5,
            "visibility_timeout": 3600,
        },
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        task_serializer="json",
        accept_content=["json"],
        task_ignore_result=True,
        task_store_errors_even_if_ignored=False,
        task_acks_late=False,
        task_publish_retry=False,
        task_create_missing_queues=True,
        task_default_queue=queues[0] if queues else TICKS,
        task_queues=[Queue(queue) for queue in queues] or None,
        task_retry_on_worker_lost=True,
        worker_pool="shared.pool:TaskPool",
        worker_pool_start_method="spawn",
        worker_proc_alive_timeout=60,
        worker_concurrency=settings().concurrency,
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=True,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_soft_shutdown_timeout=20,
        worker_send_task_events=False,
        worker_enable_remote_control=True,
        timezone="UTC",
        imports=imports,
    )
    return app


@cache
def publisher() -> Celery:
    """For sending only."""
    return make_app("triptych-publisher", [], [])
