"""Threads of one process that do like things side by side, and take turns where many do no good."""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from contextvars import copy_context
from typing import TypeVar

MOST_CALLS = 4
"""Calls to libvirt at once. Of one client libvirtd carries out five (`max_client_requests`), and
leaves unread what comes then, the client's keepalive included, by which it takes the daemon for
dead; one is kept for short questions."""
LOOK_EVERY_S = 0.2
"""How soon one who waits for a turn notices that it is to stop."""

Result = TypeVar("Result")


class Turns:
    """At most `at_once` at a time, first come first served."""

    def __init__(self, at_once: int) -> None:
        self._free = at_once
        self._line: deque[object] = deque()
        self._changed = threading.Condition()

    @contextmanager
    def one(self, check: Callable[[], None]) -> Iterator[None]:
        """Have a turn for as long as the block lasts. What `check` raises ends the waiting."""
        me = object()
        with self._changed:
            self._line.append(me)
            try:
                while self._line[0] is not me or not self._free:
                    self._changed.wait(LOOK_EVERY_S)
                    check()
                self._free -= 1
            finally:
                self._line.remove(me)
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._free += 1
                self._changed.notify_all()


def side_by_side(
    works: Sequence[Callable[[], Result]],
    at_once: int,
    interrupted: Callable[[], None] = lambda: None,
) -> list[Result | Exception]:
    """What each of the works returned, or the error that it raised; begun in their order, at most
    `at_once` at a time, each in a thread with the caller's context variables.

    Whatever happens, none of them goes on when this ends. `interrupted` is called when the caller
    is told to end by a signal: it should make them end soon; those that have not begun never do.
    """

    def outcome(work: Callable[[], Result]) -> Result | Exception:
        try:
            return work()
        except Exception as error:
            return error

    if len(works) == 1:
        return [outcome(works[0])]
    with ThreadPoolExecutor(at_once) as pool:
        begun = [pool.submit(copy_context().run, outcome, work) for work in works]
        try:
            wait(begun)
        except BaseException:
            interrupted()
            pool.shutdown(cancel_futures=True)
            raise
        return [each.result() for each in begun]
