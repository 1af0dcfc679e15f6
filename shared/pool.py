"""A service's pool of processes: forked from one that has imported all and opened nothing.

A child that died is replaced in a fifth of the time that a new interpreter takes, and children
share the memory of what was imported. Celery offers fork, after which libvirt's connections and
threads are half there, and spawn; billiard, which it is built on, has the fork server too.
Why: docs/decisions/0037-children-come-from-a-fork-server.md.
"""

import os
import select
import tempfile
from pathlib import Path
from typing import Any

import structlog
from billiard import forkserver, set_start_method
from celery.concurrency import asynpool, prefork

log = structlog.get_logger()

LONGEST_TMPDIR = 70
"""Characters: the server's socket is some 40 more, and the kernel takes 107."""


class _Worker(asynpool.Worker):  # type: ignore[misc]
    """One that says which pipe it means by the number that it has in the main process. billiard
    lets it say its own, which is the same in a child that is spawned."""

    def __reduce__(self) -> Any:
        return _remade, (*super().__reduce__(), self.inqW_fd, self.synqW_fd)


def _remade(make: Any, given: tuple[Any, ...], in_queue: int, sync_queue: int | None) -> Any:
    worker = make(*given)
    worker.inqW_fd, worker.synqW_fd = in_queue, sync_queue
    return worker


class _ForkServerPool(asynpool.AsynPool):  # type: ignore[misc]
    Worker = _Worker

    def __init__(self, *args: Any, **options: Any) -> None:
        if len(tempfile.gettempdir()) <= LONGEST_TMPDIR:  # else it is as Celery has it, by spawn
            set_start_method("forkserver", force=True)
        super().__init__(*args, **options)

    def _create_worker_process(self, i: int) -> Any:
        _forget_if_dead(forkserver._forkserver)
        try:
            return super()._create_worker_process(i)
        except (OSError, EOFError) as error:
            if not self._registered_with_event_loop:  # at the start of all
                raise
            log.warning("pool.process_not_started", reason=repr(error))
            self._process_cleanup_queues(self._pool.pop())  # tried again within five seconds

    def _join_exited_workers(self, shutdown: bool = False) -> Any:
        for each in self._pool if shutdown else ():
            each._controlled_termination = True  # whose status is not known to be good
        return super()._join_exited_workers(shutdown)


class TaskPool(prefork.TaskPool):  # type: ignore[misc]
    """Celery's own, by the fork server. `worker_pool_start_method` must be spawn, which tells
    Celery that a child finds nothing of its parent's."""

    Pool = _ForkServerPool

    def on_start(self) -> None:
        forkserver.set_forkserver_preload([*self.app.conf.imports, "shared.pool_parent"])
        super().on_start()


def _forget_if_dead(server: Any) -> None:
    """billiard starts its server once. One that was killed has taken its children along; the
    pipe by which it knows that we live has no reader then. One whose socket was swept away from
    the temporary directory cannot be asked for more."""
    if (alive := server._forkserver_alive_fd) is None:
        return
    poll = select.poll()
    poll.register(alive, 0)
    if poll.poll(0) or not Path(server._forkserver_address).exists():
        os.close(alive)
        server._forkserver_alive_fd = None
