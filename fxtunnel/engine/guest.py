"""Pump: trio as the guest of a reactor: its steps are calls of the reactor's, and one of trio's threads waits for trio's I/O.

When trio is to wait and no thread can be started for that (a limit of tasks, or of memory), its run breaks, and the process with it. So a
few threads are kept idle for it; and once they are used up, trio is not let wait: it looks for its I/O itself, every POLL_S.

Other threads wake trio with a byte through a socket, for which there may be no memory (ENOBUFS): it is woken every LOOK_S in any case. The
task that had waited for such a thread would wait until another one ends, which may be never.
"""

import logging
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Final, TypeVar

import trio

if TYPE_CHECKING:
    from fxtunnel.engine.reactor import Reactor

logger = logging.getLogger(__name__)

SPARE_THREADS: Final = 3
"""What else needs a thread takes one of the same idle ones: so many may come up between two looks."""
LOOK_S: Final = 4.0
"""trio ends a thread that has been idle for 10 s."""
RETRY_S: Final = 1.0
POLL_S: Final = 0.005
_OFFSET_S: Final = 100_000.0
"""As trio's own clock has one: its times are not to be taken for the reactor's."""

Step = Callable[[], object]
T = TypeVar("T")


class Guest(trio.abc.Clock):
    """Passes trio's steps on, and is its clock: by one that says that every wait is over, trio asks for its next step, not for a thread."""

    def __init__(self, reactor: "Reactor") -> None:
        self._reactor = reactor
        self._is_polled = False
        self._is_short = False
        self._pause_s = 0.0
        """Until trio's next deadline, POLL_S at most; 0 if one of its tasks can go on."""
        self._token: trio.lowlevel.TrioToken | None = None

    async def run(self, main: Callable[[], Awaitable[T]]) -> T:
        """trio's main task: what `main` returns or raises."""
        self._token = trio.lowlevel.current_trio_token()
        try:
            return await main()
        finally:
            self._token = None

    def begin(self) -> None:
        """Look after its threads from now on."""
        self._look()

    def start_clock(self) -> None:
        """See `trio.abc.Clock`."""

    def current_time(self) -> float:
        """See `trio.abc.Clock`."""
        return time.monotonic() + _OFFSET_S

    def deadline_to_sleep_time(self, deadline: float) -> float:
        """See `trio.abc.Clock`. Asked when no task can go on."""
        left_s = deadline - self.current_time()
        if not self._is_polled:
            return left_s
        self._pause_s = max(0.0, min(left_s, POLL_S))
        return 0.0

    def soon(self, step: Step) -> None:
        """Take trio's next step; from the reactor's thread."""
        pause_s, self._pause_s = self._pause_s, 0.0
        if pause_s:
            # Not in the timer itself, where an error would be logged, and trio stand still for ever.
            self._reactor.call_later(pause_s, lambda: self._reactor.call_soon(step))
        else:
            self._reactor.call_soon(step)

    def _look(self) -> None:
        if self._token is not None:
            with suppress(OSError):  # then the next one
                self._token.run_sync_soon(_nothing, idempotent=True)
        go_on, idle_again = threading.Event(), list[object]()
        begun = 0
        try:
            while begun < SPARE_THREADS:  # all at once, or it would be the same one
                trio.lowlevel.start_thread_soon(go_on.wait, idle_again.append, "spare")
                begun += 1
        except RuntimeError as exc:
            if not self._is_short:
                logger.warning("no thread can be started (%s): trio looks for its I/O every %g s until one can", exc, POLL_S)
        self._is_short = begun < SPARE_THREADS
        self._is_polled = True  # until they are idle again, which takes a moment
        go_on.set()
        self._reactor.call_later(POLL_S, lambda: self._looked(idle_again))

    def _looked(self, idle_again: list[object]) -> None:
        if self._is_short:
            self._reactor.call_later(RETRY_S, self._look)
        elif len(idle_again) < SPARE_THREADS:
            self._reactor.call_later(POLL_S, lambda: self._looked(idle_again))
        else:
            self._is_polled = False
            self._reactor.call_later(LOOK_S, self._look)


def _nothing() -> None:
    """Done in trio's thread, behind whatever else waits to be done there."""
