"""Pump: one thread beside the loop for work that would block it, one piece after the other."""

import logging
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import outcome
import trio

from fxtunnel.kit.fair_queue import FairQueue

logger = logging.getLogger(__name__)

THREAD_NAME: Final = "beside-the-loop"
Work = Callable[[], object]
Then = Callable[[outcome.Outcome[Any]], None]


class OffloadThread:
    """One for each reactor. The work should be C code that releases the GIL; otherwise it blocks the loop all the same.

    There is never more than one thread, so that a crowd cannot make many of them, nor take more than one core. It is trio's, which keeps
    idle ones for a while. The sources of work take turns, so that a crowd from one of them keeps no other one waiting.

    While no thread can be started (a limit of tasks or of memory), the loop does the work itself, one piece in a turn: what is held up by
    it is a millisecond, and nobody waits in vain.
    """

    __slots__ = ("_call_soon_threadsafe", "_is_closed", "_is_under_way", "_is_without_thread", "_lock", "_waiting")

    def __init__(self, call_soon_threadsafe: Callable[[Callable[[], object]], None]) -> None:
        self._call_soon_threadsafe = call_soon_threadsafe
        self._is_under_way = False
        """Whether a thread, or the loop, is taking pieces out of the queue, or soon will."""
        self._is_without_thread = False
        self._is_closed = False
        self._lock = threading.Lock()
        """Held only to put a piece in, take one out, or pass a result to the loop."""
        self._waiting: FairQueue[tuple[Work, Then]] = FairQueue()

    def do(self, work: Work, then: Then, source: str = "") -> None:
        """Call `work` in the thread, then `then` with its outcome in the loop. The caller bounds how much work it queues."""
        with self._lock:
            self._waiting.put(source, (work, then))
        if not self._is_under_way:
            self._begin()

    def close(self) -> None:
        """The loop ends: queued work is not done, and no results are delivered any more. Does not wait for work in progress."""
        with self._lock:
            self._is_closed = True

    def _begin(self) -> None:
        self._is_under_way = True
        try:
            trio.lowlevel.start_thread_soon(self._work, self._ended, THREAD_NAME)
        except RuntimeError as exc:
            if not self._is_without_thread:
                logger.warning("no thread can be started (%s): the loop does its work until one can", exc)
            self._is_without_thread = True
            self._tell(self._do_one)
        else:
            self._is_without_thread = False

    def _work(self) -> None:
        while (piece := self._take()) is not None:
            work, then = piece
            self._tell(partial(_told, then, outcome.capture(work)))

    def _do_one(self) -> None:
        if (piece := self._take()) is not None:
            work, then = piece
            _told(then, outcome.capture(work))
        self._look_again()

    def _take(self) -> tuple[Work, Then] | None:
        with self._lock:
            return None if self._is_closed or not self._waiting else self._waiting.take()

    def _ended(self, result: outcome.Outcome[None]) -> None:
        self._tell(self._look_again)

    def _tell(self, call: Callable[[], object]) -> None:
        with self._lock:  # a loop that has closed has given the number of its descriptor away: somebody else's may be written to
            if not self._is_closed:
                self._call_soon_threadsafe(call)

    def _look_again(self) -> None:
        self._is_under_way = False
        if self._waiting:
            self._begin()


def _told(then: Then, result: outcome.Outcome[Any]) -> None:
    try:
        then(result)
    except Exception:
        logger.exception("what was done beside the loop could not be told")
