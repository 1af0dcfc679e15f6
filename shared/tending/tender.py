"""What a service does in the background for the copies that it owns, beside its operations.

Owns: the thread, from the worker's start to its end. It is no operation: it stands in no server's
line, and nothing waits for it. Copies come and go while it looks at them.
"""

import threading

import structlog

from shared import mounted

log = structlog.get_logger()

EVERY_S = 5.0
"""Between two looks for something to do."""


class Tender(threading.Thread):
    """Does its `turn` again and again. One that fails is logged, and the next one comes."""

    def __init__(self, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Have it end soon; `join` waits for that."""
        self._stopped.set()

    def stopping(self) -> bool:
        return self._stopped.is_set()

    def run(self) -> None:
        while not self.stopping():
            try:
                mounted.ensure()
                self.turn()
            except Exception as error:  # the database is away, the vault is not mounted
                log.warning("tender.waits", tender=self.name, reason=str(error))
            self._stopped.wait(EVERY_S)

    def turn(self) -> None:
        """Do what there is to do, a little at a time, while not `stopping`."""
        raise NotImplementedError
