"""Pump: one edge-triggered epoll with callbacks, timers and calls. It hosts trio as a guest, or runs inside a trio task.

In the daemons the reactor owns the thread and trio is its guest (`host_trio`): a byte that arrives costs one epoll wait, not two, and
trio's own I/O, which is rare, pays the extra hop instead (docs/adr/0001). Tests host the reactor in a task (`run_in_task`).
"""

import heapq
import itertools
import logging
import os
import select
import socket
import ssl
import time
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Any, Final, Protocol, TypeVar

import outcome
import trio

from fxtunnel.engine.guest import Guest
from fxtunnel.engine.offload import OffloadThread

logger = logging.getLogger(__name__)
T = TypeVar("T")

READ: Final = select.EPOLLIN
WRITE: Final = select.EPOLLOUT
HANGUP: Final = select.EPOLLRDHUP | select.EPOLLHUP
ERROR: Final = select.EPOLLERR | select.EPOLLHUP
URGENT: Final = select.EPOLLPRI
INCOMING: Final = READ | HANGUP | ERROR | URGENT
STREAM_EVENTS: Final = select.EPOLLIN | select.EPOLLPRI | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLET
ROOMY_EVENTS: Final = STREAM_EVENTS & ~select.EPOLLOUT
"""For a socket that has room for what it is sent, as it has until it was full once: that it has is no event."""
LISTENER_EVENTS: Final = select.EPOLLIN
LINK_EVENTS: Final = select.EPOLLIN | select.EPOLLRDHUP
"""Links are level-triggered: a short record then ends a read, without another call only to hear that there is no more."""

READ_BUFFER_BYTES: Final = 262_144
MAX_EVENTS: Final = 256
"""Handled in one turn, before timers and flushes."""
TASK_TICK_S: Final = 0.02
"""`run_in_task`: nothing wakes the loop when a task calls it, and `now` must not grow old for it."""
_FOREVER: Final = -1.0

AnySocket = socket.socket | ssl.SSLSocket


class Crashable(Protocol):
    """Who is called from the loop."""

    def on_crash(self) -> None:
        """A callback of this object raised, which is a bug; it has been logged. Let go of everything and unregister."""


class Handler(Crashable, Protocol):
    """Who hears of a file descriptor's events."""

    def on_event(self, events: int) -> None:
        """Something happened."""


class Flushable(Crashable, Protocol):
    """Who wants to write once, at the end of the turn."""

    def flush(self) -> None:
        """Write what was gathered in this turn."""


class Timer:
    """A pending call; `cancel` it when it is no longer wanted."""

    __slots__ = ("callback", "when")

    def __init__(self, when: float, callback: Callable[[], None]) -> None:
        self.when = when
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        """Forget the call. May be repeated, also after it ran."""
        self.callback = None


