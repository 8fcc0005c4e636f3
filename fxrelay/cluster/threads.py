"""Task: worker threads for the blocking calls of store and transporter, a few of their own.

A hop to a thread and back costs a third of what `trio.to_thread` takes for it: a login makes three of them.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, TypeVar

import outcome
import trio

T = TypeVar("T")

CLUSTER_THREADS: Final = 6
"""A store that hangs may hold these threads, and none of those the rest of the relay needs."""
IDLE_S: Final = 10.0
"""A thread without work ends after so long."""


class _Call:
    """A call on its way. `task` is None once nobody waits for it any more."""

    __slots__ = ("call", "outcome", "task")

    def __init__(self, call: Callable[[], Any], task: trio.lowlevel.Task) -> None:
        self.call = call
        self.task: trio.lowlevel.Task | None = task
        self.outcome: outcome.Outcome[Any] | None = None


class _Worker:
    """A thread, and the call it is to make next: it waits for `wake`."""

    __slots__ = ("call", "wake")

    def __init__(self, call: _Call) -> None:
        self.call: _Call | None = call
        self.wake = threading.Lock()
        self.wake.acquire()


class Threads:
    """The threads of one relay's cluster. Belongs to one trio thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0
        self._idle: list[_Worker] = []
        self._waiting: OrderedDict[_Call, None] = OrderedDict()
        self._done: list[_Call] = []
        self._token: trio.lowlevel.TrioToken | None = None

    async def run(self, call: Callable[[], T]) -> T:
        """Run a blocking call; what it raises is raised here. Cancelling abandons it: if it has begun, its result is lost."""
        await trio.lowlevel.checkpoint_if_cancelled()
        ordered = _Call(call, trio.lowlevel.current_task())

        def abort(_: object) -> trio.lowlevel.Abort:
            with self._lock:
                ordered.task = None
                self._waiting.pop(ordered, None)
            return trio.lowlevel.Abort.SUCCEEDED

        self._order(ordered, trio.lowlevel.current_trio_token())
        result: T = await trio.lowlevel.wait_task_rescheduled(abort)
        return result

    def _order(self, call: _Call, token: trio.lowlevel.TrioToken) -> None:
        with self._lock:
            if token is not self._token:  # of a run before this one nobody waits any more
                self._token, self._done = token, []
            if self._idle:
                worker = self._idle.pop()
                worker.call = call
                worker.wake.release()
                return
            if self._count >= CLUSTER_THREADS:
                self._waiting[call] = None
                return
            self._count += 1
        threading.Thread(target=self._work, args=(_Worker(call),), name="fxrelay cluster", daemon=True).start()

    def _work(self, worker: _Worker) -> None:
        while True:
            call = worker.call
            if call is not None and call.task is not None:
                call.outcome = outcome.capture(call.call)
                self._tell(call)
            del call  # what it holds on to is not kept while there is nothing to do
            with self._lock:
                worker.call = self._waiting.popitem(last=False)[0] if self._waiting else None
                is_idle = worker.call is None
                if is_idle:
                    self._idle.append(worker)
            if is_idle and not worker.wake.acquire(timeout=IDLE_S):
                with self._lock:
                    if worker in self._idle:
                        self._idle.remove(worker)
                        self._count -= 1
                        return
                worker.wake.acquire()  # it was given a call at the last moment

    def _tell(self, call: _Call) -> None:
        with self._lock:
            self._done.append(call)
            token = self._token if len(self._done) == 1 else None  # else it goes with those before
        if token is not None:
            with suppress(trio.RunFinishedError):  # then nobody waits any more
                token.run_sync_soon(self._deliver)

    def _deliver(self) -> None:
        with self._lock:
            done, self._done = self._done, []
        for call in done:
            if call.task is not None and call.outcome is not None:
                trio.lowlevel.reschedule(call.task, call.outcome)
                call.task = None
