"""Task: the process itself: its limits, garbage collector, threads and memory; the signals that end or reload it; its last seconds."""

import contextlib
import gc
import logging
import os
import resource
import signal
import sys
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import Final, NoReturn, Protocol

import psutil
import trio

from fxtunnel.errors import ConfigError, FxError
from fxtunnel.kit.notify import GO, Notifier

logger = logging.getLogger(__name__)

POLL_S: Final = 0.1
ARRIVAL_S: Final = 1.0
"""For the last bytes of ended streams to reach the peer, once the drain time is over."""
PAUSE_S: Final = 1.0
"""Before `keep_going` starts again what failed: the same error may come again at once."""
GC_THRESHOLD: Final = (50_000, 20, 20)
"""The data plane makes no reference cycles; frequent collections would only cost latency."""
THREAD_SWITCH_S: Final = 0.0005


def raise_file_limit() -> int:
    """Lift the soft limit of open files to the hard one; returns what holds now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def open_files() -> int:
    """How many descriptors this process holds."""
    return psutil.Process().num_fds()


def memory_bytes() -> int:
    """Resident memory of this process."""
    rss: int = psutil.Process().memory_info().rss
    return rss


def settle() -> None:
    """Call once start-up is over: the collector never looks again at what exists now, and worker threads do not hold up the reactor.

    A reactor that wakes while a worker thread computes waits this long for its turn, 5 ms by default: a pause that every echo would feel.
    """
    sys.setswitchinterval(THREAD_SWITCH_S)
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLD)


def say_ready(line: str) -> None:
    """One line on standard output. Where that cannot be written (a full disk, a reader that is gone) the daemon serves all the same."""
    with contextlib.suppress(OSError):
        # Not by way of `sys.stdout`, which would keep it, try again at the end, and make that the exit code.
        os.write(sys.stdout.fileno(), f"{line}\n".encode(errors="replace"))


async def watch_signals(on_reload: Callable[[], None], on_stop: Callable[[], None], *, task_status: trio.TaskStatus[None]) -> None:
    """SIGHUP calls `on_reload`, SIGTERM and SIGINT call `on_stop`, until cancelled."""
    with trio.open_signal_receiver(signal.SIGHUP, signal.SIGTERM, signal.SIGINT) as signals:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})  # see `reload_held`
        task_status.started()
        async for number in signals:
            if number == signal.SIGHUP:
                on_reload()
            else:
                on_stop()


class Reloads:
    """Requests to read the configuration again. Those that come during a reload make one more after it."""

    def __init__(self) -> None:
        self._asked = trio.Event()

    def ask(self) -> None:
        """For `watch_signals`. Never blocks."""
        self._asked.set()

    async def run(self, reload: Callable[[], Awaitable[None]], notifier: Notifier) -> NoReturn:
        """Await `reload` whenever it was asked for, until cancelled. An FxError out of it is logged, and what was before stays."""
        await keep_going("waiting for reloads", partial(self._next, reload, notifier))

    async def _next(self, reload: Callable[[], Awaitable[None]], notifier: Notifier) -> None:
        await self._asked.wait()
        self._asked = trio.Event()
        notifier.reloading()
        try:
            await reload()
        except FxError as exc:
            for problem in exc.problems if isinstance(exc, ConfigError) else (exc,):
                logger.error("reload refused, the old configuration stays: %s", problem)
        except Exception:
            logger.exception("the reload failed, the old configuration stays as far as it was not replaced")
        notifier.ready()


async def keep_going(what: str, call: Callable[[], Awaitable[object]]) -> NoReturn:
    """Await `call` again and again, until cancelled. An error that nobody expected out of it is logged, and followed by a pause.

    For loops that a daemon cannot do without, and that hold nothing which a fresh start would not make good.
    """
    while True:
        try:
            await call()
            await trio.lowlevel.checkpoint()
        except Exception:
            logger.exception("%s failed, and begins again in %g s", what, PAUSE_S)
            await trio.sleep(PAUSE_S)


async def wait_until(condition: Callable[[], bool]) -> None:
    """Poll ten times a second until `condition` holds: for start-up and shutdown, where nothing signals the change."""
    await trio.lowlevel.checkpoint()
    while not condition():
        await trio.sleep(POLL_S)


async def let_finish(what: str, count: Callable[[], int], drain_s: float) -> None:
    """Wait until `count` is 0, for `drain_s` seconds at most. What is left then is logged; the caller ends it."""
    logger.info("stopping: %s have %g s to finish; open now: %d", what, drain_s, count())
    with trio.move_on_after(drain_s):
        await wait_until(lambda: not count())
    if left := count():
        logger.warning("%s did not finish in time and are reset: %d", what, left)


class Delivering(Protocol):
    """What may still hold the last bytes of streams that have ended."""

    @property
    def has_delivered(self) -> bool:
        """Whether it does not."""

    def press(self) -> None:
        """Ask for them to be acknowledged."""


async def let_arrive(sessions: Callable[[], Iterable[Delivering]], until: float) -> None:
    """Wait until peers have what was last sent on streams that have ended: at most until then, by trio's clock, but at least ARRIVAL_S."""
    waiting = [session for session in sessions() if not session.has_delivered]
    for session in waiting:
        session.press()
    with trio.move_on_at(max(until, trio.current_time() + ARRIVAL_S)):
        await wait_until(lambda: all(session.has_delivered for session in waiting))
    if left := sum(not session.has_delivered for session in waiting):
        logger.warning("%d tunnels have not acknowledged the last bytes of their streams, which may be lost", left)


async def follow_launcher(notifier: Notifier, on_stop: Callable[[], None], *, task_status: trio.TaskStatus[None]) -> None:
    """Started when it is this process's turn: at once, or when the one before has let go. Calls `on_stop` when the launcher is gone.

    Without a launcher it returns at once.
    """
    launcher = notifier.launcher
    if launcher is None:
        task_status.started()
        return
    notifier.prepared()
    await trio.lowlevel.wait_readable(launcher)
    is_ours = notifier.hear() == GO
    task_status.started()
    while is_ours:
        await trio.lowlevel.wait_readable(launcher)
        is_ours = notifier.hear() == GO  # said twice it means no more than once; anything else is its end, or its word that it is ours too
    on_stop()


async def feed_watchdog(notifier: Notifier) -> None:
    """Tell systemd's watchdog that the loop turns; returns at once if systemd did not ask."""
    interval_s = notifier.watchdog_interval_s
    if interval_s is not None:
        await keep_going("feeding the watchdog", partial(_feed_once, notifier, interval_s / 2))


async def _feed_once(notifier: Notifier, pause_s: float) -> None:
    notifier.watchdog()
    await trio.sleep(pause_s)
