"""Holding a guest still for a moment, and giving it back whatever happens.

Suspend is the one dangerous moment of a copy. The order here is the point:
the watchdog is armed first, the resume runs on every way out, it is tried hard
and verified, and only then is the watchdog told to forget.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from shared.hypervisor.domains import Domain
from shared.hypervisor.errors import DomainMissing, HypervisorError, PauseFailed
from shared.hypervisor.watchdog import DEADLINE_S, Arm, Watchdog

RESUME_PATIENCE_S = 20.0


@dataclass
class Pause:
    """`ms` is known once the block has been left: suspend called to resume returned."""

    was_running: bool
    ms: float = 0.0


@contextlib.contextmanager
def paused(
    domain: Domain,
    watchdog: Watchdog,
    *,
    deadline_s: float = DEADLINE_S,
    before: Callable[[], None] = lambda: None,
) -> Iterator[Pause]:
    """Suspend a running guest inside, resume it on every way out.

    A guest that its owner had paused stays paused, a stopped one stopped. `before` is called
    ahead of a pause of ours: the place for the journal. After
    `deadline_s` seconds the watchdog resumes the guest although we live.

    Raises WatchdogUnavailable (guest untouched), or PauseFailed: the guest could
    not be paused, was resumed by somebody else in between (what was copied is
    then no picture of one instant), or does not resume (the watchdog goes on
    trying). An error raised inside passes through once the guest is resumed.
    """
    state = domain.state
    if state != "running":
        yield Pause(was_running=False)
        if state == "paused" and domain.state == "running":
            raise PauseFailed(
                f"{domain.name} was paused and was resumed while it was being copied, so the copy "
                "is not one instant and is not kept. The server was not touched; try again."
            )
        return
    before()
    pause = Pause(was_running=True)
    arm = watchdog.arm(domain.uuid, "resume", deadline_s)
    started = time.perf_counter()
    held = False
    try:
        _suspend(domain)
        watchdog.held(arm)
        yield pause
        held = domain.paused_by_user
    finally:
        give_back(domain, watchdog, [arm], lambda: domain.paused_by_user)
        pause.ms = (time.perf_counter() - started) * 1000
        fired = watchdog.disarm(arm)
    if fired or not held:
        raise PauseFailed(
            f"{domain.name} was resumed by somebody else while it was being copied, so the "
            "copy is not one instant and is not kept. The guest runs; try again."
        )


def _suspend(domain: Domain) -> None:
    try:
        domain.suspend()
    except HypervisorError as error:
        # The caller's resume follows: the suspend may have worked all the same.
        raise PauseFailed(
            f"{domain.name} could not be paused: {error.detail} It was left running and "
            "nothing was copied; try again."
        ) from error


def give_back(
    domain: Domain,
    watchdog: Watchdog,
    arms: Iterable[Arm],
    held: Callable[[], bool],
    *,
    look_first: bool = False,
) -> None:
    """Resume until the guest is seen not to be `held` any more; with `look_first` not even once
    where it is not. While libvirt is away it is waited for.

    Raises PauseFailed where it does not resume; the watchdog goes on trying.
    """
    deadline = time.monotonic() + RESUME_PATIENCE_S
    delay = 0.01
    while True:
        try:
            if not look_first or held():
                domain.resume()
            return
        except DomainMissing:
            return
        except HypervisorError as error:
            failure = error
        with contextlib.suppress(HypervisorError):
            if not held():
                return  # it runs, or went down, or stopped on an I/O error of its own
        if time.monotonic() > deadline:
            for arm in arms:
                watchdog.fire(arm)
            raise PauseFailed(
                f"{domain.name} does not resume: {failure.detail} The watchdog goes on "
                f"trying; `virsh resume {domain.name}` does the same by hand."
            ) from failure
        time.sleep(delay)
        delay = min(delay * 2, 1.0)