class Reactor:
    """The loop. Everything is called in one thread, except `call_soon_threadsafe`.

    `now` is the monotonic time at which the current turn began. `read_buffer` is scratch memory that any callback may use until it returns.
    `offload` is for work that takes too long for a callback.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._handlers: dict[int, Handler] = {}
        self._dirty: list[Flushable] = []
        self._again: list[Handler] = []
        self._gone: set[int] = set()
        self._calls: deque[Callable[[], object]] = deque()
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._wake_fd, select.EPOLLIN)
        self.offload = OffloadThread(self.call_soon_threadsafe)
        self.now = time.monotonic()
        self.read_buffer = memoryview(bytearray(READ_BUFFER_BYTES))

    def register(self, sock: AnySocket, handler: Handler, events: int = STREAM_EVENTS) -> None:
        """Call `handler` on the socket's events until `unregister`."""
        fd = sock.fileno()
        self._epoll.register(fd, events)
        self._handlers[fd] = handler

    def modify(self, sock: AnySocket, events: int) -> None:
        """Listen to other events of a registered socket."""
        self._epoll.modify(sock.fileno(), events)

    def unregister(self, sock: AnySocket) -> None:
        """Forget the socket, which stays open; may be repeated."""
        fd = sock.fileno()
        if self._handlers.pop(fd, None) is not None:
            self._gone.add(fd)
            self._epoll.unregister(fd)

    def forget(self, sock: AnySocket) -> None:
        """Forget the socket, which is closed next: that takes it out of the epoll without a call of its own (epoll(7), question 6)."""
        fd = sock.fileno()
        if self._handlers.pop(fd, None) is not None:
            self._gone.add(fd)

    def flush_later(self, flushable: Flushable) -> None:
        """Call `flush` at the end of this turn; the caller keeps itself from asking twice."""
        self._dirty.append(flushable)

    def again(self, handler: Handler) -> None:
        """Call `on_event(READ)` in the next turn: there was more than one turn's share."""
        if handler not in self._again:
            self._again.append(handler)

    def call_soon(self, call: Callable[[], object]) -> None:
        """Run `call` in the next turn."""
        self._calls.append(call)

    def call_soon_threadsafe(self, call: Callable[[], object]) -> None:
        """Run `call` in the next turn; from any thread."""
        self._calls.append(call)
        with suppress(OSError):  # it is made all the same, a little later, and whatever thread this is has other things to do
            os.eventfd_write(self._wake_fd, 1)

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> Timer:
        """Run `callback` once, `delay_s` seconds after the current turn began."""
        timer = Timer(self.now + delay_s, callback)
        heapq.heappush(self._timers, (timer.when, next(self._order), timer))
        return timer

    def host_trio(self, main: Callable[[], Awaitable[T]]) -> T:
        """Run the loop with `main` as trio's main task in the same thread; returns or raises what `main` does."""
        result: list[outcome.Outcome[Any]] = []
        guest = Guest(self)
        trio.lowlevel.start_guest_run(
            partial(guest.run, main),
            run_sync_soon_threadsafe=self.call_soon_threadsafe,
            run_sync_soon_not_threadsafe=guest.soon,
            done_callback=result.append,
            clock=guest,
            restrict_keyboard_interrupt_to_checkpoints=True,
        )
        guest.begin()
        while not result:
            self.run_once(self._wait_s())
        value: T = result[0].unwrap()
        return value

    async def run_in_task(self) -> None:
        """Run the loop inside a trio task until it is cancelled. What other tasks ask for happens within TASK_TICK_S."""
        fd = self._epoll.fileno()
        while True:
            wait_s = self._wait_s()
            if wait_s:
                with trio.move_on_after(min(wait_s, TASK_TICK_S) if wait_s > 0 else TASK_TICK_S):
                    await trio.lowlevel.wait_readable(fd)
            else:
                await trio.lowlevel.checkpoint()
            self.run_once(0)

    def run_once(self, timeout_s: float) -> None:
        """One turn: wait for events, call their handlers, then due timers and calls, then flush what was marked."""
        again = self._again
        if again:
            self._again = []
        events = self._epoll.poll(timeout_s, MAX_EVENTS)
        self.now = now = time.monotonic()
        handlers, gone = self._handlers, self._gone
        if gone:
            gone.clear()
        for fd, flags in events:
            handler = handlers.get(fd)
            if handler is not None:
                if gone and fd in gone:
                    continue  # the number was given away in this turn: this event was its former owner's
                try:
                    handler.on_event(flags)
                except Exception:
                    self.crashed(handler)
            elif fd == self._wake_fd:
                os.eventfd_read(fd)
        for handler in again:
            try:
                handler.on_event(READ)
            except Exception:
                self.crashed(handler)
        if self._timers and self._timers[0][0] <= now:
            self._run_timers()
        if self._calls:
            # No barrier: these are trio's own steps, without which it would stand still for ever, and what `offload` tells, which has one.
            for _ in range(len(self._calls)):
                self._calls.popleft()()
        if self._dirty:
            self._flush()

    def close(self) -> None:
        """Release the loop's own descriptors."""
        self.offload.close()
        self._epoll.close()
        os.close(self._wake_fd)

    def _flush(self) -> None:
        dirty, self._dirty = self._dirty, []
        for flushable in dirty:
            try:
                flushable.flush()
            except Exception:
                self.crashed(flushable)

    def _run_timers(self) -> None:
        while self._timers and self._timers[0][0] <= self.now:
            callback = heapq.heappop(self._timers)[2].callback
            if callback is not None:
                try:
                    callback()
                except Exception:
                    logger.exception("timer failed")

    def _wait_s(self) -> float:
        if self._dirty or self._again or self._calls:
            return 0.0
        while self._timers and self._timers[0][2].callback is None:
            heapq.heappop(self._timers)
        if not self._timers:
            return _FOREVER
        # epoll counts milliseconds: rounding up keeps a timer that is 0.4 ms away from spinning.
        return max(self._timers[0][0] - time.monotonic(), 0.0) + 0.0005

    def crashed(self, culprit: Crashable) -> None:
        """The one barrier of the data plane: a bug in one connection's callback ends that connection, nothing else.

        Call it while what was raised is being handled.
        """
        logger.exception("data plane callback failed")
        try:
            culprit.on_crash()
        except Exception:
            logger.exception("data plane clean-up failed")
